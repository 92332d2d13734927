"""The `data:` of a recipe: sources and how they are mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class RecipeModel(BaseModel):
    """What every mapping of a recipe is: no unknown key, no value of another type."""

    # strict: `true` is not a learning rate and "5" is not a number; YAML already says which type a value has.
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


def _check_prompts(value: Any) -> Any:
    """Says in one sentence what a union of types would say in two."""
    pools = list(value.values()) if isinstance(value, dict) else [value]
    texts = all(isinstance(pool, list) and all(isinstance(text, str) for text in pool) for pool in pools)
    if not texts or (isinstance(value, dict) and not all(pools)):
        sentence = "Input should be a list of instructions, or one for each language such as {en: [Describe it.]}"
        raise PydanticCustomError("prompts", "{sentence}", {"sentence": sentence})
    return value


class Source(RecipeModel):
    """One source of rows: local files or a dataset on the Hub."""

    path: str
    """File, folder or Hub dataset id."""
    format: Literal["messages", "llava", "caption", "vqa", "cauldron", "coco", "cc_sbu_align", "vqav2", "gqa"]
    """What a row means: `messages` (TRL conversational), `llava` (LLaVA, ShareGPT4V), `caption`, `vqa`, `cauldron`, or
    a data set as published: `coco` (captions), `cc_sbu_align`, `vqav2`, `gqa`; see docs/data_formats.md."""
    name: str | None = None
    """What logs, row ids and evaluation call it. Default: the last part of `path` without its suffix."""
    images: str | None = None
    """Folder that relative image paths start from. Default: the folder of `path`."""
    split: str = "train"
    """Split of a Hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name → the one in the file, for example `{caption: text}`."""
    annotations: str | None = None
    """vqav2: file with the answers to the questions in `path`."""
    image_name: str | None = None
    """coco, cc_sbu_align, vqav2, gqa: how image files are called, `{id}` or `{id:012}` in it. Default: as published."""
    prompts: Annotated[list[str] | dict[str, list[str]], BeforeValidator(_check_prompts)] = Field(default_factory=list)
    """Captions and questions: what the user asks; one is drawn for each row, seeded. By language: `{en: […], zh: […]}`.
    Around a question they hold `{question}`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of this source under `sampling: weights`; under the others a factor on its share."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows."""
    allow_urls: bool = False
    """Fetch images that are URLs, within limits and never from private addresses; see docs/images.md."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """Take part as if every row were there so many times."""

    @model_validator(mode="after")
    def _name_it(self) -> Source:
        if self.name is None:
            # Not Path.stem alone: `org/data` and `folder/` have no suffix to lose, `a.b.json` loses only the last.
            self.name = Path(self.path.rstrip("/\\")).stem or self.path
        return self


class Data(RecipeModel):
    """What is trained and evaluated on."""

    train: list[Source] = Field(min_length=1)
    """Training sources; several are mixed as `sampling` says."""
    eval: list[Source] = Field(default_factory=list)
    """Sources for the evaluations during training; choices are made on these."""
    test: list[Source] = Field(default_factory=list)
    """Sources for the final number; nothing is chosen by them."""
    sampling: Literal["proportional", "sqrt", "weights"] = "proportional"
    """How sources are mixed: by size, by its square root (InstructBLIP), or by each source's `weight`."""
    streaming: bool = False
    """Read training rows while training instead of before it; needs `sft.max_steps`. See docs/streaming.md."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 1000
    """streaming: the next row is drawn from so many; 1 keeps the order of the files."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest share of a source's rows that may be rejected and left out; 0 stops at the first. See docs/ledger.md."""
    measure_rows: Annotated[int, Field(ge=1)] | None = 20_000
    """How many rows of each source are rendered and tokenised before the first step, an even sample; null: all."""
    decode_rows: Annotated[int, Field(ge=0)] | None = 500
    """How many of the measured rows of each source have their images decoded before the first step; null: all."""
    url_cache: str | None = None
    """Folder that fetched images are kept in. Unset: `vlm_sft/images` in the user's cache folder."""
    languages: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """Language → its share of the training rows; `{zh: 1, en: 1}` for as many of each. Unset: as the sources are."""
