"""Tiny random VLMs of more families, as `tiny_families` has them: those whose prompts were written down last."""

from __future__ import annotations

from typing import Any

from support.first_families import QWEN_IMAGES, QWEN_VISION, TEXT, TILES, VISION, _llava, tokenizer_with
from vlm_sft.families.images_alone import images_alone

CHATML = ("<|im_start|>", "<|endoftext|>")
GRID = [[28, 56], [56, 28], [56, 56]]


def _granite_tokenizer(*tokens: str) -> Any:
    return tokenizer_with("<|start_of_role|>", "<|end_of_role|>", "<image>", *tokens, eos="<|end_of_text|>", bos=None)


def vipllava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, LlamaConfig, LlavaProcessor, VipLlavaConfig

    tokenizer = tokenizer_with("<image>", pad="<pad>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)  # fmt: skip
    config = _llava(VipLlavaConfig, LlamaConfig(**TEXT), image_token_index=processor.image_token_id, image_seq_length=4)
    config.vision_feature_layer = [-2, 1]
    return config, processor


def llava_next_video() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlavaNextImageProcessorPil, LlavaNextVideoConfig, LlavaNextVideoProcessor

    tokenizer = tokenizer_with("<image>", "<video>", pad="<pad>")
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                        image_grid_pinpoints=GRID)  # fmt: skip
    processor = images_alone(LlavaNextVideoProcessor)(
        None, images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = _llava(LlavaNextVideoConfig, LlamaConfig(**TEXT), image_token_index=processor.image_token_id,
                    video_token_index=processor.video_token_id, image_grid_pinpoints=GRID)  # fmt: skip
    return config, processor


def granite4_vision() -> tuple[Any, Any]:
    from transformers import (
        Granite4VisionConfig,
        Granite4VisionProcessor,
        LlavaNextImageProcessorPil,
        SiglipVisionConfig,
    )

    tokenizer = _granite_tokenizer()
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
                                        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]])  # fmt: skip
    processor = Granite4VisionProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full",
                                        downsample_rate="1/2")  # fmt: skip
    former = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "encoder_hidden_size": 64, "cross_attention_frequency": 1, "use_qformer_text_input": False}  # fmt: skip
    config = Granite4VisionConfig(
        vision_config=SiglipVisionConfig(**{**VISION, "image_size": 56, "hidden_size": 64}, vision_use_head=False),
        text_config={**TEXT, "model_type": "granite4_vision_text"},
        qformer_config={**former, "model_type": "blip_2_qformer"},
        image_token_index=processor.image_token_id, image_grid_pinpoints=images.image_grid_pinpoints,
        vision_feature_select_strategy="full", downsample_rate="1/2", deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1], spatial_vision_layer=-1, use_spatial_sampling=True, projector_dropout=0.0,
    )  # fmt: skip
    return config, processor


def aria() -> tuple[Any, Any]:
    from transformers import AriaConfig, AriaImageProcessorPil, AriaProcessor

    tokenizer = tokenizer_with(*CHATML, "<fim_prefix>", "<fim_suffix>", eos="<|im_end|>", pad="<|endoftext|>", bos=None,
                               image_token="<|img|>")  # fmt: skip
    images = AriaImageProcessorPil(max_image_size=980)
    processor = AriaProcessor(images, tokenizer, size_conversion={490: 4, 980: 4})
    vision = {**VISION, "image_size": 980, "patch_size": 140, "model_type": "idefics3_vision"}
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "model_type": "aria_text",
               "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    config = AriaConfig(vision_config=vision, text_config={**TEXT, **experts}, projector_patch_to_query_dict={49: 4},
                        image_token_index=tokenizer.image_token_id)  # fmt: skip
    return config, processor


def janus() -> tuple[Any, Any]:
    from transformers import JanusConfig, JanusImageProcessorPil, JanusProcessor

    tokenizer = tokenizer_with(eos="<｜end▁of▁sentence｜>", pad="<｜▁pad▁｜>", image_token="<image_placeholder>",
                               boi_token="<begin_of_image>", eoi_token="<end_of_image>")  # fmt: skip
    images = JanusImageProcessorPil(size={"height": 28, "width": 28})
    processor = JanusProcessor(images, tokenizer, num_image_tokens=4)
    vision = {**{k: v for k, v in VISION.items() if k != "intermediate_size"}, "projection_dim": 16, "mlp_ratio": 1.5,
              "num_image_tokens": 4}  # fmt: skip
    drawing = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32,
               "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 2, "projection_dim": 16,
               "image_token_embed_dim": 16}  # fmt: skip
    config = JanusConfig(vision_config=vision, vq_config=drawing, text_config={**TEXT, "model_type": "llama"},
                         image_token_id=tokenizer.image_token_id)  # fmt: skip
    return config, processor


def exaone4_5() -> tuple[Any, Any]:
    from transformers import Exaone4_5_Config, Exaone4_5_Processor, Exaone4Config, Qwen2VLImageProcessorPil

    tokenizer = tokenizer_with("<|system|>", "<|user|>", "<|assistant|>", "<vision>", "</vision>", "<|image_pad|>",
                               "<|video_pad|>", eos="<|endofturn|>", bos=None)  # fmt: skip
    images = Qwen2VLImageProcessorPil(**QWEN_IMAGES)
    processor = images_alone(Exaone4_5_Processor)(images, tokenizer)
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 2}
    text = Exaone4Config(**TEXT, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    config = Exaone4_5_Config(vision_config=vision, text_config=text, image_token_id=processor.image_token_id,
                              video_token_id=processor.video_token_id)  # fmt: skip
    return config, processor


def paddleocr_vl() -> tuple[Any, Any]:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLImageProcessorPil, PaddleOCRVLProcessor

    tokenizer = tokenizer_with("<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>", bos=None,
                               image_token="<|IMAGE_PLACEHOLDER|>")  # fmt: skip
    images = PaddleOCRVLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = PaddleOCRVLProcessor(images, tokenizer)
    text = {**TEXT, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1],
            "rope_theta": 10000.0}}  # fmt: skip
    ids = {f"vision_{side}_token_id": tokenizer.convert_tokens_to_ids(f"<|IMAGE_{side.upper()}|>")
           for side in ("start", "end")}  # fmt: skip
    config = PaddleOCRVLConfig(vision_config={**VISION, "image_size": 16, "patch_size": 4}, text_config=text,
                               image_token_id=processor.image_token_id, video_token_id=399, **ids)  # fmt: skip
    return config, processor


def lighton_ocr() -> tuple[Any, Any]:
    from transformers import LightOnOcrConfig, LightOnOcrProcessor, PixtralImageProcessorPil

    tokenizer = tokenizer_with(*CHATML, eos="<|im_end|>", pad="<|endoftext|>", bos=None, image_token="<|image_pad|>",
                               image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")  # fmt: skip
    images = PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 32})
    processor = LightOnOcrProcessor(images, tokenizer, patch_size=4, spatial_merge_size=2)
    vision = {**VISION, "image_size": 32, "patch_size": 4, "head_dim": 8, "model_type": "pixtral"}
    config = LightOnOcrConfig(vision_config=vision, text_config={**TEXT, "head_dim": 8, "model_type": "qwen3"},
                              image_token_id=processor.image_token_id)  # fmt: skip
    return config, processor


def video_llama_3() -> tuple[Any, Any]:
    from transformers import VideoLlama3Config, VideoLlama3ImageProcessorPil, VideoLlama3Processor

    tokenizer = tokenizer_with(*CHATML, "<|image_pad|>", "<|video_pad|>", eos="<|im_end|>", pad="<|endoftext|>",
                               bos=None)  # fmt: skip
    images = VideoLlama3ImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = images_alone(VideoLlama3Processor)(images, tokenizer)
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"patch_size": 4}
    config = VideoLlama3Config(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"},
                               image_token_id=processor.image_token_id,
                               video_token_id=processor.video_token_id)  # fmt: skip
    return config, processor


def video_llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        VideoLlavaConfig,
        VideoLlavaImageProcessor,
        VideoLlavaProcessor,
    )

    tokenizer = tokenizer_with("<image>", "<video>", pad="<pad>")
    images = VideoLlavaImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = images_alone(VideoLlavaProcessor)(images, None, tokenizer)
    config = VideoLlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT),
                              image_token_index=processor.image_token_id, video_token_index=processor.video_token_id,
                              image_seq_length=4)  # fmt: skip
    return config, processor


def ernie4_5_vl_moe() -> tuple[Any, Any]:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeImageProcessorPil, Ernie4_5_VLMoeProcessor

    named = {f"{kind}_{part}token": f"<|{kind.upper()}_{word}|>" for kind in ("image", "video")
             for part, word in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))}  # fmt: skip
    tokenizer = tokenizer_with("<|begin_of_sentence|>", "<think>", "</think>", eos="<|end_of_sentence|>", bos=None,
                               **named)  # fmt: skip
    images = Ernie4_5_VLMoeImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = images_alone(Ernie4_5_VLMoeProcessor)(images, tokenizer)
    text = {**TEXT, "head_dim": 8, "moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4,
            "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}  # fmt: skip
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
    config = Ernie4_5_VLMoeConfig(vision_config=vision, text_config=text,
                                  **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in named})  # fmt: skip
    return config, processor


def minicpmv4_6() -> tuple[Any, Any]:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ImageProcessorPil, MiniCPMV4_6Processor

    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
             "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
             "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}  # fmt: skip
    tokenizer = tokenizer_with(*CHATML, "<think>", "</think>", eos="<|im_end|>", pad="<|endoftext|>", bos=None, **named)
    images = MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=32, max_slice_nums=4)
    processor = images_alone(MiniCPMV4_6Processor)(images, None, tokenizer)
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
              "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"],
              "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0,
                                  "partial_rotary_factor": 1.0}}  # fmt: skip
    config = MiniCPMV4_6Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 4, "insert_layer_id": 0},
        text_config={**TEXT, "head_dim": 8, **linear, "model_type": "qwen3_5_text"}, insert_layer_id=0, image_size=32,
        image_token_id=processor.image_token_id, video_token_id=processor.video_token_id,
    )  # fmt: skip
    return config, processor


def hunyuan_vl() -> tuple[Any, Any]:
    from transformers import HunYuanVLConfig, HunYuanVLImageProcessorPil, HunYuanVLProcessor

    tokenizer = tokenizer_with(
        "<｜hy_begin▁of▁sentence｜>", "<｜hy_User｜>", "<｜hy_place▁holder▁no▁3｜>", eos="<｜hy_Assistant｜>", bos=None,
        image_token="<｜hy_place▁holder▁no▁102｜>", image_start_token="<｜hy_place▁holder▁no▁100｜>",
        image_end_token="<｜hy_place▁holder▁no▁101｜>",
    )  # fmt: skip
    images = HunYuanVLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = HunYuanVLProcessor(images, tokenizer)
    vision = {**VISION, "patch_size": 4, "out_hidden_size": 16, "text_hidden_size": 16, "max_image_size": 32,
              "min_image_size": 8, "img_max_token_num": 64}  # fmt: skip
    vision.pop("image_size")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1, 1], "rope_theta": 10000.0}
    config = HunYuanVLConfig(vision_config=vision, text_config={**TEXT, "head_dim": 8, "rope_parameters": rope},
                             image_token_id=processor.image_token_id, im_start_id=processor.image_start_token_id,
                             im_end_id=processor.image_end_token_id, im_newline_id=398)  # fmt: skip
    return config, processor


def idefics2() -> tuple[Any, Any]:
    from transformers import Idefics2Config, Idefics2ImageProcessorPil, Idefics2Processor, MistralConfig

    tokenizer = tokenizer_with("<end_of_utterance>", pad="<pad>", image_token="<image>",
                               image_boundary_token="<fake_token_around_image>")  # fmt: skip
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 42}, do_image_splitting=True)
    processor = Idefics2Processor(images, tokenizer, image_seq_len=2)
    perceiver = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
                 "num_key_value_heads": 1, "hidden_size": 16}  # fmt: skip
    config = Idefics2Config(vision_config={**VISION, "image_size": 42}, perceiver_config=perceiver,
                            text_config=MistralConfig(**TEXT), image_token_id=processor.image_token_id)  # fmt: skip
    return config, processor


def granite_docling() -> tuple[Any, Any]:
    from transformers import GraniteDoclingConfig, GraniteDoclingImageProcessorPil, GraniteDoclingProcessor

    tokenizer = _granite_tokenizer("<fake_token_around_image>", "<global-img>", *TILES)
    images = GraniteDoclingImageProcessorPil(size={"height": 28, "width": 28}, max_patches=4)
    processor = GraniteDoclingProcessor(images, tokenizer, image_seq_len=1)
    vision = {**VISION, "out_hidden_size": 16, "scale_factor": 2, "deepstack_visual_indexes": [0]}
    scaling = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
               "attention_multiplier": 1.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    config = GraniteDoclingConfig(vision_config=vision, text_config={**TEXT, **scaling}, pad_token_id=0,
                                  image_token_id=processor.image_token_id)  # fmt: skip
    return config, processor


def got_ocr2() -> tuple[Any, Any]:
    from transformers import GotOcr2Config, GotOcr2ImageProcessorPil, GotOcr2Processor

    tokenizer = tokenizer_with(*CHATML, "<img>", "</img>", "<imgpad>", eos="<|im_end|>", pad="<|endoftext|>", bos=None)
    images = GotOcr2ImageProcessorPil(size={"height": 128, "width": 128})
    processor = GotOcr2Processor(images, tokenizer)
    # An image is 256 tokens, whatever its size.
    vision = {"hidden_size": 8, "output_channels": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 128, "patch_size": 2, "window_size": 4, "global_attn_indexes": [],
              "mlp_dim": 16}  # fmt: skip
    config = GotOcr2Config(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"},
                           image_token_index=processor.image_token_id)  # fmt: skip
    return config, processor


def deepseek_ocr2() -> tuple[Any, Any]:
    from transformers import DeepseekOcr2Config, DeepseekOcr2ImageProcessorPil, DeepseekOcr2Processor

    tokenizer = tokenizer_with(pad="<pad>", image_token="<image>")
    # Its encoder has 256 queries for a picture of 1,024 pixels, and 144 for a tile of 768.
    images = DeepseekOcr2ImageProcessorPil(max_patches=2)
    processor = DeepseekOcr2Processor(images, tokenizer)
    sam = {"hidden_size": 8, "output_channels": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 1024,
           "window_size": 4, "global_attn_indexes": [], "mlp_dim": 16,
           "downsample_channels": [8, 16]}  # fmt: skip
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
               "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1, "pad_token_id": 0}  # fmt: skip
    encoder = {**TEXT, "pad_token_id": 0}
    config = DeepseekOcr2Config(vision_config={"sam_config": sam, "encoder_config": encoder},
                                text_config={**TEXT, **experts}, image_token_id=processor.image_token_id)  # fmt: skip
    return config, processor


def mllama() -> tuple[Any, Any]:
    from transformers import MllamaConfig, MllamaImageProcessorPil, MllamaProcessor

    tokenizer = tokenizer_with("<|image|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>",
                               eos="<|eot_id|>", pad="<pad>")  # fmt: skip
    images = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = MllamaProcessor(images, tokenizer)
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
              "intermediate_size": 24, "image_size": 28, "patch_size": 14, "max_num_tiles": 4, "vision_output_dim": 32,
              "intermediate_layers_indices": [0]}  # fmt: skip
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id), processor


RECENT = {each.__name__: each for each in (
    vipllava, llava_next_video, granite4_vision, aria, janus, exaone4_5, paddleocr_vl, lighton_ocr, video_llama_3,
    video_llava, ernie4_5_vl_moe, minicpmv4_6, hunyuan_vl, idefics2, granite_docling, got_ocr2, deepseek_ocr2,
    mllama,
)}  # fmt: skip
