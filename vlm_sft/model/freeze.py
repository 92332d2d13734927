"""The freeze plan as data: which part is frozen, trained or adapted, and how fast it learns.

One plan is applied to the model, printed, asserted on the optimizer, written into the bundle, and tells which part of
the forward pass is a fixed function of the image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import nn

from ..base.console import plain_table
from ..base.names import ALL_PARTS
from ..base.words import counted, short_count

# First names of a parameter → its part; two names count before one. The composed model has the four words themselves,
# transformers' own VLMs and encoders have others.
PART_NAMES = {
    **{part: part for part in ALL_PARTS},
    "visual": "vision_tower",
    "vision_model": "vision_tower",
    "visual.merger": "projector",
    "visual.deepstack_merger_list": "projector",
    "multi_modal_projector": "projector",
    "connector": "projector",
    "image_newline": "projector",  # LLaVA-1.6: a learned feature that ends a row of patches
    "image_to_text_projection": "projector",  # KOSMOS-2: with its latent queries
    "vision_embed_tokens": "projector",  # Fuyu: raw patches, no tower
    "aligner": "projector",  # DeepSeek-VL
    "embed_vision": "projector",  # Gemma 4
    "vision_encoder": "vision_tower",  # LightOnOCR
    "vision_projection": "projector",
    "vision_model.connector": "projector",  # Granite Docling
    "vision_tower.patch_merger": "projector",  # HunyuanOCR
    "density_router": "vision_tower",  # of which nothing here reads a label
    "view_separator": "projector",  # DeepSeek-OCR 2: ends an image
    "resampler_model": "projector",  # ERNIE 4.5 VL
    "merger": "projector",  # MiniCPM-V 4.6
    "mm_projector": "projector",  # Kimi K2.5
    "image_tower": "vision_tower",  # Video-LLaVA, whose tower of videos nothing here reads
    "video_tower": "vision_tower",
    "layerwise_projectors": "projector",  # Granite 4 Vision: one for each layer of the tower that is read
    "spatial_projectors": "projector",
    # Janus draws too, see `UNREAD`.
    **dict.fromkeys(("vqmodel", "generation_embeddings", "generation_aligner", "generation_head"), "vision_tower"),
    "visual_embeddings_table": "projector",  # Ovis 2: a word of its own for what the tower sees
    "high_res_vision_model": "vision_tower",  # the second tower of the hybrid DeepSeek-VL, and what shrinks its grid
    "high_res_vision_neck": "vision_tower",
    "high_res_vision_proj": "vision_tower",
    "high_res_vision_alpha": "vision_tower",
    "audio_tower": "vision_tower",  # Gemma 4 hears too, see `UNREAD`
    "embed_audio": "vision_tower",
    "text_model": "language_model",
    "lm_head": "language_model",
    "vle.vision_model": "vision_tower",  # VLE
    "vle.text_model": "text_encoder",
    **dict.fromkeys(
        ("vle.cross_modal_text_layers", "vle.cross_modal_image_layers", "vle.cross_modal_text_pooler",
         "vle.cross_modal_image_pooler", "vle.text_projection_layer", "vle.image_projection_layer",
         "vle.token_type_embeddings"), "fusion"
    ),
    **dict.fromkeys(("vqa_classifier", "itm_score", "vcr_q2a_logit", "vcr_qa2r_logit"), "head"),
    "visual_encoder": "vision_tower",  # mPLUG
    **dict.fromkeys(("fusion_encoder", "visn_fc", "visn_layer_norm"), "fusion"),
    "text_decoder": "head",
}  # fmt: skip
# Parts of a published model that nothing here reads: they go along as they are, whatever is trained.
UNREAD = (
    "audio_tower.",
    "embed_audio.",
    "vqmodel.",
    "generation_",
    "video_tower.",
    "visual_encoder.visual.proj",
    "fusion_encoder.embeddings.",
)
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")
NEW_ROWS = ".trainable_tokens_delta"  # PEFT keeps the rows of new words beside a table under this name
ADAPTER_MARKS = (".lora_", NEW_ROWS)


def part_of(name: str) -> str:
    """The part that a parameter belongs to, also under PEFT's, DDP's or torch.compile's prefixes.

    Raises:
        KeyError: The name belongs to no part.
    """
    words = unwrapped(name).split(".")
    part = PART_NAMES.get(".".join(words[:2])) or PART_NAMES.get(words[0])
    if part is None:
        raise KeyError(f"{name!r} belongs to none of {', '.join(ALL_PARTS)}")
    return part


def unwrapped(name: str) -> str:
    """A name without what PEFT, DDP, torch.compile or the model itself put in front of its parts."""
    while wrapper := next((each for each in WRAPPERS if name.startswith(each)), ""):
        name = name[len(wrapper) :]
    return name


def part_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Part → (whole name, module) of the parts that a model has, in the order an image passes them."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if (part := PART_NAMES.get(unwrapped(name))) is not None:
            found.setdefault(part, (name, module))
    return {part: found[part] for part in ALL_PARTS if part in found}


def is_adapter(name: str) -> bool:
    """Whether a parameter was put there by PEFT, by its name in the model."""
    return any(mark in name for mark in ADAPTER_MARKS)


@dataclass
class PartRow:
    """What the freeze plan makes of one part.

    Attributes:
        part: Its name.
        kind: Class of its module.
        total: Parameters without adapters.
        trained: How many of them are trained.
        adapted: Parameters of its adapters.
        words: New words, whose rows are learned.
        dtypes: Types of its weights.
        learning_rate: Peak learning rate of what learns in it, or None.
    """

    part: str
    kind: str
    total: int = 0
    trained: int = 0
    adapted: int = 0
    words: int = 0
    dtypes: set[str] = field(default_factory=set)
    learning_rate: float | None = None


@dataclass(frozen=True)
class FreezePlan:
    """Part → peak learning rate for what is trained whole, and one rate for all adapters.

    Args:
        train: Part → learning rate; a part that is not named is frozen.
        adapter_rate: Learning rate of the LoRA parameters, or None without LoRA.
    """

    train: dict[str, float]
    adapter_rate: float | None = None

    def rate_of(self, name: str) -> float | None:
        """Peak learning rate of a parameter by its name; None when it is frozen."""
        if unwrapped(name).startswith(UNREAD):
            return None
        return self.adapter_rate if is_adapter(name) else self.train.get(part_of(name))

    def apply(self, model: nn.Module) -> None:
        """Sets `requires_grad` of every parameter, and evaluation mode where nothing is trained."""
        for name, parameter in model.named_parameters():
            # Quantised weights are integers and cannot require a gradient; they are frozen anyway.
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(self.rate_of(name) is not None)
        model.train(model.training)

    def split_by_rate(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Gives each parameter group of a fresh optimizer its learning rates, splitting groups where rates differ.

        Weight decay and every other option of a group stay as they are.
        """
        rates = {id(p): self.rate_of(n) for n, p in model.named_parameters() if p.requires_grad}
        names = {id(p): n for n, p in model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            by_key: dict[tuple[str, float], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                name, rate = names[id(parameter)], rates[id(parameter)]
                assert rate is not None, f"{name} is in the optimizer but not in the freeze plan"
                by_key[("lora" if is_adapter(name) else part_of(name), rate)].append(parameter)
            groups += [{**group, "params": ps, "lr": lr, "part": part} for (part, lr), ps in by_key.items()]
        optimizer.param_groups[:] = groups

    def check_optimizer(self, groups: Iterable[dict], model: nn.Module) -> None:
        """Asserts that every trained parameter is in exactly one group with its planned rate, and no frozen one is."""
        seen: dict[int, float] = {}
        for group in groups:
            for parameter in group["params"]:
                assert id(parameter) not in seen, "a parameter stands in two optimizer groups"
                seen[id(parameter)] = group.get("initial_lr", group["lr"])
        for name, parameter in model.named_parameters():
            rate = self.rate_of(name) if parameter.requires_grad else None
            assert seen.pop(id(parameter), None) == rate, f"{name} should learn at {rate}"
        assert not seen, "the optimizer holds parameters that are not the model's"

    def rows(self, model: nn.Module) -> list[PartRow]:
        """One row a part, in the order an image passes them."""
        rows = {
            part: PartRow(part, type(module).__name__, learning_rate=self.train.get(part))
            for part, (_, module) in part_modules(model).items()
        }
        for name, parameter in model.named_parameters():
            row, size = rows[part_of(name)], _size(parameter)
            if is_adapter(name):
                row.adapted += size
                row.words = len(parameter) if NEW_ROWS in name else row.words
                row.learning_rate = row.learning_rate or self.adapter_rate
            else:
                row.total += size
                row.trained += size if parameter.requires_grad else 0
                row.dtypes.add(_type_name(parameter))
        for part, (_, module) in part_modules(model).items():
            # The tower is not here: a cache gives its features, see `parts.Cached`.
            if (empty := getattr(module, "empty", None)) is not None:
                rows[part].kind = type(empty).__name__
                rows[part].total = sum(_size(parameter) for parameter in empty.parameters())
                rows[part].dtypes = {"cached"}
        return list(rows.values())

    def table(self, model: nn.Module) -> Table:
        """The plan as a table for the terminal; 80 columns hold it, whatever the sizes."""
        rows = self.rows(model)
        total, trained, adapted = (sum(getattr(row, key) for row in rows) for key in ("total", "trained", "adapted"))
        share = (trained + adapted) / max(total + adapted, 1)
        learn = f"{trained + adapted:,} of {total + adapted:,} parameters learn ({share:.2%})."
        table = plain_table("What is frozen and what is trained", learn)
        table.add_column("part", no_wrap=True)
        table.add_column("module", overflow="ellipsis")
        for column in ("total", "trained", "LoRA", "dtype", "peak lr"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            learns = bool(row.trained or row.adapted)
            table.add_row(
                row.part,
                row.kind,
                short_count(row.total),
                short_count(row.trained) if row.trained else "frozen",
                short_count(row.adapted) if row.adapted else "–",
                "\n".join(sorted(row.dtypes)),
                f"{row.learning_rate:g}" if learns else "–",
                style="bold" if learns else "dim",
            )
            if row.words:
                words = f"embedding rows, {counted(row.words, 'word')}"
                table.add_row("", words, "", "", "in LoRA", "", "", style="bold")
        return table


def _size(parameter: nn.Parameter) -> int:
    """Number of weights; bitsandbytes packs two 4-bit weights into a byte."""
    quantised = getattr(parameter, "quant_state", None)
    return quantised.shape.numel() if quantised is not None else parameter.numel()


def _type_name(parameter: nn.Parameter) -> str:
    """`bfloat16`, `nf4`, `int8`: what a weight is kept in, also before it is quantised (on the meta device)."""
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return parameter.quant_type
    return "int8" if kind == "Int8Params" else str(parameter.dtype).removeprefix("torch.")


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight of a model is one of bitsandbytes' (the model itself does not say; see `add_adapter`)."""
    return any(is_quantised_weight(parameter) for parameter in model.parameters())


def is_quantised_weight(parameter: nn.Parameter) -> bool:
    """Whether a weight is one of bitsandbytes', also before it is quantised (on the meta device)."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def bytes_of(parameter: nn.Parameter) -> int:
    """Bytes that a weight takes; of a quantised one, without the scales (4 bytes for each 64 weights in 4 bits)."""
    bits = {"nf4": 4, "fp4": 4, "int8": 8}.get(_type_name(parameter), parameter.element_size() * 8)
    return _size(parameter) * bits // 8
