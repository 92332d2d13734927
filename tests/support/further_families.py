"""Tiny random VLMs of further families, as `tiny_families` has them: those with relatives among the first eleven."""

from __future__ import annotations

from typing import Any

from support.first_families import QWEN_IMAGES, QWEN_VISION, TEXT, VISION, _qwen, tokenizer_with
from vlm_sft.families.images_alone import images_alone

# A mixture of four experts, as most families write it.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _rotary(*section: int, **further: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(section), "rope_theta": 10000.0, **further}


def _qwen_images(kind: str) -> tuple[Any, dict[str, int]]:
    import transformers

    tokenizer, ids = _qwen()
    images = transformers.Qwen2VLImageProcessorPil(**QWEN_IMAGES)
    return images_alone(getattr(transformers, kind))(images, tokenizer), ids


def qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig

    processor, ids = _qwen_images("Qwen2VLProcessor")
    vision = {"embed_dim": 16, "hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {**TEXT, "rope_parameters": _rotary(1, 1, 2)}
    return Qwen2VLConfig(vision_config=vision, text_config=text, **ids), processor


def qwen3_vl_moe() -> tuple[Any, Any]:
    from transformers import Qwen3VLMoeConfig

    processor, ids = _qwen_images("Qwen3VLProcessor")
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": _rotary(2, 1, 1), **EXPERTS, "decoder_sparse_step": 1}
    text["num_local_experts"] = text.pop("num_experts")
    return Qwen3VLMoeConfig(vision_config=vision, text_config=text, **ids), processor


def _qwen3_5(kind: str, **further: Any) -> tuple[Any, Any]:
    import transformers

    processor, ids = _qwen_images("Qwen3VLProcessor")
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
              "linear_num_value_heads": 2}  # fmt: skip
    text = {**TEXT, "head_dim": 8, "rope_parameters": _rotary(2, 1, 1, partial_rotary_factor=1.0), **linear,
            "layer_types": ["linear_attention", "full_attention"], **further}  # fmt: skip
    config = getattr(transformers, kind)
    return config(vision_config={**QWEN_VISION, "num_position_embeddings": 16}, text_config=text, **ids), processor


def qwen3_5() -> tuple[Any, Any]:
    return _qwen3_5("Qwen3_5Config")


def qwen3_5_moe() -> tuple[Any, Any]:
    return _qwen3_5("Qwen3_5MoeConfig", **EXPERTS, shared_expert_intermediate_size=16)


GLM = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
       "[gMASK]", "<sop>", "<|system|>", "<|assistant|>")  # fmt: skip


def _glm(name: str, processor: str = "", **further: Any) -> tuple[Any, Any]:
    import transformers

    tokenizer = tokenizer_with(*GLM, "<|user|>", "<|endoftext|>", eos="<|endoftext|>", bos=None)
    kind = processor or name
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    ids = {key: tokenizer.convert_tokens_to_ids(word) for key, word in
           (("image_token_id", "<|image|>"), ("video_token_id", "<|video|>"),
            ("image_start_token_id", "<|begin_of_image|>"), ("image_end_token_id", "<|end_of_image|>"),
            ("video_start_token_id", "<|begin_of_video|>"), ("video_end_token_id", "<|end_of_video|>"))}  # fmt: skip
    vision = {"hidden_size": 16, "out_hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 24,
              "patch_size": 4, "image_size": 32}  # fmt: skip
    text = {**TEXT, "rope_parameters": _rotary(2, 1, 1), **further}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **ids)
    return config, images_alone(getattr(transformers, f"{kind}Processor"))(images, tokenizer)


def glm4v() -> tuple[Any, Any]:
    return _glm("Glm4v")


def glm46v() -> tuple[Any, Any]:
    return _glm("Glm46V")


def llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    grid = [[28, 28], [28, 56], [56, 28], [56, 56], [28, 84]]
    tokenizer = tokenizer_with("<image>", "<video>", "<|im_start|>", "<|endoftext|>", eos="<|im_end|>",
                               pad="<|endoftext|>", bos=None)  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = images_alone(LlavaOnevisionProcessor)(images, tokenizer, num_image_tokens=4,
                                                        vision_feature_select_strategy="full")  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), text_config=Qwen2Config(**TEXT),
        image_grid_pinpoints=grid, image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
    )  # fmt: skip
    return config, processor


def ovis2() -> tuple[Any, Any]:
    from transformers import Ovis2Config, Ovis2ImageProcessorPil, Ovis2Processor, Qwen2Config

    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = tokenizer_with("<image>", *marks, "<|im_start|>", "<|endoftext|>", eos="<|im_end|>",
                               pad="<|endoftext|>", bos=None, image_token="<IMG_ATOM>")  # fmt: skip
    images = Ovis2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    vision = {**VISION, "vocab_size": 32, "num_visual_indicator_tokens": 5, "hidden_stride": 2}
    config = Ovis2Config(
        vision_config=vision, text_config=Qwen2Config(**TEXT), hidden_size=16, vocab_size=400,
        image_token_id=tokenizer.image_token_id, visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
    )  # fmt: skip
    return config, Ovis2Processor(images, tokenizer, image_seq_length=1)


def aya_vision() -> tuple[Any, Any]:
    from transformers import (
        AyaVisionConfig,
        AyaVisionProcessor,
        Cohere2Config,
        GotOcr2ImageProcessorPil,
        SiglipVisionConfig,
    )

    tiles = ["TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 5))]
    turns = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    image = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<image>"]
    tokenizer = tokenizer_with(*tiles, *turns, *image, "<|START_RESPONSE|>", "<|END_RESPONSE|>", bos="<BOS_TOKEN>",
                               eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>")  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    processor = AyaVisionProcessor(images, tokenizer, patch_size=14, img_size=28, downsample_factor=2)
    text = Cohere2Config(**TEXT, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = AyaVisionConfig(vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), text_config=text,
                             downsample_factor=2, image_token_index=processor.image_token_id)  # fmt: skip
    return config, processor


def _deepseek(name: str, **further: Any) -> tuple[Any, Any]:
    import transformers

    tokenizer = tokenizer_with(eos="<｜end▁of▁sentence｜>", pad="<｜▁pad▁｜>",
                               image_token="<image_placeholder>")  # fmt: skip
    options = {"high_res_size": {"height": 64, "width": 64}} if further else {}
    images = getattr(transformers, f"{name}ImageProcessorPil")(size={"height": 28, "width": 28}, **options)
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, num_image_tokens=4)
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION, "vision_use_head": False}, text_config={**TEXT, "model_type": "llama"},
        image_token_id=processor.image_token_id, **further,
    )  # fmt: skip
    return config, processor


def deepseek_vl() -> tuple[Any, Any]:
    return _deepseek("DeepseekVL")


def deepseek_vl_hybrid() -> tuple[Any, Any]:
    high = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 4, "mlp_dim": 24, "window_size": 4, "global_attn_indexes": [1],
            "model_type": "sam_vision_model"}  # fmt: skip
    return _deepseek("DeepseekVLHybrid", high_res_vision_config=high)


def gemma4() -> tuple[Any, Any]:
    from transformers import Gemma4Config, Gemma4ImageProcessorPil, Gemma4Processor, Gemma4TextConfig

    tokenizer = tokenizer_with("<|turn>", "<|channel>", "<channel|>", bos="<bos>", eos="<turn|>", pad="<pad>",
                               image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>",
                               audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>")  # fmt: skip
    images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=3, max_soft_tokens=70)
    processor = images_alone(Gemma4Processor)(None, images, tokenizer, None, image_seq_length=70)
    text = Gemma4TextConfig(**TEXT, head_dim=8, sliding_window=64,
                            layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=400,
                            hidden_size_per_layer_input=4, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3,
              "position_embedding_size": 256, "model_type": "gemma4_vision"}  # fmt: skip
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(word) for name, word in
           (("image_token", "<|image|>"), ("boi_token", "<|image>"), ("eoi_token", "<image|>"),
            ("audio_token", "<|audio|>"), ("boa_token", "<|audio>"), ("video_token", "<|video|>"))}  # fmt: skip
    # Most of them hear, and what hears goes along unread.
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [4, 2],
             "output_proj_dims": 8, "model_type": "gemma4_audio"}  # fmt: skip
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=audio, **ids), processor


FURTHER = {each.__name__: each for each in (
    qwen2_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, glm4v, glm46v, llava_onevision, ovis2, aya_vision,
    deepseek_vl, deepseek_vl_hybrid, gemma4,
)}  # fmt: skip
