"""A composed stack's tower and projector as llama.cpp's `mmproj` file: what its graph for LLaVA computes, and no more.

llama.cpp's converter writes the towers of existing VLMs; a LLaVA with a SigLIP is none of them. Names of keys and
tensors are those of the `gguf` library.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType, get_tensor_name_map
from PIL import Image
from torch import nn

from ..base.errors import UserError
from ..batch.processor import VLMProcessor
from ..model.configuration import VLMConfig, image_size_of
from ..model.modeling import VLMForConditionalGeneration

REFUSED = "llama.cpp cannot express this bundle: {}; use --to transformers or bundle-merged."
CLASS_TOKEN = (
    "its graph for LLaVA reads a CLIP's class token in the place of the last patch and shifts all positions (its issue "
    "25814), so the answers would be others than the bundle's (a SigLIP has no class token)"
)
# Of transformers' activations, which llama.cpp's "gelu" is (by a table of 16 bits), and what it knows beside it.
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python")
TOWER = {**dict.fromkeys(GELU, "gelu"), "silu": "silu", "swish": "silu", "quick_gelu": "quick_gelu"}
# What llama.cpp pads pictures with in front of a LLaVA, whatever the file says.
PADDING = (122, 116, 104)


def check_stack(model: VLMForConditionalGeneration, processor: VLMProcessor) -> None:
    """Refuses what llama.cpp's graph for LLaVA does not compute.

    Args:
        model: The stack; its adapters may be in it.
        processor: Its processor.

    Raises:
        UserError: It is refused; the message says what stands in the way.
    """
    for reason in _reasons(model, processor):
        raise UserError(REFUSED.format(reason))


def _reasons(model: VLMForConditionalGeneration, processor: VLMProcessor) -> list[str]:
    config, tower, images = model.config, model.config.tower, processor.image_processor
    found = []
    if config.resampler_type:
        found.append(f"it has no resampler of the type {config.resampler_type}")
    options = config.projector_options or {}
    if config.projector_type != "mlp" or options.get("depth") != 2:
        found.append(f"its LLaVA has an mlp of depth 2 for a projector, this one is {_shown(config)}")
    elif options.get("activation") not in GELU:
        found.append(f"its projector's activation is gelu, this one's {options.get('activation')}")
    if tower.model_type == "clip_vision_model":
        found.append(CLASS_TOKEN)
    elif tower.model_type != "siglip_vision_model":
        found.append(f"its graph for LLaVA computes a SigLIP as the vision tower, and no {tower.model_type!r}")
    elif tower.hidden_act not in TOWER:
        found.append(f"it has no activation {tower.hidden_act!r} for the vision tower")
    if not found:
        height, width = image_size_of(tower)
        if height != width or tower.num_channels != 3:
            found.append(f"it takes square pictures of three colours, this tower {width} × {height}")
        if getattr(images, "resample", Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
            found.append("it resizes pictures by bicubic interpolation, this bundle's processor does otherwise")
        if (embed := model.get_input_embeddings()) is not None and embed.weight.shape[1] != options_width(model):
            found.append("its language model embeds narrower than it computes")
    return found


def options_width(model: VLMForConditionalGeneration) -> int:
    """Width of what the projector gives."""
    return int(model.model.projector.last_linear.out_features)


def _shown(config: VLMConfig) -> str:
    options = config.projector_options or {}
    return config.projector_type + (f" of depth {options['depth']}" if "depth" in options else "")


def differences(processor: VLMProcessor) -> list[str]:
    """What llama.cpp does otherwise than the bundle, in sentences: to pictures that are not square."""
    if not processor.pad_to_square:
        does = "crops their middle" if getattr(processor.image_processor, "do_center_crop", False) else "stretches them"
        return [f"Pictures that are not square: llama.cpp pads them with grey, the bundle {does}."]
    return ["Pictures that are not square: llama.cpp pads them after resizing, the bundle before, and in its own grey."]


def write_mmproj(path: Path, model: VLMForConditionalGeneration, processor: VLMProcessor, kind: torch.dtype) -> None:
    """Writes the tower, as far as it is read, and the projector.

    Args:
        path: File to write.
        model: The stack, adapters merged.
        processor: Its processor.
        kind: Type of the matrices: `float32`, `float16` or `bfloat16`; vectors and the patches' matrix stay in fp32.
    """
    config, tower = model.config, model.config.tower
    layers = config.vision_feature_layer % (tower.num_hidden_layers + 1)
    normed = config.vision_feature_layer == -1
    writer = GGUFWriter(path, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(options_width(model))
    writer.add_vision_image_size(image_size_of(tower)[0])
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_image_mean(list(processor.image_processor.image_mean))
    writer.add_vision_image_std(list(processor.image_processor.image_std))
    writer.add_array("clip.vision.feature_layer", [layers])
    activation = TOWER[tower.hidden_act]
    writer.add_vision_use_gelu(activation == "gelu")
    writer.add_vision_use_silu(activation == "silu")
    for name, tensor in _named(model, layers, normed).items():
        matrix = tensor.dim() == 2 and "position" not in name
        _add(writer, name, tensor, kind if matrix else torch.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILE_TYPES = {
    torch.float32: LlamaFileType.ALL_F32,
    torch.float16: LlamaFileType.MOSTLY_F16,
    torch.bfloat16: LlamaFileType.MOSTLY_BF16,
}


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: torch.dtype) -> None:
    tensor = tensor.detach().float().contiguous()
    if kind == torch.bfloat16:  # which numpy has not
        bits = tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.to(kind).numpy())


def _named(model: VLMForConditionalGeneration, layers: int, normed: bool) -> dict[str, torch.Tensor]:
    """Tensors by llama.cpp's names; those behind the layer that is read are left out."""
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, layers)
    tower: nn.Module = model.model.vision_tower
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        kept = name.startswith(("embeddings.", "encoder.layers.")) or (normed and name.startswith("post_layernorm."))
        theirs = names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
        if kept and theirs is not None and tensor.is_floating_point():
            found[theirs] = tensor
    for number, layer in zip((0, 2), model.model.projector.layers, strict=True):
        found |= {f"mm.{number}.weight": layer.weight, f"mm.{number}.bias": layer.bias}
    return found
