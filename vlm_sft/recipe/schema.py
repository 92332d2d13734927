"""A recipe: one YAML file that describes one training stage, read and checked before any weight is.

Only what is ours has a model: the whole here, its sections in `sections`. `sft:`, `lora:` and `quantization:` are
passed on to the libraries' own classes, which `libraries` builds. The rules between keys live in `rules`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PrivateAttr, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from ..base.assets import list_recipes, recipe_path
from ..base.console import tell
from ..base.errors import UserError
from ..base.limits import Limits as Budget
from ..base.limits import hold, limits
from ..base.names import ALL_PARTS, MANIFEST, Json, Options
from ..base.whole_files import check_regular
from ..base.words import closest
from .passed_on import AnswerMetric, flaw_of_answers
from .rules import first_broken_rule
from .sections import (
    BoxNotation,
    Data,
    Dtype,
    Hub,
    LanguageModel,
    PretrainedModel,
    RecipeModel,
    Source,
    Stack,
    Watch,
)
from .yaml_file import KeyPath, YamlFile, dump_yaml

_TRAIN_SCHEMA: Json = {"propertyNames": {"enum": list(ALL_PARTS)}}
_SFT_SCHEMA: Json = {"required": ["output_dir"], "properties": {"output_dir": {"type": "string"}}}
_LORA_SCHEMA: Json = {"properties": {"add_tokens": {"type": "array", "items": {"type": "string"}}}}
_LIMITS: Json = {
    each.name: (Annotated[int, Field(ge=1, description=each.metadata["what"])], each.default) for each in fields(Budget)
}
if TYPE_CHECKING:
    Limits = RecipeModel
else:
    Limits = create_model("Limits", __base__=RecipeModel, __doc__="What may be taken before it is refused.", **_LIMITS)


class Cache(RecipeModel):
    """Features of frozen parts, kept on disk for the next epoch, stage and run; see docs/cache.md."""

    path: str
    """Folder; several recipes and runs may share one."""
    dtype: Dtype | None = None
    """Type that features are kept in. Unset: as the frozen parts give them, so that nothing is rounded."""
    max_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest size of the folder in GB; what does not fit goes through the tower each time. Unset: the disk's."""


class Evaluation(RecipeModel):
    """What is asked at each evaluation of the run, and of the finished bundle; see docs/evaluation.md."""

    benchmarks: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of benchmarks that ship, or files of one's own; the finished bundle is asked them too."""
    data: str | None = None
    """Folder of their data, with one folder for each. Unset: the Hub."""
    metrics: list[AnswerMetric] = Field(default_factory=list)
    """What answers to the rows of `data.eval` are measured by; `sft.metric_for_best_model` may name one by itself."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many rows of each benchmark and, for `metrics`, of each source."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Questions at a time."""
    samples: Annotated[int, Field(ge=0)] | None = None
    """How many rows of `data.eval`, the same each time, have their answers shown and kept. Unset: 4; 0 for none."""
    samples_from: Source | None = None
    """Rows to take them from, in place of `data.eval`."""
    forgetting: bool = False
    """Measure at each evaluation, and before the first step, how likely the model finds texts without pictures."""
    forgetting_texts: str | None = None
    """File of such texts and questions. Unset: those that ship, in English and Chinese."""
    forgetting_limit: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.2
    """How many times as large the perplexity of a language may become before it is warned of."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row that are no better by `sft.metric_for_best_model`. Unset: never."""


class Encoder(RecipeModel):
    """A model that reads a question and an image together and answers in one step: VLE, or in a few words: mPLUG."""

    pretrained: str
    """Hub id or folder of a VLE or an mPLUG, or an mPLUG's weight file."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    tokenizer: str | None = None
    """Hub id or folder of an mPLUG's tokenizer, where its files have none: `google-bert/bert-base-uncased`."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Pixels of a side; a table of positions made for another size is resized. Unset: the checkpoint's."""
    task: Literal["vqa", "vcr"] = "vqa"
    """What a VLE is trained for: to answer questions (`vqa`), or to choose answers and reasons in rows of VCR."""
    answers: str | None = None
    """File of the answers that there are: a JSON list of texts, or one a line. Unset: those of the checkpoint, or else
    those of the rows of `data.train`."""
    min_count: Annotated[int, Field(ge=1)] = 1
    """Of the answers of the rows, those that so many rows give (VQAv2, as published: 9)."""
    config: Options = Field(default_factory=dict)
    """Sizes that no file of an mPLUG tells: `{num_attention_heads: 12}`."""


class Recipe(RecipeModel):
    """One training stage. Relative paths are relative to the working directory."""

    stack: Stack | None = None
    """The four parts of the model, in the order an image passes them."""
    model: PretrainedModel | None = None
    """An existing VLM to start from, in place of `stack`."""
    encoder: Encoder | None = None
    """An encoder to start from, in place of `stack`: a VLE or an mPLUG."""
    init_from: str | None = None
    """Bundle of the earlier stage to start from. Its parts must be the same; what differs is named."""
    lora_from: Literal["continue", "merge"] | None = None
    """What becomes of the LoRA of `init_from`: `continue` trains it on, `merge` puts it into the weights below, beside
    which a new one starts."""
    chat_template: str | None = None
    """Name of a chat template that ships, or path of a `.jinja` file with generation markers. With `model`, unset is
    the model's own."""
    system: str | None = None
    """System prompt for conversations that have none. Unset: the template's own."""
    box_notation: BoxNotation | None = None
    """How boxes of rows are written. Unset: as the model was taught (`model`), or `shikra` (`stack`). See
    docs/data_formats.md."""
    train: dict[str, float] = Field(default_factory=dict, json_schema_extra=_TRAIN_SCHEMA)
    """Part → peak learning rate. What is not named is frozen."""
    lora: Options | None = Field(default=None, json_schema_extra=_LORA_SCHEMA)
    """LoRA on the language model: arguments of `peft.LoraConfig`, and `add_tokens`, new words that are learned with it.
    Its learning rate is `sft.learning_rate`."""
    quantization: Options | None = None
    """QLoRA: the language model alone is loaded in 4 or 8 bits; arguments of `transformers.BitsAndBytesConfig`."""
    data: Data
    """Sources to train on, to evaluate on and to test on."""
    collator: str | None = None
    """Your own collator, `package.module:Class`. Unset: `MultimodalCollator`."""
    collator_args: Options = Field(default_factory=dict)
    """Further arguments of the collator."""
    cache: Cache | None = None
    """Keeps what frozen vision tower and resampler give for each image, so that they run once; see docs/cache.md."""
    sft: Options = Field(json_schema_extra=_SFT_SCHEMA)
    """Arguments of `trl.SFTConfig`, passed on as they are. `output_dir` is required."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """What is asked while training; `sft.metric_for_best_model: exact_match` or `gqa_accuracy` picks by it."""
    watch: Watch = Field(default_factory=Watch)
    """What happens to steps whose loss is not finite or jumps."""
    generation: Options = Field(default_factory=dict)
    """Arguments of `transformers.GenerationConfig` for chat, generate and evaluate."""
    limits: Limits = Field(default_factory=Limits)
    """What may be taken before it is refused; a bundle's recipe raises none of them for who loads it."""
    hub: Hub | None = None
    """Where the bundle is pushed to. A push that fails never stops training; see docs/hub.md."""

    _file: YamlFile | None = PrivateAttr(default=None)
    _path: Path | None = PrivateAttr(default=None)
    _strange: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _keep_rules(self) -> Recipe:
        if (broken := first_broken_rule(self)) is not None:
            path, sentence = broken
            raise PydanticCustomError("rule", "{sentence}", {"sentence": sentence, "path": path})
        return self

    @property
    def path(self) -> Path | None:
        """The file that the recipe was read from, if it was."""
        return self._path

    @property
    def strange(self) -> bool:
        """Whether it may be a stranger's: it came with a bundle, and not from the user's own hand."""
        return self._strange

    @property
    def parts(self) -> Stack:
        """The stack, of a recipe that is known to have one."""
        assert self.stack is not None, "the recipe starts from an existing model"
        return self.stack

    @property
    def text_piece(self) -> LanguageModel | PretrainedModel:
        """The piece whose tokenizer is used."""
        return self.model or self.parts.language_model

    @property
    def words(self) -> list[str]:
        """The words that its tokenizer is given: those of earlier stages, then its own."""
        if self.encoder:
            return []
        return [*self.text_piece.added_tokens, *((self.lora or {}).get("add_tokens") or ())]

    def with_words(self, words: list[str]) -> Recipe:
        """A copy in which these are the words of earlier stages."""
        piece = self.text_piece.model_copy(update={"added_tokens": words})
        if self.model:
            return self.model_copy(update={"model": piece})
        return self.model_copy(update={"stack": self.parts.model_copy(update={"language_model": piece})})

    def resolved(self) -> Json:
        """Returns the recipe with overrides, interpolations and defaults filled in, as plain dicts and lists."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns `resolved()` as YAML that `load_recipe` reads back to an equal recipe."""
        return dump_yaml(self.resolved())

    def is_typed(self, path: KeyPath) -> bool:
        """Whether an override set this key: the word of the user, not that of a file."""
        return self._file is not None and self._file.is_overridden(path)

    def where(self, path: KeyPath) -> str:
        """Says where a key was set, for messages: `recipes/x.yaml, line 12` or `override "sft.max_steps=1"`."""
        return self._file.where(path) if self._file is not None else "the recipe"

    def error(self, path: KeyPath, sentence: str) -> UserError:
        """A sentence on what a key says, behind where it was set."""
        return UserError(f"{self.where(path)}: {sentence}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, puts overrides on top, fills in `${...}` and checks all of it, without weights and without torch.

    Args:
        path: file of a recipe, or the bare name of one that ships, like `quickstart_stage1`.
        overrides: `key.path=value` each; the value is YAML, an index of a list is a number
            (`data.train.0.max_rows=10`), a mapping or a list replaces the old one.

    Returns:
        The checked recipe. Its `limits` hold in this process from now on, those of a stranger's where they were typed.
        Types inside `sft:`, `lora:` and `quantization:` are checked by `validate_libraries`. A recipe beside a
        `bundle.json` came with a bundle, which may be a stranger's: see `Recipe.strange`.

    Raises:
        UserError: one sentence that says what is wrong and where: file and line, or the override.
    """
    found = _find_recipe(path)
    file = YamlFile.read(found)
    try:
        recipe = Recipe.model_validate(file.resolve(overrides))
    except ValidationError as error:
        raise UserError(_sentence(error, file)) from error
    recipe._file, recipe._path, recipe._strange = file, found, (found.parent / MANIFEST).is_file()
    given = recipe.limits.model_dump(exclude_unset=True)
    hold({name: value for name, value in given.items() if not recipe.strange or recipe.is_typed(("limits", name))})
    if recipe.strange and (flaw := flaw_of_answers(recipe.generation, limits())):  # whatever its own `limits` say
        raise recipe.error(("generation", flaw[0]), f"`generation`: {flaw[1]}")
    return recipe


def recipe_schema() -> Json:
    """Returns the JSON schema of a recipe, with which editors complete and check recipes."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "vlm_sft recipe"}


def _find_recipe(path: str | Path) -> Path:
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if given.is_dir():
        raise UserError(f"{path} is a folder; name the recipe's YAML file in it.")
    check_regular(given)
    if str(path) in (shipped := list_recipes()):
        return recipe_path(str(path))
    beside = sorted(str(other) for other in given.parent.glob("*.yaml")) if given.parent.is_dir() else []
    if hint := closest(str(given), beside):
        advice = f"did you mean {hint}?"
    elif hint := closest(given.stem, shipped):
        advice = f'"{hint}" ships with vlm_sft and can be named like that.'
    else:
        advice = f"these ship: {', '.join(shipped)}."
    raise UserError(f"the recipe {path} does not exist; {advice}")


def _sentence(error: ValidationError, file: YamlFile) -> str:
    """Turns pydantic's report into one sentence about the first thing to mend."""
    problems = error.errors(include_url=False)
    # A misspelt required key is reported twice, as unknown and as missing: the first says how to mend it.
    problem = min(problems, key=lambda each: each["type"] != "extra_forbidden")
    if problem["type"] == "rule":
        return f"{file.where(problem['ctx']['path'])}: {problem['ctx']['sentence']}"
    path = tuple(part for part in problem["loc"] if part != "[key]")
    if path[:2] == ("stack", "projector"):
        path = path[:2] + path[3:]  # pydantic names the projector's kind after the key
    dotted = ".".join(map(str, path))
    where = file.where(path)
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(path[:-1])
        hint = closest(str(path[-1]), valid)
        advice = f'did you mean "{hint}"?' if hint else f"these are valid here: {', '.join(valid)}."
        return f'{where}: unknown key "{dotted}"; {advice}'
    if problem["type"] == "union_tag_not_found":
        return f'{where}: the key "{dotted}.type" is missing.'
    if problem["type"] == "union_tag_invalid":
        kinds = " or ".join(problem["ctx"]["expected_tags"].rsplit(", ", 1))
        return f'{file.where((*path, "type"))}: "{dotted}.type" must be {kinds}, not {problem["ctx"]["tag"]!r}.'
    if problem["type"] == "missing":
        return f'{where}: the key "{dotted}" is missing.'
    if problem["type"] == "too_short":
        return f'{where}: "{dotted}" must not be empty.'
    must = problem["msg"].replace("Input should", "must", 1)
    must = must if must.startswith("must") else f"is wrong ({must})"
    return f'{where}: "{dotted}" {must}, not {problem["input"]!r}.'


def _keys_at(path: KeyPath) -> list[str]:
    """Returns the keys that a recipe may have at a place, by walking the JSON schema."""
    schema = recipe_schema()
    definitions = schema["$defs"]
    here: Json = schema
    for part in path:
        here = here["items"] if isinstance(part, int) else here["properties"][part]
        choices = here.get("anyOf") or here.get("oneOf") or [here]  # a union has the keys of each of its kinds
        found = [definitions[choice["$ref"].rsplit("/", 1)[-1]]["properties"] for choice in choices if "$ref" in choice]
        here = {"properties": {key: value for keys in found for key, value in keys.items()}} if found else here
    return list(here["properties"])


if __name__ == "__main__":
    tell(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
