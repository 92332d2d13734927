"""Tiny checkpoints in the layouts that parts are published in.

Each function writes one and gives its folder and the module (or model) that transformers' own class loads from it;
`…_shapes` tell the names and shapes of one.
"""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from support.tiny_pieces import save_checkpoint

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 28, "patch_size": 7}


def rewrite(folder, change, name="model.safetensors"):
    """Changes the tensors of a checkpoint by `change(state)`."""
    state = load_file(folder / name)
    state = change(state) or state
    save_file({n: t.contiguous() for n, t in state.items()}, folder / name, metadata={"format": "pt"})


def copy(source, target):
    shutil.copytree(source, target)
    return target


def blip2(pieces, tmp_path):
    """A whole BLIP-2, as Salesforce publishes it: the language model is beside the tower."""
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(pieces["blip2"]))
    state = {n: torch.randn_like(t) * 0.05 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    save_checkpoint(tmp_path / "blip2", model.config, state)
    return tmp_path / "blip2", Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2").vision_model


def clip(pieces, tmp_path):
    """`vision_model.*` beside `text_model.*`, with the position ids that old checkpoints still store."""
    folder = copy(pieces["clip"], tmp_path / "clip")
    rewrite(folder, lambda s: {**s, "vision_model.embeddings.position_ids": torch.arange(17)[None]})
    return folder, CLIPModel.from_pretrained(folder).vision_model


def clip_tower(pieces, tmp_path):
    """A CLIPVisionModel of its own."""
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "clip_tower")
    return tmp_path / "clip_tower", CLIPVisionModel.from_pretrained(tmp_path / "clip_tower")


def clip_tower_old(pieces, tmp_path):
    """As transformers wrote it until version 4: `vision_model.` before every name."""
    folder, tower = clip_tower(pieces, tmp_path)
    rewrite(folder, lambda s: {f"vision_model.{n}": t for n, t in s.items()})
    return folder, tower


def clip_unprefixed(pieces, tmp_path):
    """The configuration of a whole CLIP, the tensors of its tower without their prefix."""
    folder = copy(pieces["clip"], tmp_path / "clip")
    wanted = CLIPModel.from_pretrained(folder).vision_model
    rewrite(folder, lambda s: {n.removeprefix("vision_model."): t for n, t in s.items() if n.startswith("vision")})
    return folder, wanted


def llava_tower(pieces, tmp_path):
    """Inside LLaVA the tower's names have two prefixes."""
    folder, wanted = clip(pieces, tmp_path)
    rewrite(folder, lambda s: {f"model.vision_tower.{n}": t for n, t in s.items()})
    return folder, wanted


def siglip(pieces, tmp_path):
    torch.manual_seed(2)
    text = {**SMALL, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip", SiglipModel.from_pretrained(tmp_path / "siglip").vision_model


def siglip_headless(pieces, tmp_path):
    """Inside other models SigLIP has no pooling head, while its configuration still speaks of one."""
    folder, wanted = siglip(pieces, tmp_path)
    rewrite(folder, lambda s: {n: t for n, t in s.items() if ".head." not in n})
    return folder, wanted


def siglip_tower(pieces, tmp_path):
    torch.manual_seed(3)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path / "siglip_tower")
    return tmp_path / "siglip_tower", SiglipVisionModel.from_pretrained(tmp_path / "siglip_tower")


def dinov2(pieces, tmp_path):
    torch.manual_seed(4)
    Dinov2Model(Dinov2Config(**VISION)).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2", Dinov2Model.from_pretrained(tmp_path / "dinov2")


def vit_classifier(pieces, tmp_path):
    """A classifier has no pooler, which transformers would draw at random; the features do not pass it."""
    torch.manual_seed(5)
    ViTForImageClassification(ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", ViTModel.from_pretrained(tmp_path / "vit")


def llava(pieces, tmp_path, old=True):
    """A whole LLaVA; `old` has the names of llava-hf's published checkpoints, else those that transformers 5 writes."""
    torch.manual_seed(6)
    text = LlamaForCausalLM.from_pretrained(pieces["llama"]).config
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text))
    model.save_pretrained(tmp_path / "llava")
    if old:
        state = {rename_to_old_llava(n): t for n, t in model.state_dict().items()}
        save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "llava" / "model.safetensors")
    return tmp_path / "llava", LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()


def rename_to_old_llava(name):
    name = name.replace("lm_head.", "language_model.lm_head.").replace("model.language_model.", "language_model.model.")
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    return name.replace("model.multi_modal_projector.", "multi_modal_projector.")


def llava_new(pieces, tmp_path):
    folder, model = llava(pieces, tmp_path, old=False)
    return folder, model.model.vision_tower


def llava_old(pieces, tmp_path):
    folder, model = llava(pieces, tmp_path)
    assert any(n.startswith("vision_tower.vision_model.") for n in load_file(folder / "model.safetensors"))
    return folder, model.model.vision_tower


def instructblip(pieces, tmp_path, text=None):
    """A whole InstructBLIP, as Salesforce publishes it."""
    torch.manual_seed(7)
    vision = InstructBlipVisionConfig(**VISION, initializer_range=0.1)
    qformer = InstructBlipQFormerConfig(**{**SMALL, "hidden_size": 16}, encoder_hidden_size=24, vocab_size=30,
                                        initializer_range=0.1)  # fmt: skip
    text = text or LlamaForCausalLM.from_pretrained(pieces["llama"]).config
    config = InstructBlipConfig(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4)
    InstructBlipForConditionalGeneration(config).save_pretrained(tmp_path / "instructblip")
    model = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "instructblip").eval()
    return tmp_path / "instructblip", model


def instructblip_tower(pieces, tmp_path):
    folder, model = instructblip(pieces, tmp_path)
    return folder, model.vision_model


def blip2_opt(pieces, tmp_path):
    """BLIP-2 with OPT, whose head is the embedding matrix."""
    torch.manual_seed(8)
    config = Blip2Config.from_pretrained(pieces["blip2"])
    text = OPTForCausalLM.from_pretrained(pieces["opt"]).config
    config = Blip2Config(vision_config=config.vision_config, qformer_config=config.qformer_config, text_config=text,
                         num_query_tokens=4)  # fmt: skip
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "blip2")
    return tmp_path / "blip2", Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2").eval()


Shapes = dict[str, tuple[int, ...]]
# A tower of width 24 (inner 48), a Q-Former of 16 (inner 32) and a language model of 32 (inner 48), under the names of
# `llava-hf/llava-1.5-7b-hf` and `Salesforce/blip2-opt-2.7b`, which vLLM reads.
V, R, D = 24, 16, 32


def linear(name: str, into: int, out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def merged(*parts: Shapes) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def llava_shapes(tokens: int) -> Shapes:
    """CLIP of 3 layers, a projector of two, LLaMA of 2 layers."""
    tower, text = "vision_tower.vision_model", "language_model.model"
    found = {
        f"{tower}.embeddings.class_embedding": (V,),
        f"{tower}.embeddings.patch_embedding.weight": (V, 3, 7, 7),
        f"{tower}.embeddings.position_embedding.weight": (17, V),
        **norm(f"{tower}.pre_layrnorm", V),  # upstream's spelling
        **norm(f"{tower}.post_layernorm", V),
        **linear("multi_modal_projector.linear_1", V, D),
        **linear("multi_modal_projector.linear_2", D, D),
        f"{text}.embed_tokens.weight": (tokens, D),
        f"{text}.norm.weight": (D,),
        "language_model.lm_head.weight": (tokens, D),
    }
    for layer in (f"{tower}.encoder.layers.{i}" for i in range(3)):
        found |= merged(
            *(norm(f"{layer}.layer_norm{i}", V) for i in (1, 2)),
            *(linear(f"{layer}.self_attn.{name}_proj", V, V) for name in ("q", "k", "v", "out")),
            linear(f"{layer}.mlp.fc1", V, 48),
            linear(f"{layer}.mlp.fc2", 48, V),
        )
    for layer in (f"{text}.layers.{i}" for i in range(2)):
        found |= merged(
            *(linear(f"{layer}.self_attn.{name}_proj", D, D, bias=False) for name in "qkvo"),
            *(linear(f"{layer}.mlp.{name}_proj", D, 48, bias=False) for name in ("gate", "up")),
            linear(f"{layer}.mlp.down_proj", 48, D, bias=False),
            {f"{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")},
        )
    return found


def blip2_shapes(tokens: int) -> Shapes:
    """A ViT of 2 layers, a Q-Former of 2 that reads the image in the first, OPT of 2 layers with a tied head."""
    text = "language_model.model.decoder"
    found = {
        "vision_model.embeddings.class_embedding": (1, 1, V),
        "vision_model.embeddings.position_embedding": (1, 17, V),
        "vision_model.embeddings.patch_embedding.weight": (V, 3, 7, 7),
        "vision_model.embeddings.patch_embedding.bias": (V,),
        **norm("vision_model.post_layernorm", V),
        "query_tokens": (1, 4, R),
        **norm("qformer.layernorm", R),
        **linear("language_projection", R, D),
        f"{text}.embed_tokens.weight": (tokens, D),
        f"{text}.embed_positions.weight": (514, D),
        **norm(f"{text}.final_layer_norm", D),
    }
    for layer in (f"vision_model.encoder.layers.{i}" for i in range(2)):
        found |= merged(
            *(norm(f"{layer}.layer_norm{i}", V) for i in (1, 2)),
            linear(f"{layer}.self_attn.qkv", V, 3 * V),
            linear(f"{layer}.self_attn.projection", V, V),
            linear(f"{layer}.mlp.fc1", V, 48),
            linear(f"{layer}.mlp.fc2", 48, V),
        )
    for i, layer in ((i, f"qformer.encoder.layer.{i}") for i in range(2)):
        for attention, source in (("attention", R), *((("crossattention", V),) if i == 0 else ())):
            found |= merged(
                linear(f"{layer}.{attention}.attention.query", R, R),
                *(linear(f"{layer}.{attention}.attention.{name}", source, R) for name in ("key", "value")),
                linear(f"{layer}.{attention}.output.dense", R, R),
                norm(f"{layer}.{attention}.output.LayerNorm", R),
            )
        found |= merged(
            linear(f"{layer}.intermediate_query.dense", R, 32),
            linear(f"{layer}.output_query.dense", 32, R),
            norm(f"{layer}.output_query.LayerNorm", R),
        )
    for layer in (f"{text}.layers.{i}" for i in range(2)):
        found |= merged(
            *(linear(f"{layer}.self_attn.{name}_proj", D, D) for name in ("q", "k", "v", "out")),
            *(norm(f"{layer}.{name}_layer_norm", D) for name in ("self_attn", "final")),
            linear(f"{layer}.fc1", D, 48),
            linear(f"{layer}.fc2", 48, D),
        )
    return found
