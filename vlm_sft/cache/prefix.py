"""The frozen prefix of a stack: the last frozen part before the first that learns, and what comes out there, kept.

`find_prefix` says which parts these are, or why there are none. A `Prefix` gives the features of pictures: those that
are kept out of the store, the others through tower and resampler, which are loaded when the first of them comes and
never before. `Kept` is its side in the data-loader workers, where a picture that is kept is not even decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig

from ..base.names import ImageEntry, Inputs, Json, Values
from ..batch.collator import MultimodalCollator
from ..model.configuration import VLMConfig
from ..model.parts import empty_part
from ..model.towers import keep_all_patches, resample, see
from ..pieces.fingerprints import names_of
from ..pieces.load_parts import load_resampler, load_vision_tower
from ..recipe.libraries import computes_in
from ..stack.build_stack import build_empty_stack
from ..stack.compose import check_image_size
from ..stack.fit import count_features
from ..stack.lora import lora_config
from ..stack.precision import dtype_of
from .keys import Keys, digest, digest_of_weights, key_of_pixels
from .store import DTYPES, Store

if TYPE_CHECKING:
    from ..batch.processor import VLMProcessor
    from ..families.kind import Composed
    from ..recipe.schema import Recipe

CACHE_KEYS = "cache_keys"  # of a batch: for each picture its key, what is new of its file, and whether it is kept
FEATURES, PIXELS = "image_features", "pixel_values"
AT_ONCE = 16  # pictures that go through a tower together on a GPU; fewer are filled up, so that all are computed alike
FORMAT = 2  # 1 kept what ViT-MAE gives of patches drawn at random
# All that a collator of one's own may say without touching a picture on its way into the tower.
HARMLESS = {"__init__", "render"}
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def find_prefix(
    recipe: Recipe, composed: Composed, collator: MultimodalCollator, taken: Collection[str] = ()
) -> tuple[tuple[str, ...], str]:
    """The parts whose features can be kept, in the order an image passes them, or none and a sentence why.

    Args:
        recipe: What is trained.
        composed: What `compose` gave for it.
        collator: Makes the batches.
        taken: Parts of which an earlier stage's bundle has other weights than the piece.
    """
    where = recipe.where(("cache",))
    if "vision_tower" not in composed.pieces:
        return (), f"{where}: the cache is off: an existing VLM (`model`) is not cut into parts."
    assert recipe.stack is not None
    if recipe.stack.vision_tower.tiles is not None:
        return (), f"{where}: the cache is off: it keeps one picture of an image, and `tiles` makes several."
    off = f"{where}: the cache is off: the vision tower"
    if "vision_tower" in recipe.train:
        return (), f"{off} is trained, so its features change."
    changed = {*taken, *_adapted(recipe, composed)}
    if "vision_tower" in changed:
        return (
            (),
            f"{off} has LoRA, or what an earlier stage trained in it, so its features are not those of its piece.",
        )
    if composed.pieces["vision_tower"].trusts_code:
        return (), f"{off} brings code of its own, which may look at more than the picture."
    if own := _changes_pictures(collator):
        return (), f"{where}: the cache is off: {own}, which may change pictures (augmentation)."
    resampler = recipe.stack.resampler
    if resampler is None or "resampler" in recipe.train or "resampler" in changed:
        return ("vision_tower",), ""
    if resampler.type == "instruct_qformer":
        return ("vision_tower",), f"{where}: the resampler reads the instruction, so the tower's features are kept."
    return ("vision_tower", "resampler"), ""


def _changes_pictures(collator: MultimodalCollator) -> str | None:
    """What of a collator may give a picture other pixels each time, or None: ours are all made by one rule."""
    kind, images = type(collator), collator.processor.image_processor
    for name, ours in vars(MultimodalCollator).items():
        if callable(ours) and name not in HARMLESS and (getattr(kind, name) is not ours or name in vars(collator)):
            return f"{kind.__name__} has its own `{name}`"
    if type(images).__module__.partition(".")[0] not in ("transformers", __name__.partition(".")[0]):
        return f"{kind.__name__} has an image processor of its own, {type(images).__name__}"
    if own := sorted({"__call__", "preprocess", "_preprocess"} & set(vars(images))):
        return f"the image processor has its own `{own[0]}`"
    return None


def _adapted(recipe: Recipe, composed: Composed) -> set[str]:
    """Parts of the image path that LoRA reaches: only a regular expression of one's own leads there."""
    targets = (recipe.lora or {}).get("target_modules")
    if not isinstance(targets, str) or targets == "all-linear":
        return set()
    from peft.tuners.tuners_utils import check_target_module_exists

    model = build_empty_stack(recipe, composed).model
    config = lora_config(recipe, model)
    found = (name for name, _ in model.named_modules() if check_target_module_exists(config, name))
    return {part for name in found for part in ("vision_tower", "resampler") if name.startswith(f"model.{part}")}


class Kept:
    """What a collator asks of a cache; it travels to the data-loader workers.

    Args:
        store: The features.
        keys: Knows pictures.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        self.store, self.keys = store, keys

    def picture(self, image: ImageEntry, decode: Callable[[], Image.Image]) -> Image.Image:
        """The picture, decoded; or, where its features are kept, one of a pixel that carries them in its `info`."""
        key, new = self.keys.of(image)
        picture = None
        if key is None:
            picture = decode()
            key = key_of_pixels(picture)
        features = self.store.get(key)
        if features is not None:
            picture = Image.new("RGB", (1, 1))
        picture = picture or decode()
        picture.info = {CACHE_KEYS: (key, new, features is not None), FEATURES: features}
        return picture

    def image_inputs(
        self, processor: VLMProcessor, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> Inputs:
        """(H, T, W) features of the pictures that are kept, pixels of the others, and all their keys."""
        if not images:
            return {}
        kept = [image.info[FEATURES] for image in images if image.info[FEATURES] is not None]
        others = processor.encode_images([image for image in images if image.info[FEATURES] is None])
        found: Json = {CACHE_KEYS: [image.info[CACHE_KEYS] for image in images]}
        if kept:
            found[FEATURES] = torch.stack(kept)
        if others is not None:
            found[PIXELS] = others
        return found | processor.instruction_inputs(instructions)


class Prefix:
    """The frozen prefix of a run, and its cache.

    Args:
        recipe: With its `cache`.
        composed: What `compose` gave for it.
        collator: Ours, which makes the batches.
        parts: What `find_prefix` found.
        say: Told what a user should know.

    Raises:
        UserError: What lies in the cache's folder is not what it should be.
    """

    def __init__(
        self,
        recipe: Recipe,
        composed: Composed,
        collator: MultimodalCollator,
        parts: tuple[str, ...],
        say: Callable[[str], None],
    ) -> None:
        assert recipe.cache is not None
        self.recipe, self.composed, self.parts, self.say = recipe, composed, parts, say
        self.dtype = DTYPES[recipe.cache.dtype] if recipe.cache.dtype else None
        self.computes = getattr(torch, computes_in(recipe))
        self.root = Path(recipe.cache.path)
        config = composed.config
        assert isinstance(config, VLMConfig)
        self.config = config
        self.shape: tuple[int, int] = (config.num_query_tokens, config.projector_widths[0])
        if "resampler" not in parts:
            # The size that pictures are given, which is not always the one that a tower was made for (DINOv2).
            size = check_image_size(config, composed.processor, composed.pieces["vision_tower"].pretrained)
            self.shape = (count_features(config, *size), config.tower_width)
        about = self._about(collator)
        name = digest(json.dumps(about, sort_keys=True).encode()).hex()
        self.store = Store(self.root / name, about, self.shape, recipe.cache.max_gb)
        self.kept = Kept(self.store, Keys(self.root, collator.fetch))
        self.computed = 0
        self._modules: list[nn.Module | None] | None = None
        self._told: set[str] = set()
        self.store.touch()

    def _about(self, collator: MultimodalCollator) -> Json:
        """All that decides which numbers come out for a picture, as JSON has it: the name of the store is its hash."""
        config, processor = self.config, self.composed.processor
        images = {key: value for key, value in processor.image_processor.to_dict().items() if key not in VOLATILE}
        facts: Json = {
            "format": FORMAT,
            "parts": list(self.parts),
            "pretrained": {part: self.composed.pieces[part].pretrained for part in self.parts},
            "weights": {part: self._digest(part) for part in self.parts},
            "tower": _plain(config.tower),
            "feature_layer": config.vision_feature_layer,
            "feature_select": config.vision_feature_select,
            "image_processor": [type(processor.image_processor).__name__, images],
            "pad_to_square": processor.pad_to_square,
            "decoded_to": collator.side,
            "types": [str(dtype_of(self.recipe, "vision_tower")), str(self.computes), str(self.dtype)],
            "versions": {name: version(name) for name in ("transformers", "pillow")},
        }
        if "resampler" in self.parts:
            facts["resampler"] = [config.resampler_type, config.num_query_tokens, _plain(config.resampler_config)]
        return json.loads(json.dumps(facts, sort_keys=True, default=str))

    def _digest(self, part: str) -> str:
        piece = self.composed.pieces[part]
        names = names_of(piece, empty_part(self.config, part))
        return digest_of_weights(piece.checkpoint, names, self.root)

    def _load(self, device: torch.device) -> list[nn.Module | None]:
        if self._modules is None:
            pieces = self.composed.pieces
            with torch.random.fork_rng():  # whether it is loaded must not change what is drawn later
                tower = load_vision_tower(pieces["vision_tower"], dtype_of(self.recipe, "vision_tower"))
                tower = keep_all_patches(tower)
                resampler = load_resampler(pieces["resampler"]) if "resampler" in self.parts else None
            self._modules = [tower, resampler]
        for module in self._modules:
            if module is not None:
                module.to(device).eval().requires_grad_(False)
        return self._modules

    @torch.no_grad()
    def compute(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) pixels → (N, T, W) features, of each picture the same whatever else is in the batch.

        On a CPU pictures go through one by one, on a GPU always `AT_ONCE` of them: kernels may add in another order
        for another number of rows.
        """
        tower, resampler = self._load(pixel_values.device)
        assert tower is not None
        at_once = 1 if pixel_values.device.type == "cpu" else AT_ONCE
        found = []
        with torch.autocast(pixel_values.device.type, self.computes, enabled=self.computes != torch.float32):
            for some in pixel_values.split(at_once):
                blank = some.new_zeros(at_once - len(some), *some.shape[1:])
                features = see(tower, self.config, torch.cat([some, blank]))
                features = features if resampler is None else resample(resampler, features)
                found.append(features[: len(some)])
        self.computed += len(pixel_values)
        return torch.cat(found)

    def complete(self, inputs: Inputs) -> Inputs:
        """A batch with the features of all its pictures in place of pixels; those that were missing are kept from now.

        Args:
            inputs: A batch of a collator that has a `Kept`, on the device of the model.
        """
        if CACHE_KEYS not in inputs:
            return inputs
        known = inputs.pop(CACHE_KEYS)
        self.kept.keys.note(new for _, new, _ in known if new is not None)
        features, pixels = inputs.get(FEATURES), inputs.pop(PIXELS, None)
        if pixels is not None:
            self._tell(f"{' and '.join(self.parts)} loaded: not all pictures are in {str(self.root)!r} yet.")
            made = self.compute(pixels)
            made = made if self.dtype is None else made.to(self.dtype)
            self.store.add([key for key, _, held in known if not held], made)
            self._tell(self.store.full)
            if features is not None:
                held = torch.tensor([held for _, _, held in known], device=made.device)
                whole = made.new_empty(len(known), *made.shape[1:])
                whole[held], whole[~held] = features.to(made.dtype), made
                made = whole
            inputs[FEATURES] = made
        return inputs

    def _tell(self, sentence: str | None) -> None:
        if sentence and sentence not in self._told:
            self._told.add(sentence)
            self.say(sentence)

    def for_parity(self, batch: Values, device: torch.device) -> Inputs:
        """A batch of pixels as the run's model takes it: through tower and resampler, not the cache."""
        if PIXELS not in batch:
            return dict(batch)
        features = self.compute(batch[PIXELS].to(device))
        return {**{name: value for name, value in batch.items() if name != PIXELS}, FEATURES: features}

    def release(self) -> None:
        """Gives back tower and resampler."""
        self._modules = None


class UsesPrefix:
    """A `Trainer` of transformers whose batches a `Prefix` completes, where it has one."""

    prefix: Prefix | None = None

    def _prepare_inputs(self, inputs: Inputs) -> Inputs:
        inputs = super()._prepare_inputs(inputs)  # type: ignore[misc]
        return inputs if self.prefix is None else self.prefix.complete(inputs)


def _plain(config: PreTrainedConfig) -> Json:
    return {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
