"""Names and shapes of published checkpoints, for a tower of width 24 (inner 48), a Q-Former of 16 (inner 32) and a
language model of 32 (inner 48): `llava-hf/llava-1.5-7b-hf` and `Salesforce/blip2-opt-2.7b`, which vLLM reads."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]
V, R, D = 24, 16, 32


def linear(name: str, into: int, out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def merged(*parts: Shapes) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def llava(tokens: int) -> Shapes:
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


def blip2(tokens: int) -> Shapes:
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
