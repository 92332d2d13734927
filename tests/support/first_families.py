"""Tiny random VLMs of the first eleven families, with their own processors, as transformers publishes them."""

from __future__ import annotations

from typing import Any

from support.tiny_pieces import make_tokenizer
from vlm_sft.families.images_alone import images_alone

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "num_channels": 3}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 1024,
        "initializer_range": 0.1}  # fmt: skip


def tokenizer_with(
    *tokens: str, eos: str = "</s>", pad: str | None = None, bos: str | None = "<s>", **named: str
) -> Any:
    """The test tokenizer with further special tokens, some of them under names (`image_token="<image>"`)."""
    from transformers import PreTrainedTokenizerFast

    base = make_tokenizer()
    base.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    backend = base.backend_tokenizer
    if bos in (None, "<bos>"):  # Qwen has none; PaliGemma turns it off, which this backend does not hear
        from tokenizers.processors import ByteLevel

        backend.post_processor = ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad or eos, unk_token="<unk>",
        extra_special_tokens=named,
    )  # fmt: skip


def _llava(config_class: Any, text: Any, **options: Any) -> Any:
    from transformers import CLIPVisionConfig

    return config_class(vision_config=CLIPVisionConfig(**VISION), text_config=text, vision_feature_layer=-2, **options)


def llava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, LlamaConfig, LlavaConfig, LlavaProcessor

    tokenizer = tokenizer_with("<image>", pad="<pad>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)  # fmt: skip
    config = _llava(LlavaConfig, LlamaConfig(**TEXT), image_token_index=processor.image_token_id, image_seq_length=4)
    return config, processor


def llava_next() -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor, MistralConfig

    grid = [[28, 56], [56, 28], [56, 56]]
    tokenizer = tokenizer_with("<image>", pad="<pad>")
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                        image_grid_pinpoints=grid)  # fmt: skip
    processor = LlavaNextProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                   num_additional_image_tokens=1)  # fmt: skip
    config = _llava(LlavaNextConfig, MistralConfig(**TEXT), image_token_index=processor.image_token_id,
                    image_grid_pinpoints=grid)  # fmt: skip
    return config, processor


# How an image is cut into tiles, by the families that cut it.
TILES = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
TILED = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
QWEN_VISION = {"hidden_size": 16, "out_hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 24,
               "patch_size": 4}  # fmt: skip
QWEN_IMAGES = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
QWEN = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(eos: str = "<|im_end|>") -> tuple[Any, dict[str, int]]:
    tokenizer = tokenizer_with(*QWEN, eos, "<|endoftext|>", eos=eos, pad="<|endoftext|>", bos=None)
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(f"<|{m}|>") for n, m in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"))}  # fmt: skip
    return tokenizer, ids


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    tokenizer, ids = _qwen()
    images = Qwen2VLImageProcessorPil(**QWEN_IMAGES)
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **ids)
    return config, images_alone(Qwen2_5_VLProcessor)(images, tokenizer)


def qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLProcessor

    tokenizer, ids = _qwen()
    images = Qwen2VLImageProcessorPil(**QWEN_IMAGES)
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **ids)
    return config, images_alone(Qwen3VLProcessor)(images, tokenizer)


def idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ImageProcessorPil, Idefics3Processor, LlamaConfig

    tokenizer = tokenizer_with("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES,
                               pad="<pad>")  # fmt: skip
    images = Idefics3ImageProcessorPil(**TILED)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1)
    vision = {**VISION, "model_type": "idefics3_vision"}
    config = Idefics3Config(vision_config=vision, text_config=LlamaConfig(**TEXT), scale_factor=2,
                            image_token_id=processor.image_token_id)  # fmt: skip
    return config, processor


def smolvlm() -> tuple[Any, Any]:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMImageProcessorPil, SmolVLMProcessor

    tokenizer = tokenizer_with("<|im_start|>", *TILES, "<video>", eos="<end_of_utterance>", pad="<|endoftext|>",
                               bos="<|im_start|>", fake_image_token="<fake_token_around_image>", image_token="<image>",
                               end_of_utterance_token="<end_of_utterance>",
                               global_image_token="<global-img>")  # fmt: skip
    images = SmolVLMImageProcessorPil(**TILED)
    processor = images_alone(SmolVLMProcessor)(images, tokenizer, None, image_seq_len=1)
    config = SmolVLMConfig(vision_config={**VISION, "model_type": "smolvlm_vision"}, text_config=LlamaConfig(**TEXT),
                           scale_factor=2, image_token_id=processor.image_token_id)  # fmt: skip
    return config, processor


def paligemma() -> tuple[Any, Any]:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    tokenizer = tokenizer_with(bos="<bos>", eos="<eos>", pad="<pad>", image_token="<image>")
    processor = PaliGemmaProcessor(images, tokenizer)
    text = GemmaConfig(**{**TEXT, "vocab_size": 1600}, head_dim=8, pad_token_id=0)
    config = PaliGemmaConfig(vision_config=SiglipVisionConfig(**VISION), text_config=text,
                             image_token_index=processor.image_token_id, projection_dim=16, hidden_size=16)  # fmt: skip
    return config, processor


def internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    tokenizer = tokenizer_with("<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", bos=None,
                               start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                               video_token="<video>")  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    processor = images_alone(InternVLProcessor)(images, tokenizer, None, image_seq_length=1)
    vision = InternVLVisionConfig(**{**VISION, "image_size": [28, 28], "patch_size": [14, 14]})
    config = InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), downsample_ratio=0.5,
                            image_token_id=processor.image_token_id, image_seq_length=1)  # fmt: skip
    return config, processor


def gemma3() -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tokenizer = tokenizer_with("<start_of_turn>", bos="<bos>", eos="<end_of_turn>", pad="<pad>",
                               image_token="<image_soft_token>", boi_token="<start_of_image>",
                               eoi_token="<end_of_image>")  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=1)
    text = Gemma3TextConfig(**TEXT, head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=64,
                            query_pre_attn_scalar=8)  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
                          mm_tokens_per_image=1, image_token_index=tokenizer.image_token_id,
                          boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id)  # fmt: skip
    return config, processor


def kosmos2() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, Kosmos2Config, Kosmos2Processor

    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = Kosmos2Processor(images, tokenizer_with(pad="<pad>"), num_patch_index_tokens=4)
    text = {"vocab_size": 400, "embed_dim": 16, "layers": 2, "ffn_dim": 24, "attention_heads": 2,
            "max_position_embeddings": 1024, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1}  # fmt: skip
    return Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=64), processor


def fuyu() -> tuple[Any, Any]:
    from transformers import FuyuConfig, FuyuImageProcessorPil, FuyuProcessor

    tokenizer = tokenizer_with("|SPEAKER|", "|NEWLINE|", "<0x04>", bos="|ENDOFTEXT|", eos="|ENDOFTEXT|")
    images = FuyuImageProcessorPil(size={"height": 56, "width": 56}, patch_size={"height": 14, "width": 14})
    processor = FuyuProcessor(images, tokenizer)
    text = {"model_type": "persimmon", **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}}
    config = FuyuConfig(text_config=text, patch_size=14, image_token_id=processor.image_token_id,
                        **{k: v for k, v in text.items() if k != "model_type"})  # fmt: skip
    return config, processor


FIRST = {
    "llava": llava, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "idefics3": idefics3,
    "smolvlm": smolvlm, "paligemma": paligemma, "internvl": internvl, "gemma3": gemma3, "kosmos-2": kosmos2,
    "fuyu": fuyu,
}  # fmt: skip
