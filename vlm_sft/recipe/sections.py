"""Every section of a recipe: the parts of a stack, an existing VLM, the data, what is watched, where a bundle goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from ..base.names import Options

Dtype = Literal["float32", "bfloat16", "float16"]
BoxNotation = Literal[
    "qwen2_5_vl", "qwen3_vl", "internvl", "qwen_vl", "qwen2_vl", "kosmos2", "paligemma", "shikra", "llava"
]


class RecipeModel(BaseModel):
    """What every mapping of a recipe is: no unknown key, no value of another type."""

    # strict: `true` is not a learning rate and "5" is not a number; YAML already says which type a value has.
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class _Piece(RecipeModel):
    """What every part of the stack can say about where it comes from."""

    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    trust_remote_code: bool = False
    """Run Python code that a Hub repository brings along. Only for repositories you have read."""


class _Picked(_Piece):
    """A part that can be picked out of files of other layouts."""

    config: Options = Field(default_factory=dict)
    """Sizes that no tensor tells, or in place of those of the checkpoint: `{num_attention_heads: 16}`."""
    more: list[str] = Field(default_factory=list)
    """Further weight files for what the first lacks (MiniGPT-4: the norm after the ViT is in the Q-Former's file)."""


class VisionTower(_Picked):
    """The part that turns an image into patch features."""

    pretrained: str
    """Hub id or folder of any checkpoint that contains a vision encoder, or a weight file of LAVIS or MiniGPT-4."""
    feature_layer: int = -1
    """-1 is the tower's last hidden state after its final norm (BLIP-2); -2 is `hidden_states[-2]` (LLaVA)."""
    feature_select: Literal["full", "patch"] = "full"
    """`full` keeps every token (BLIP-2), `patch` drops the class token (LLaVA)."""
    pad_to_square: bool = False
    """Pad images to a square with the mean colour before resizing (LLaVA-1.5)."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Pixels of a side; a table of positions made for another size is resized (LAVIS: 364). Unset: the checkpoint's."""
    tiles: Literal["anyres", "dynamic"] | None = None
    """Cuts images into tiles of that size: `anyres` (LLaVA-1.6) or `dynamic` (InternVL); see docs/systems.md."""
    tile_grids: list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]] | None = None
    """anyres: `[rows, columns]` that an image may be cut into. Unset: the checkpoint's, else LLaVA-1.6's."""
    max_tiles: Annotated[int, Field(ge=1)] | None = None
    """dynamic: the most tiles, without the picture of all. Unset: the checkpoint's, else 12."""
    dtype: Dtype | None = None
    """Type of the weights; unset: float32 where trained, else what `sft:` computes in."""


class Resampler(_Picked):
    """The part that turns patch features into a fixed number of query features. Leave it out for LLaVA."""

    type: Literal["qformer", "instruct_qformer", "abstractor", "cross_attention"]
    """`qformer` (BLIP-2), `instruct_qformer`, `abstractor` (mPLUG-Owl) or `cross_attention` (Qwen-VL)."""
    pretrained: str | None = None
    """Hub id or folder of any checkpoint that contains the resampler, or a weight file of LAVIS or MiniGPT-4."""
    tokenizer: str | None = None
    """instruct_qformer: Hub id or folder of its own tokenizer. Unset: `qformer_tokenizer` in the checkpoint."""


class _Projector(_Piece):
    """What projectors of every kind can say."""

    type: str
    """Its kind: linear, linear_end, linear_no_bias, mlp, mlp_norm, pixel_shuffle or pixel_shuffle_mlp."""
    init: Literal["default", "match_embeddings"] = "default"
    """`match_embeddings` scales a new projector's output to the language model's embeddings."""
    pretrained: str | None = None
    """Hub id, folder or file to read the projector from, instead of starting it anew."""

    @property
    def options(self) -> Options:
        """What its kind alone can say."""
        return self.model_dump(exclude=set(_Projector.model_fields))


class Linear(_Projector):
    """One linear layer, or a relative of it; its sizes come from its neighbours, as those of every projector."""

    type: Literal["linear", "linear_end", "linear_no_bias"]
    """`linear` (BLIP-2, MiniGPT-4), `linear_end` (mPLUG-Owl: and a learned token) or `linear_no_bias` (Qwen-VL)."""


class MLP(_Projector):
    """Linear layers with a function between them, and perhaps a norm behind each."""

    type: Literal["mlp", "mlp_norm"]
    """`mlp` (LLaVA-1.5), or `mlp_norm` (Yi-VL: and a norm behind each layer)."""
    depth: Annotated[int, Field(ge=1, le=64)] = 2
    """Number of linear layers."""
    activation: str = "gelu"
    """The function between the layers, as transformers names it."""


class PixelShuffle(_Projector):
    """Neighbouring patches folded into one token, then a linear layer."""

    type: Literal["pixel_shuffle", "pixel_shuffle_mlp"]
    """Folds neighbouring patches into one token; `pixel_shuffle_mlp` (InternVL) has a norm and an mlp behind it."""
    scale_factor: Annotated[int, Field(ge=1, le=64)] = 2
    """Side of the square of patches that becomes one token."""


AnyProjector = Linear | MLP | PixelShuffle
PROJECTOR_KINDS: dict[str, type[_Projector]] = {
    name: kind for kind in get_args(AnyProjector) for name in get_args(kind.model_fields["type"].annotation)
}


def _without_options_of_others(value: object) -> Any:
    """Refuses what another kind of projector can say, but for defaults: recipes in older bundles state those of all."""
    if not isinstance(value, dict) or value.get("type") not in PROJECTOR_KINDS:
        return value
    own = PROJECTOR_KINDS[value["type"]].model_fields
    others = {
        key: (name, kind.model_fields[key].default)
        for name, kind in reversed(PROJECTOR_KINDS.items())
        for key in kind.model_fields.keys() - own.keys()
    }
    for key in value.keys() & others.keys():
        if value[key] != others[key][1]:
            sentence = f"`{key}` belongs to a projector of type {others[key][0]}, not {value['type']}."
            said = {"sentence": sentence, "path": ("stack", "projector", key)}
            raise PydanticCustomError("rule", "{sentence}", said)
    return {key: given for key, given in value.items() if key not in others}


Projector = Annotated[AnyProjector, Field(discriminator="type"), BeforeValidator(_without_options_of_others)]


class LanguageModel(_Piece):
    """The causal language model that reads the projected features among its embeddings."""

    pretrained: str
    """Hub id or folder of any causal language model of transformers."""
    added_tokens: list[str] = Field(default_factory=list)
    """Words that an earlier stage added to its tokenizer (`lora.add_tokens`); `init_from` fills them in."""
    dtype: Dtype | None = None
    """Type of the weights; unset: float32 where trained, else what `sft:` computes in."""
    attn_implementation: str | None = None
    """As transformers names it, for example `sdpa` or `flash_attention_2`."""


class Stack(RecipeModel):
    """The four parts, in the order an image passes them."""

    vision_tower: VisionTower
    """Image → patch features."""
    resampler: Resampler | None = None
    """Patch features → a fixed number of query features; leave it out for LLaVA."""
    projector: Projector
    """Features → the width of the language model. Its sizes come from its neighbours."""
    language_model: LanguageModel
    """A causal language model, which reads the projected features among its embeddings."""


class PretrainedModel(RecipeModel):
    """An existing VLM of transformers, with its own processor."""

    pretrained: str
    """Hub id or folder: LLaVA-1.5 and 1.6, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, PaliGemma, InternVL, Gemma 3, …"""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    added_tokens: list[str] = Field(default_factory=list)
    """Words that an earlier stage added to its tokenizer (`lora.add_tokens`); `init_from` fills them in."""
    dtype: Dtype | None = None
    """Type of the weights that are not trained; unset: what `sft:` computes in."""
    attn_implementation: str | None = None
    """As transformers names it, for example `sdpa` or `flash_attention_2`."""
    processor: Options = Field(default_factory=dict)
    """Arguments of the model's own processor, for example `{max_pixels: 1003520}` (Qwen-VL)."""


AnyPiece = VisionTower | Resampler | AnyProjector | LanguageModel | PretrainedModel


def _check_prompts(value: object) -> Any:
    """Says in one sentence what a union of types would say in two."""
    pools = list(value.values()) if isinstance(value, dict) else [value]
    texts = all(isinstance(pool, list) and all(isinstance(text, str) for text in pool) for pool in pools)
    if not texts or (isinstance(value, dict) and not all(pools)):
        sentence = "Input should be a list of instructions, or one for each language such as {en: [Describe it.]}"
        raise PydanticCustomError("prompts", "{sentence}", {"sentence": sentence})
    return value


class Video(RecipeModel):
    """Which frames of a video are shown, where its row does not say it; see docs/data_formats.md."""

    frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    """So many, from the first to the last in equal steps; unset, and without `fps`: 8."""
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """So many a second, in place of `frames`."""
    min_frames: Annotated[int, Field(ge=1, le=4096)] = 1
    """With `fps`: at least so many, then in equal steps."""
    max_frames: Annotated[int, Field(ge=1, le=4096)] = 64
    """With `fps`: at most so many, then in equal steps."""
    max_pixels: Annotated[int, Field(ge=1)] = 262_144
    """Width times height of a frame at most; a larger one is scaled down."""
    time: str = "<{time} seconds>"
    """Text before each frame: `{time}` is its second (12.5), `{clock}` its minute and second (00:12); "" for none."""

    @model_validator(mode="after")
    def _one_count(self) -> Video:
        if self.frames is not None and self.fps is not None:
            raise PydanticCustomError("video", "`frames` and `fps` both say how many frames there are; keep one")
        if self.min_frames > self.max_frames:
            raise PydanticCustomError("video", "`min_frames` is above `max_frames`; correct one of them")
        return self


class Source(RecipeModel):
    """One source of rows: local files or a dataset on the Hub."""

    path: str
    """File, folder or Hub dataset id."""
    format: Literal["messages", "llava", "caption", "vqa", "cauldron", "vcr", "vcr_q2a", "vcr_qa2r", "coco",
                    "cc_sbu_align", "vqav2", "gqa"]  # fmt: skip
    """What a row means: `messages` as TRL has them, …, or a data set as published; see docs/data_formats.md."""
    name: str | None = None
    """What logs, row ids and evaluation call it. Default: the last part of `path` without its suffix."""
    images: str | None = None
    """Folder that relative image paths start from. Default: the folder of `path`."""
    image_folders: list[str] = Field(default_factory=list)
    """Further folders, beside `images` and that of `path`, in which images may lie; rows with others are refused."""
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
    """What the user asks, drawn for each row, seeded; or `{en: […], zh: […]}`. A question is `{question}` there."""
    boxes: Literal["pixels", "unit", "thousand", "padded", "as_written"] | None = None
    """What the numbers of boxes count where a row does not say it: pixels of its picture, 0 to 1 or 0 to 1000 of the
    picture's sides, or 0 to 1 of the square that it is centred on (LLaVA). It makes boxes of those typed in text too;
    `as_written` leaves them the text that they are. See docs/data_formats.md."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of this source under `sampling: weights`; under the others a factor on its share."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows."""
    allow_urls: bool = False
    """Fetch images that are URLs, within limits and never from private addresses; see docs/images.md."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """Take part as if every row were there so many times."""
    video: Video | None = None
    """Which frames of videos are shown. Unset: as `data.video` says."""
    merge_by_image: bool = False
    """Rows on the same pictures become turns of one conversation, up to `sft.max_length`; see docs/data.md."""
    independent: bool = False
    """merge_by_image: none of them sees another, only the picture and itself; losses are those of separate rows."""
    _video_of_data: Video = PrivateAttr(default_factory=Video)

    @property
    def frames_shown(self) -> Video:
        """Which frames of videos are shown: as the source says, else as its recipe does."""
        return self.video or self._video_of_data

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
    look_images: Annotated[int, Field(ge=0)] | None = 20_000
    """How many training images preflight compares by look with as many held-out ones, drawn at random; null: all."""
    url_cache: str | None = None
    """Folder that fetched images are kept in. Unset: `vlm_sft/images` in the user's cache folder."""
    video: Video = Field(default_factory=Video)
    """Which frames of videos are shown, of sources that do not say it, and of those given to the trained model."""
    languages: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """Language → its share of the training rows; `{zh: 1, en: 1}` for as many of each. Unset: as the sources are."""

    @model_validator(mode="after")
    def _share_video(self) -> Data:
        for source in (*self.train, *self.eval, *self.test):
            source._video_of_data = self.video
        return self


class Hub(RecipeModel):
    """Where the bundle is pushed to on the Hugging Face Hub."""

    repo_id: str
    """`name/repository`; made if it is not there."""
    private: bool | None = None
    """Whether a new repository is private. Unset: as the account has it."""
    revision: str | None = None
    """Branch to push to, made if it is not there. Unset: main."""
    message: str | None = None
    """What the commit says."""
    every_save: bool = False
    """Push every checkpoint too, in the background."""
    license: str | None = None
    """Licence on the card, as the Hub spells it, for example `apache-2.0`."""
    language: list[str] = Field(default_factory=list)
    """Languages on the card, for example `[zh, en]`."""


class Watch(RecipeModel):
    """What happens to steps that go wrong; see docs/long_runs.md."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: `stop`, or `skip` the step. Either way the rows are written down."""
    jump: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0
    """A loss above the median of the last 50 by more than so many spreads is logged with its rows; null for never."""
