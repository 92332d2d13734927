"""Tiny random VLMs whose own classes need torchvision or timm, as `tiny_families` has them; see `.venv-torchvision`."""

from __future__ import annotations

from typing import Any

from support.first_families import TEXT, VISION, tokenizer_with
from vlm_sft.families.images_alone import images_alone


def mistral3() -> tuple[Any, Any]:
    from transformers import Mistral3Config, PixtralImageProcessorPil, PixtralProcessor

    tokenizer = tokenizer_with("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]",
                               "[IMG_END]", pad="<pad>")  # fmt: skip
    images = PixtralImageProcessorPil(patch_size=4, size={"longest_edge": 32})
    processor = PixtralProcessor(images, tokenizer, patch_size=4, spatial_merge_size=2)
    vision = {**VISION, "image_size": 32, "patch_size": 4, "head_dim": 8, "model_type": "pixtral"}
    config = Mistral3Config(vision_config=vision, text_config={**TEXT, "head_dim": 8, "model_type": "mistral"},
                            image_token_index=processor.image_token_id, spatial_merge_size=2,
                            vision_feature_layer=-1)  # fmt: skip
    return config, processor


def pixtral() -> tuple[Any, Any]:
    from transformers import LlavaConfig

    config, processor = mistral3()
    processor.spatial_merge_size = 1
    own = LlavaConfig(vision_config=config.vision_config, text_config=config.text_config, vision_feature_layer=-1,
                      image_token_index=processor.image_token_id, vision_feature_select_strategy="full")  # fmt: skip
    return own, processor


def lfm2_vl() -> tuple[Any, Any]:
    from transformers import Lfm2VlConfig, Lfm2VlImageProcessor, Lfm2VlProcessor

    tiles = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = tokenizer_with(*tiles, "<|im_start|>", "<|img_thumbnail|>", bos="<|startoftext|>", eos="<|im_end|>",
                               pad="<|pad|>", image_token="<image>", image_start_token="<|image_start|>",
                               image_end_token="<|image_end|>")  # fmt: skip
    images = Lfm2VlImageProcessor(encoder_patch_size=4, tile_size=16, min_image_tokens=1, max_image_tokens=4,
                                  max_tiles=4)  # fmt: skip
    processor = Lfm2VlProcessor(images, tokenizer)
    vision = {**{k: v for k, v in VISION.items() if k != "image_size"}, "patch_size": 4, "num_patches": 16,
              "vision_use_head": False}  # fmt: skip
    text = {**TEXT, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "pad_token_id": 0}
    config = Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id,
                          projector_hidden_size=16)  # fmt: skip
    return config, processor


def kimi_k25() -> tuple[Any, Any]:
    from transformers import Kimi_K25Config, Kimi_K25ImageProcessor, Kimi_K25Processor

    tokenizer = tokenizer_with("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|media_begin|>",
                               "<|media_content|>", "<|media_end|>", "<think>", "</think>", eos="<|im_end|>", bos=None,
                               pad="[PAD]", image_token="<|media_pad|>",
                               video_token="<|kimi_k25_video_placeholder|>")  # fmt: skip
    images = Kimi_K25ImageProcessor(patch_size=4, max_patches=16)
    processor = images_alone(Kimi_K25Processor)(images, tokenizer)
    vision = {**{k: v for k, v in VISION.items() if k not in ("image_size", "num_channels")}, "patch_size": 4,
              "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}  # fmt: skip
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
              "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
              "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "model_type": "deepseek_v3",
              "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
    config = Kimi_K25Config(vision_config=vision, text_config={**TEXT, **latent}, projection_hidden_size=16,
                            image_token_id=processor.image_token_id, video_token_id=processor.video_token_id,
                            tie_word_embeddings=False)  # fmt: skip
    return config, processor


def molmo2() -> tuple[Any, Any]:
    from transformers import Molmo2Config, Molmo2ImageProcessor, Molmo2Processor

    places = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>",
              "<im_low>")  # fmt: skip
    tokenizer = tokenizer_with(*places, "<|im_start|>", eos="<|im_end|>", bos="<|endoftext|>", pad="<|pad|>",
                               image_token="<|image|>", video_token="<|video|>")  # fmt: skip
    images = Molmo2ImageProcessor(size={"height": 24, "width": 24}, patch_size=4, overlap_margins=[1, 1], max_crops=2)
    processor = images_alone(Molmo2Processor)(images, None, tokenizer)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 16,
             "intermediate_size": 24}  # fmt: skip
    ids = dict(zip(places, tokenizer.convert_tokens_to_ids(places), strict=True))
    text = {**TEXT, "head_dim": 8, "additional_vocab_size": 8}
    config = Molmo2Config(
        vision_config={**heads, "num_hidden_layers": 2, "image_size": [24, 24], "patch_size": 4},
        adapter_config={**heads, "text_hidden_size": 16, "vision_feature_layer": [1, 0]}, text_config=text,
        image_patch_id=ids["<im_patch>"], image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"], image_end_token_id=ids["<im_end>"],
        frame_start_token_id=ids["<frame_start>"], frame_end_token_id=ids["<frame_end>"],
    )  # fmt: skip
    return config, processor


def llama4() -> tuple[Any, Any]:
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    tokenizer = tokenizer_with("<|header_start|>", "<|header_end|>", "<|image|>", "<|patch|>", "<|image_start|>",
                               "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", bos="<|begin_of_text|>",
                               eos="<|eot|>", pad="<|finetune_right_pad|>")  # fmt: skip
    images = Llama4ImageProcessor(size={"height": 16, "width": 16}, max_patches=4)
    processor = Llama4Processor(images, tokenizer, patch_size=4)
    vision = {**VISION, "image_size": 16, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16,
              "projector_output_dim": 16, "intermediate_size": 64}  # fmt: skip
    text = {**TEXT, "head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 4, "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0], "attention_chunk_size": 512, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    config = Llama4Config(vision_config=vision, text_config=text,
                          image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"))  # fmt: skip
    return config, processor


def cohere2_vision() -> tuple[Any, Any]:
    from transformers import Cohere2VisionConfig, Cohere2VisionImageProcessor, Cohere2VisionProcessor

    turns = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    tokenizer = tokenizer_with(*turns, "<|START_RESPONSE|>", "<|END_RESPONSE|>", bos="<BOS_TOKEN>",
                               eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", image_token="<|IMG_PATCH|>",
                               boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>",
                               img_line_break_token="<|IMG_LINE_BREAK|>")  # fmt: skip
    images = Cohere2VisionImageProcessor(size={"height": 32, "width": 32}, max_patches=8, patch_size=4,
                                         downsample_factor=2)  # fmt: skip
    processor = Cohere2VisionProcessor(images, tokenizer)
    text = {**TEXT, "head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "model_type": "cohere2"}  # fmt: skip
    config = Cohere2VisionConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 4, "model_type": "siglip_vision_model"},
        text_config=text, alignment_intermediate_size=24, image_token_id=processor.image_token_id,
    )  # fmt: skip
    return config, processor


def perception_lm() -> tuple[Any, Any]:
    from transformers import PerceptionLMConfig, PerceptionLMImageProcessor, PerceptionLMProcessor

    tokenizer = tokenizer_with("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", bos="<|begin_of_text|>",
                               eos="<|eot_id|>", pad="<|pad|>", image_token="<|image|>",
                               video_token="<|video|>")  # fmt: skip
    images = PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4, size={"height": 32, "width": 32})
    processor = images_alone(PerceptionLMProcessor)(None, images, tokenizer, patch_size=16, pooling_ratio=1)
    vision = {"model_type": "timm_wrapper", "architecture": "test_vit", "do_pooling": False,
              "model_args": {"img_size": 32, "embed_dim": 64}}  # fmt: skip
    config = PerceptionLMConfig(vision_config=vision, text_config={**TEXT, "model_type": "llama"},
                                image_token_id=processor.image_token_id,
                                video_token_id=processor.video_token_id)  # fmt: skip
    return config, processor


def fast_vlm() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, FastVlmConfig, LlavaProcessor

    tokenizer = tokenizer_with("<|im_start|>", "<|endoftext|>", "<image>", eos="<|im_end|>", pad="<|endoftext|>",
                               bos=None)  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor = LlavaProcessor(images, tokenizer, patch_size=32, vision_feature_select_strategy="full",
                               num_additional_image_tokens=0)  # fmt: skip
    vision = {"model_type": "timm_wrapper", "architecture": "test_byobnet", "do_pooling": True, "hidden_size": 256}
    config = FastVlmConfig(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_seq_length=4,
                           image_token_index=processor.image_token_id)  # fmt: skip
    return config, processor


def gemma3n() -> tuple[Any, Any]:
    from transformers import Gemma3nConfig, Gemma3nProcessor, SiglipImageProcessorPil

    tokenizer = tokenizer_with("<start_of_turn>", bos="<bos>", eos="<end_of_turn>", pad="<pad>",
                               image_token="<image_soft_token>", boi_token="<start_of_image>",
                               eoi_token="<end_of_image>", audio_token="<audio_soft_token>",
                               boa_token="<start_of_audio>", eoa_token="<end_of_audio>")  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    processor = images_alone(Gemma3nProcessor)(None, images, tokenizer, image_seq_length=4)
    text = {**TEXT, "head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0,
            "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]}  # fmt: skip
    vision = {"architecture": "test_convnext", "hidden_size": 64, "vocab_size": 8, "vocab_offset": 400,
              "model_type": "gemma3n_vision"}  # fmt: skip
    audio = {"hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_size": 8,
             "vocab_offset": 408, "sscp_conv_channel_size": (4, 2), "input_feat_size": 16,
             "model_type": "gemma3n_audio"}  # fmt: skip
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in
           ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "eoa_token")}  # fmt: skip
    config = Gemma3nConfig(text_config=text, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=4,
                           **ids)  # fmt: skip
    return config, processor


BESIDE = {each.__name__: each for each in (
    mistral3, pixtral, lfm2_vl, kimi_k25, molmo2, llama4, cohere2_vision, perception_lm, fast_vlm, gemma3n,
)}  # fmt: skip
