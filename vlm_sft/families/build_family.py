"""An existing VLM that a recipe starts from (`model:`): how it is composed, loaded, kept and found again."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..base.errors import UserError
from ..base.names import PARTS, TEMPLATE, Json, Values
from ..base.whole_files import read_text
from ..base.words import one_line
from ..batch.collator import MultimodalCollator
from ..pieces.beside import check_processor, check_tokenizer
from ..pieces.expected import IMAGES, TOKENIZER, laid_out
from ..pieces.load_parts import check_size, from_pretrained
from ..pieces.part_configs import find_model
from ..pieces.quantization import leave_out, outside_language_model, quantise_empty, settle
from ..recipe.libraries import build_quantization_config
from ..recipe.safety import check_picture
from ..templates.template import load_template
from .images_alone import images_alone
from .kind import Composed
from .kosmos2 import Kosmos2, Kosmos2Processor
from .mllama import Mllama, MllamaProcessor
from .model import FamilyModel, cast_parts, set_dtypes
from .own_models import Ernie, Gemma3n, Llama4, Molmo2, PaliGemma
from .own_processors import FuyuProcessor, Idefics2Processor, Lfm2VlProcessor, Llama4Processor, PerceptionLMProcessor
from .processor import FamilyProcessor
from .table import FAMILIES, Family, default_template, family_name, family_of

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import PretrainedModel

KEY = "model.pretrained"
# What a processor itself, and not that of its images, may be told of how many tokens an image becomes.
TOKENS = ("image_seq_length", "image_seq_len", "num_additional_image_tokens", "num_patch_index_tokens",
          "num_image_tokens", "img_size")  # fmt: skip
# Models whose class, or whose processor, needs more than the others'.
MODELS: dict[str, type[FamilyModel]] = {
    "kosmos-2": Kosmos2, "paligemma": PaliGemma, "ernie4_5_vl_moe": Ernie, "molmo2": Molmo2,
    "gemma3n": Gemma3n, "llama4": Llama4, "mllama": Mllama,
}  # fmt: skip
PROCESSORS: dict[str, type[FamilyProcessor]] = {
    "kosmos-2": Kosmos2Processor, "fuyu": FuyuProcessor, "idefics2": Idefics2Processor,
    "lfm2_vl": Lfm2VlProcessor, "llama4": Llama4Processor, "perception_lm": PerceptionLMProcessor,
    "mllama": MllamaProcessor,
}  # fmt: skip


class FamilyKind:
    """An existing VLM as `Kind` has it, where each method is said; LoRA goes into the model as a whole."""

    base = "model"
    collator = MultimodalCollator
    covers: tuple[str, ...] = PARTS
    settled: Values = {}

    def compose(self, recipe: Recipe) -> Composed:
        piece = find_model(_spec(recipe))
        kind = family_name(piece.config)
        family = family_of(kind, piece.pretrained)
        if (why := family.no_packing) and (recipe.sft.get("packing") or recipe.sft.get("eval_packing")):
            where = recipe.where(("sft", "packing"))
            raise UserError(f"{where}: `sft.packing` is not for a {kind} model: {why}; remove it.")
        for number, source in enumerate((*recipe.data.train, *recipe.data.eval)):
            if source.independent and (why := family.no_sharing):
                name, own = (
                    ("train", number) if number < (train := len(recipe.data.train)) else ("eval", number - train)
                )
                where = recipe.where(("data", name, own, "independent"))
                raise UserError(f"{where}: `independent` is not for a {kind} model: {why}; remove it.")
        template = load_template(recipe.chat_template or default_template(piece.config, piece.pretrained))
        spec = piece.spec.model_copy(update={"revision": piece.revision})
        processor = load_processor(spec, piece.config, template, recipe.system, recipe.box_notation)
        return Composed(piece.config, processor, {self.base: piece})

    def remarks(self, recipe: Recipe, composed: Composed) -> Iterator[str]:
        return iter(())  # an existing model is taken as it is

    def load(self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]) -> FamilyModel:
        piece, dtype = composed.pieces[self.base], dtypes[self.base]
        # What is trained stays in fp32, because bf16 loses small updates, and must not be rounded on its way there.
        wanted = "auto" if recipe.train else dtype
        options = {"dtype": wanted, "attn_implementation": piece.spec.attn_implementation}
        empty = check_size(model_class(piece.config)._from_config, piece.config, piece.checkpoint)
        quantised = build_quantization_config(recipe, str(dtype).removeprefix("torch."))
        if quantised is not None:
            options["quantization_config"] = leave_out(quantised, outside_language_model(empty))
        model = from_pretrained(model_class(piece.config), piece, **options)
        if quantised is not None:
            settle(model)
        return _prepare(model, recipe, composed, dtype)

    def empty(self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]) -> FamilyModel:
        dtype = dtypes[self.base]
        with torch.device("meta"):
            model = model_class(composed.config)._from_config(composed.config)
        if (quantised := build_quantization_config(recipe)) is not None:
            quantise_empty(model, leave_out(quantised, outside_language_model(model)), dtype)
        return _prepare(model, recipe, composed, dtype)

    def cast(self, model: PreTrainedModel, recipe: Recipe, dtypes: Mapping[str, torch.dtype]) -> None:
        cast_parts(model, recipe.train, dtypes[self.base])

    def with_base(self, recipe: Recipe, changes: Values) -> Recipe:
        # The checkpoint has the processor as the recipe wanted it.
        return recipe.model_copy(update={"model": _spec(recipe).model_copy(update={**changes, "processor": {}})})

    def held(self, entries: Mapping[str, Json]) -> set[str]:
        return set(entries[self.base].get("held", ()))

    def mark_taken(self, entries: dict[str, Json], parts: Collection[str], folder: str) -> None:
        entries[self.base] |= {"init_from": folder, "held": sorted(parts)}  # here one piece has several parts

    def own_files(self, folder: Path) -> dict[str, str]:
        return {"chat_template": str((folder / TEMPLATE).resolve())}

    def read_processor(self, folder: Path, recipe: Recipe, config: PreTrainedConfig) -> FamilyProcessor:
        spec = _spec(recipe).model_copy(update={"pretrained": str(folder), "revision": None, "processor": {}})
        return load_processor(spec, config, read_text(folder / TEMPLATE), recipe.system, recipe.box_notation)


def _spec(recipe: Recipe) -> PretrainedModel:
    assert recipe.model is not None, "the recipe composes a stack"
    return recipe.model


def model_class(config: PreTrainedConfig) -> type[FamilyModel]:
    """The class for a configuration: the model's own, with a forward that can score supervised positions alone."""
    return _derive(config.model_type, family_name(config))


@functools.cache
def _derive(model_type: str, name: str) -> type[FamilyModel]:
    base = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    kind = MODELS.get(model_type, FamilyModel)

    # wraps: `generate` looks at the signature for what it may pass on.
    @functools.wraps(base.forward)
    def forward(self: FamilyModel, *args: Any, supervised_only: bool = False, **kwargs: Any) -> ModelOutput:
        if supervised_only:
            assert not args, "give a batch by name"
            return self.supervised_forward(**kwargs)
        return base.forward(self, *args, **self.complete(kwargs))

    # transformers looks into the file of a model's class for what it can do.
    family = FAMILIES[name]
    own = {"__module__": base.__module__, "forward": forward, "plain_head": family.plain_head,
           "one_by_one": family.one_by_one}  # fmt: skip
    return type(base.__name__, (kind, base), own)


def load_processor(
    spec: PretrainedModel, config: PreTrainedConfig, template: str, system: str | None, box_notation: str | None = None
) -> FamilyProcessor:
    """The model's own processor behind our interface; `system` and `box_notation` as `FamilyProcessor` has them.

    Raises:
        UserError: The processor cannot be read, or refuses an option, or a library that it needs is not there.
    """
    family = family_of(family_name(config), spec.pretrained)
    check_needs(family, f"a {config.model_type!r} model ({spec.pretrained!r})")
    check_tokenizer(spec.pretrained, spec.revision, KEY)
    check_processor(spec.pretrained, spec.revision, KEY)
    try:
        # The PIL backend everywhere, as for a tower: the same pixels on every machine.
        kind = images_alone(getattr(transformers, family.processor))
        folder = laid_out(spec.pretrained, spec.revision, KEY, (*TOKENIZER, *IMAGES))
        native = kind.from_pretrained(
            folder, backend="pil", trust_remote_code=False, **family.options, **spec.processor
        )
        check_picture(native.image_processor.to_dict(), f"{KEY}: {spec.pretrained!r} with `model.processor`")
        check_picture({name: spec.processor.get(name) for name in TOKENS}, KEY, "`model.processor`")
    except UserError:
        raise
    except Exception as error:  # odd values in its files make transformers raise anything
        raise UserError(f"{KEY}: the processor of {spec.pretrained!r} cannot be read: {one_line(error)}") from error
    place = getattr(config, "image_token_id", None)
    if place is None:  # KOSMOS-2: the frame's token, which no answer may write either
        place = native.tokenizer.convert_tokens_to_ids(native.boi_token)
    ours = PROCESSORS.get(config.model_type, FamilyProcessor)
    return ours(native.image_processor, native.tokenizer, template, native, family, place, system, box_notation)


def check_needs(family: Family, what: str) -> None:
    """Whether the libraries of a family are there, and go together with this torch.

    Raises:
        UserError: One is not, or cannot be imported.
    """
    for name in family.needs:
        try:
            importlib.import_module(name)
        except Exception as error:  # torchvision of another build raises what its operators raise
            raise UserError(
                f"{KEY}: {what} needs {name}, which cannot be imported here ({one_line(error)}): pip install "
                f"'vlm-sft[{family.needs[-1]}]', of the same build as torch {torch.__version__}."
            ) from error


def _prepare(model: FamilyModel, recipe: Recipe, composed: Composed, dtype: torch.dtype) -> FamilyModel:
    set_dtypes(model, recipe.train, dtype)
    model.blank = composed.processor.image_inputs([Image.new("RGB", (64, 64))], ())
    if not any(hasattr(model, name) for name in ("model", "language_model")):
        model.base_model_prefix = "text_model"  # KOSMOS-2 names none, and TRL looks for what is under the head
    return model
