"""What a language model or an encoder cannot do as a piece though its sizes fit, said before its weights are read."""

from __future__ import annotations

import copy
import inspect
import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..base.errors import UserError
from ..base.limits import READERS
from ..base.words import one_line
from ..model.configuration import VLMConfig, count_patches
from ..model.encoder_decoder import reads_by_encoder
from ..model.parts import build_vision_tower
from ..model.towers import keep_all_patches, width_of

if TYPE_CHECKING:
    from ..batch.processor import VLMProcessor
    from ..recipe.schema import Recipe

# Without them a model is given images, padding or earlier tokens in vain: most swallow an unknown argument in silence.
NEEDED = {
    "inputs_embeds": "embeddings, so there is no way to put an image into it",
    "attention_mask": "an attention mask, so it would read the padding of shorter rows",
    "past_key_values": "a cache of keys and values, so its answers would forget all but their last token",
}
# Learned rows (GPT-2, OPT, BERT), and waves that were computed up to there (GPT-J, CodeGen, CTRL).
POSITION_TABLE = re.compile(r"(?:wpe|embed_positions|positions?_embed(?:ding)?s?|pos_encoding)(?:\.weight)?")
# What templates end an answer with where they mean one token; `###`, a line break and `</answer>` are plain text.
CONTROL_TOKEN = re.compile(r"<[|｜][^<>\s]+[|｜]>|</s>|<(?:end|eo)\w*>")


def check_language_model(config: PreTrainedConfig, key: str) -> None:
    """Checks that a language model of transformers reads what a stack gives it.

    Raises:
        UserError: It reads no embeddings, no mask or no cache (Mamba, RWKV, BART), its tokens see those that follow
            (BERT's kind, unless it is set up as a decoder), or transformers cannot make it from this configuration.
    """
    if reads_by_encoder(config):
        return
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    # The base model is what a stack calls; classes of a decoder alone have none and are called themselves.
    try:
        with torch.device("meta"):
            base = kind._from_config(config).base_model
    except (AssertionError, AttributeError, KeyError, IndexError, TypeError, ValueError, ImportError) as error:
        raise UserError(
            f"{key}: transformers makes no {config.model_type!r} model of this config.json: {one_line(error)}"
        ) from error
    reads = inspect.signature(base.forward).parameters
    if missing := [why for name, why in NEEDED.items() if name not in reads]:
        raise UserError(
            f"{key}: a {config.model_type!r} language model reads no {missing[0]}; use one that attends to its tokens, "
            f"like LLaMA, Qwen or OPT."
        )
    if any(getattr(module, "is_decoder", None) is False for module in base.modules()):
        raise UserError(
            f"{key}: each token of this {config.model_type!r} model sees those that follow, so it would learn to copy "
            f'its answer; set "is_decoder": true in its config.json if it was trained to write, else use another model.'
        )


def refuse_for_encoder(recipe: Recipe, kind: str) -> None:
    """Refuses what a language model cannot do that reads its prompt by an encoder.

    Raises:
        UserError: Rows are packed or merged, or words are added.
    """
    for name in ("packing", "eval_packing"):
        if recipe.sft.get(name):
            raise UserError(
                f"{recipe.where(('sft', name))}: `sft.{name}` is not for a {kind} language model: its encoder reads a "
                f"row whole, and packed rows would see each other; remove it."
            )
    for group in ("train", "eval"):
        for number, source in enumerate(getattr(recipe.data, group)):
            if source.merge_by_image:
                raise UserError(
                    f"{recipe.where(('data', group, number, 'merge_by_image'))}: `merge_by_image` is not for a {kind} "
                    f"language model: a row has one answer there, so all but the last would be lost; remove it."
                )
    if recipe.words:
        raise UserError(
            f"{recipe.where(('lora', 'add_tokens'))}: `lora.add_tokens` is not for a {kind} language model: its table "
            f"stands in three places, of which PEFT would train one; remove it."
        )


def count_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that a language model has positions for in a table; None where positions are computed as they come.

    Args:
        config: Its configuration, or that of a model around it.
    """
    text = config.get_text_config()
    if type(text) not in AutoModelForCausalLM._model_mapping:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    tables = [*model.named_parameters(), *model.named_buffers()]
    sizes = [_rows(model, name, table) for name, table in tables if _is_table(name, table)]
    return min(sizes, default=None)


def _is_table(name: str, table: torch.Tensor) -> bool:
    *_, last = name.removesuffix(".weight").split(".")
    of_images = "vision" in name or "image" in name  # GIT and Phi-4 carry a tower with a table of its own
    return table.dim() == 2 and len(table) > 1 and not of_images and POSITION_TABLE.fullmatch(last) is not None


def _rows(model: nn.Module, name: str, table: torch.Tensor) -> int:
    """OPT begins counting at an offset, BERT's kind behind the row of its padding."""
    owner = model.get_submodule(name.rpartition(".")[0])
    padding = getattr(owner, "padding_idx", None)
    return len(table) - getattr(owner, "offset", 0 if padding is None else padding + 1)


def check_texts(config: PreTrainedConfig, processor: VLMProcessor, max_length: int | None) -> None:
    """Checks that rows as long as a recipe allows, and the end of each answer, suit the language model.

    Args:
        config: Configuration of the stack, or of an existing VLM.
        processor: Its processor.
        max_length: `sft.max_length`.

    Raises:
        UserError: The language model has no position for the last tokens, or its tokenizer cuts what ends an answer.
    """
    rows = count_positions(config)
    if rows is not None and (max_length is None or max_length > rows):
        may = "sets no limit to rows" if max_length is None else f"is {max_length}"
        raise UserError(
            f"sft.max_length {may}, but the language model ({config.get_text_config().model_type}) has a table of "
            f"{rows} positions, and a longer row would fail; set sft.max_length={rows}."
        )
    tokenizer = processor.tokenizer
    for token in CONTROL_TOKEN.findall(processor.end_of_answer):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or token == tokenizer.unk_token):
            continue
        what = f"cuts into {len(ids)} tokens" if len(ids) != 1 else "does not know"
        raise UserError(
            f"chat_template: its answers end with {token!r}, which the tokenizer of this language model {what}, so a "
            f"served model would not stop there; use a template that ends with "
            f"{tokenizer.eos_token or 'its end token'!r}, or a language model that has {token!r}."
        )


# Proven against upstream's own code (docs/systems.md), so a start need not spend seconds on running them.
PROVEN = ("clip_vision_model", "siglip_vision_model", "blip_vision_model", "blip_2_vision_model", "dinov2",
          "instructblip_vision_model", "vlm_sft_mplug_owl_vision", "vlm_sft_qwen_vl_vision")  # fmt: skip


def measure_tower(config: VLMConfig, height: int, width: int, key: str) -> int:
    """Width of the features that the tower of a stack gives for an image of this size in pixels.

    Raises:
        UserError: It cannot read one image, gives no features of places, or other ones each time.
    """
    tower = config.tower
    if tower.model_type in PROVEN:
        return tower.hidden_size
    try:
        found = width_of(_shape(config, height, width), height, width)
    except Exception as error:  # the code of an encoder may raise anything
        raise UserError(
            f"{key}: a {tower.model_type!r} encoder cannot be a vision tower as it is: {one_line(error).rstrip('.')}; "
            f"use one like CLIP, SigLIP, DINOv2 or Swin."
        ) from error
    if not _repeats(config, height, width):
        raise UserError(
            f"{key}: a {tower.model_type!r} encoder gives other features for the same image each time, so nothing can "
            f"be learned from them; use one like CLIP, SigLIP, DINOv2 or Swin."
        )
    return found


def count_features(config: VLMConfig, height: int, width: int) -> int:
    """P, the features that the stack takes from its tower for an image of this size in pixels."""
    patches = count_patches(config.tower, height, width) if config.vision_feature_select == "patch" else 0
    if patches and getattr(config.vision_config, "model_type", "") in PROVEN:
        return patches
    shape = _shape(config, height, width)
    places = shape[1] if len(shape) == 3 else shape[1:].numel() // config.tower_width
    return min(places, patches or places)


def _shape(config: VLMConfig, height: int, width: int) -> torch.Size:
    """Of the tower's features: without memory, or of a shallow copy where its code looks at numbers."""
    try:
        return _forward(config.tower, config.vision_feature_layer, height, width, "meta").shape
    except Exception as error:
        try:
            return _shallow_forwards(config, height, width, 1).shape
        except Exception:
            raise error from None


def _repeats(config: VLMConfig, height: int, width: int) -> bool:
    """Whether two forwards of a shallow copy, with random weights, are the same."""
    try:
        once, again = _shallow_forwards(config, height, width, 2).chunk(2)
    except Exception:  # no shallow copy can be made of it, but the whole one ran
        return True
    return torch.allclose(once, again, rtol=1e-3, atol=1e-5, equal_nan=True)


def _shallow_forwards(config: VLMConfig, height: int, width: int, times: int) -> torch.Tensor:
    shallow = copy.deepcopy(config.tower)
    if hasattr(shallow, "depths"):
        shallow.depths = [1] * len(shallow.depths)
    elif isinstance(getattr(shallow, "num_hidden_layers", None), int):
        shallow.num_hidden_layers = 1
    with torch.device("meta"):
        parameters = build_vision_tower(copy.deepcopy(shallow)).num_parameters()
    if parameters > READERS.tried_parameters:
        raise MemoryError(f"a layer of {parameters:,} parameters is too large to be tried")
    layer = -1 if config.vision_feature_layer == -1 else 0
    with torch.random.fork_rng(devices=[]):
        return _forward(shallow, layer, height, width, "cpu", times)


@torch.inference_mode()
def _forward(
    config: PreTrainedConfig, layer: int, height: int, width: int, device: str, times: int = 1
) -> torch.Tensor:
    with torch.device(device):
        tower = keep_all_patches(build_vision_tower(copy.deepcopy(config)).eval())
        # Said aloud: while transformers loads a model it takes linspace from the meta device, and torch may keep that.
        image = torch.linspace(-1, 1, 3 * height * width, device=device).reshape(1, 3, height, width)
        outputs = [tower(image, output_hidden_states=layer != -1) for _ in range(times)]
    found = [each.last_hidden_state if layer == -1 else each.hidden_states[layer] for each in outputs]
    return torch.cat(found)
