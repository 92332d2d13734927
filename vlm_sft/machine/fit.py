"""`vlm-sft fit`: which settings of a recipe fit a GPU, the fastest first, by the count of memory of `--dry-run`.

The rows of a step stay as many as the recipe has. Tried are batches and checkpointing, and FSDP2 where there are
several GPUs; where nothing fits, also 4 bits, then smaller pictures, then shorter rows: these change what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.errors import UserError
from ..base.names import Json
from ..base.words import gib
from ..preflight.launch import Launch
from ..preflight.memory import TIGHT, too_large
from .machine import EFFICIENCY, GIB, UNKNOWN_GPU, known_gpu

if TYPE_CHECKING:
    from ..preflight.dry_run import Weighed
    from ..recipe.schema import Recipe

FOUR_BITS = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}  # fmt: skip
FEWEST_TOKENS, FEWEST_PIXELS, MOST_ROWS = 512, 100_352, 64
# What the time is multiplied by: checkpointing runs forward once more, 4 bits are unpacked in each pass, weights that
# are shared out are gathered; and so many tokens of a step are needed to keep a GPU half busy.
CHECKPOINTED, UNPACKED, GATHERED, HALF_BUSY = 4 / 3, 1.25, 1.15, 512
PATCHES = 4  # patches of a tower for a token of an image
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """What a run is to fit: bytes of each GPU, how many, and operations a second of each."""

    size: int
    count: int = 1
    flops: float = UNKNOWN_GPU * 1e12


@dataclass(frozen=True)
class Setting:
    """A way to run a recipe.

    Attributes:
        batch: Rows of a pass on one GPU.
        accumulation: Passes until the weights move.
        checkpointing: Whether activations are computed once more in place of kept.
        four_bits: Whether the language model is in 4 bits.
        length: Tokens of a row at most.
        pixels: Of a picture at most; None: as the recipe has it.
        sharded: Whether the GPUs share the weights out (FSDP2).
        memory: Bytes on each GPU.
        seconds: For a thousand full rows, on all GPUs.
    """

    batch: int
    accumulation: int
    checkpointing: bool
    four_bits: bool
    length: int
    pixels: int | None = None
    sharded: bool = False
    memory: int = 0
    seconds: float = 0.0


class Fit(NamedTuple):
    """What was found.

    Attributes:
        now: The recipe as it is.
        sentence: Why that does not fit, or None.
        settings: What fits, the fastest first.
        step: The fullest step, in words.
    """

    now: Setting
    sentence: str | None
    settings: list[Setting]
    step: str


def parse_gpu(given: str, count: int) -> Gpu:
    """`24GB`, `24 GiB`, or the name of a GPU (`RTX 4090`), behind which its memory may stand (`A100 40GB`).

    Raises:
        UserError: It says neither a memory nor a GPU that is known.
    """
    size = re.search(r"(?:^|\s)(\d+(?:\.\d+)?)\s*Gi?B?\s*$", given, re.IGNORECASE)
    known = known_gpu(given[: size.start()] if size else given)
    held = float(size[1]) if size else float(known[1]) if known else 0.0
    if held <= 0:
        raise UserError(f"--gpu {given} says no memory; write 24GB, or a GPU that is known here, such as A100.")
    return Gpu(int(held * GIB), count, (known[0] if known else UNKNOWN_GPU) * 1e12)


def fit(recipe: Recipe, gpu: Gpu, tick: Callable[[str], None] = lambda doing: None) -> Fit:
    """Looks for the settings of a recipe that fit.

    Args:
        recipe: A validated recipe; its pieces' configurations are read, no weights.
        gpu: What it is to fit.
        tick: Told what is counted.

    Raises:
        UserError: Nothing fits, whatever is changed.
    """
    search = _Search(recipe, gpu, tick)
    now = search.exact(search.given)
    if not now.memory:
        raise UserError("The memory of this recipe cannot be counted.")
    sentence = too_large(now.memory, gpu.size)
    least = now
    for start in search.starts():
        found, smallest = search.around(start)
        least = min(least, smallest, key=lambda each: each.memory)
        if found:
            return Fit(now, sentence, sorted(found, key=lambda each: each.seconds), search.step)
    raise UserError(
        f"Nothing fits: the least that was found takes {gib(least.memory)}, and of {gib(gpu.size)} "
        f"{gib(int(TIGHT * gpu.size))} can be planned with; take a smaller model, a larger GPU, or --count with more."
    )


def _launch(gpu: Gpu) -> Launch:
    return Launch(gpu.count, "DDP" if gpu.count > 1 else "single")


class _Search:
    """Counts settings of a recipe, each once."""

    def __init__(self, recipe: Recipe, gpu: Gpu, tick: Callable[[str], None]) -> None:
        from ..preflight.dry_run import WITHOUT_LIMIT, on_any_machine, settle_checkpointing
        from ..recipe.libraries import build_sft_config

        recipe, _ = settle_checkpointing(recipe, _launch(gpu), gpu.size)
        args = build_sft_config(on_any_machine(recipe))
        self.recipe, self.gpu, self.tick, self.step = recipe, gpu, tick, ""
        self.room = int(TIGHT * gpu.size)
        self.shares = gpu.count > 1 and recipe.encoder is None  # nobody has trained an encoder in shares
        pixels = processor_of(recipe).get("max_pixels")
        self._pixels = pixels if isinstance(pixels, int) else None
        self.given = Setting(
            args.per_device_train_batch_size, args.gradient_accumulation_steps, bool(args.activation_checkpointing),
            bool((recipe.quantization or {}).get("load_in_4bit")), args.max_length or WITHOUT_LIMIT,
        )  # fmt: skip
        self._counted: dict[Setting, tuple[int, ...]] = {}
        self._weighed: Weighed | None = None

    def starts(self) -> Iterator[Setting]:
        """What is tried, and only where nothing before it fits."""
        given = self.given
        yield given
        if self.recipe.lora is not None and self.recipe.quantization is None:
            yield (given := replace(given, four_bits=True))
        pixels = self._pixels
        while pixels is not None and pixels // 2 >= FEWEST_PIXELS:
            pixels //= 2
            yield (given := replace(given, pixels=pixels))
        while given.length // 2 >= FEWEST_TOKENS:
            yield (given := replace(given, length=given.length // 2))

    def around(self, start: Setting) -> tuple[list[Setting], Setting]:
        """The largest batch that fits, with and without checkpointing, of every way to share out; and the smallest."""
        rows = start.batch * start.accumulation
        batches = [each for each in range(1, min(rows, MOST_ROWS) + 1) if rows % each == 0]
        found: list[Setting] = []
        seen: list[Setting] = []
        for checkpointing in (False, True):
            for sharded in (False, True) if self.shares else (False,):
                base = replace(start, checkpointing=checkpointing, sharded=sharded)
                try:
                    one = self.exact(replace(base, batch=1, accumulation=rows))
                except UserError:  # not even a small picture fits into so short a row
                    continue
                seen.append(one)
                if one.memory > self.room:
                    continue
                likely = self._likely(one, base, batches, rows)
                for batch in reversed([each for each in batches if each <= likely]):
                    setting = self.exact(replace(base, batch=batch, accumulation=rows // batch))
                    if setting.memory <= self.room:
                        found.append(setting)
                        break
        return found, min(seen, key=lambda each: each.memory, default=self.exact(self.given))

    def _likely(self, one: Setting, base: Setting, batches: Sequence[int], rows: int) -> int:
        """The largest batch that should fit, by how much a second row takes."""
        if len(batches) == 1:
            return 1
        second = self.exact(replace(base, batch=batches[1], accumulation=rows // batches[1]))
        each = max(1, (second.memory - one.memory) // (batches[1] - 1))
        return max(each_ for each_ in batches if each_ == 1 or one.memory + (each_ - 1) * each <= self.room * 1.05)

    def exact(self, setting: Setting) -> Setting:
        """A setting with the memory and the time that it takes."""
        plain = replace(setting, sharded=False, memory=0, seconds=0.0)
        if plain not in self._counted:
            self.tick(describe(setting))
            self._counted[plain] = self._count(plain)
        memory = self._counted[plain][setting.sharded]
        return replace(setting, memory=memory, seconds=self._seconds(setting))

    def _count(self, setting: Setting) -> tuple[int, ...]:
        from ..preflight.dry_run import weigh

        others = [Launch(self.gpu.count, "FSDP", 3)] if self.shares else []
        weighed = weigh(changed(self.recipe, setting), _launch(self.gpu), *others)
        if self._weighed is None:
            self._weighed, self.step = weighed, str(weighed.step)
        return (weighed.estimate.total, *(each.total for each in weighed.others))

    def _seconds(self, setting: Setting) -> float:
        """Operations of a thousand full rows by the share of the speed that is reached."""
        assert self._weighed is not None
        operations = 0.0
        for row in self._weighed.rows:
            image = row.part in ("vision_tower", "resampler", "projector")
            passes = 2 if image and not row.trained else 4
            tokens = self._tokens(row.part, setting)
            operations += (passes + 2 * (row.trained > row.total / 2)) * row.total * tokens
        slower = CHECKPOINTED if setting.checkpointing else 1.0
        slower *= UNPACKED if setting.four_bits else 1.0
        slower *= GATHERED if setting.sharded else 1.0
        slower *= 1 + HALF_BUSY / (setting.batch * setting.length)
        return 1000 * operations * slower / (self.gpu.flops * EFFICIENCY * self.gpu.count)

    def _tokens(self, part: str, setting: Setting) -> float:
        """Tokens of a full row that a part reads."""
        assert self._weighed is not None
        if self.recipe.encoder is None:
            return setting.length / 2 * PATCHES if part == "vision_tower" else setting.length
        stack = self._weighed.stack
        return stack.processor.reads(setting.length, stack.model.config.num_patches)[part]  # type: ignore[attr-defined]


def processor_of(recipe: Recipe) -> Json:
    """Arguments of the model's own processor; only an existing VLM has some."""
    return recipe.model.processor if recipe.model else {}


def changed(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with a setting; where it does not say its precision, as a GPU runs it."""
    sft = {
        **recipe.sft, "per_device_train_batch_size": setting.batch, "max_length": setting.length,
        "gradient_accumulation_steps": setting.accumulation, "activation_checkpointing": setting.checkpointing,
    }  # fmt: skip
    if not sft.get("fp16") and sft.get("bf16") is None:
        sft["bf16"] = True
    update: Json = {"sft": sft}
    if setting.four_bits and recipe.quantization is None:
        update["quantization"] = dict(FOUR_BITS)
    if setting.pixels is not None:
        processor = {**processor_of(recipe), "max_pixels": setting.pixels}
        update["model"] = recipe.text_piece.model_copy(update={"processor": processor})
    return recipe.model_copy(update=update)


def keys_of(setting: Setting, given: Setting) -> dict[KeyPath, Any]:
    """What a recipe has to say for a setting, beside what it says already."""
    found: dict[KeyPath, Any] = {}
    for name, key in (("batch", "per_device_train_batch_size"), ("accumulation", "gradient_accumulation_steps"),
                      ("checkpointing", "activation_checkpointing"), ("length", "max_length")):  # fmt: skip
        if getattr(setting, name) != getattr(given, name):
            found["sft", key] = getattr(setting, name)
    if setting.pixels is not None:
        found["model", "processor", "max_pixels"] = setting.pixels
    if setting.four_bits and not given.four_bits:
        found["quantization",] = dict(FOUR_BITS)
    return found


def describe(setting: Setting) -> str:
    """`4 x 4 rows of 2,048 tokens, checkpointed, 4 bits, FSDP2`."""
    words = [f"{setting.batch} x {setting.accumulation} rows of {setting.length:,} tokens"]
    words += ["checkpointed"] if setting.checkpointing else []
    words += ["4 bits"] if setting.four_bits else []
    words += [f"pictures of {setting.pixels:,} pixels"] if setting.pixels else []
    return ", ".join([*words, *(["FSDP2"] if setting.sharded else [])])
