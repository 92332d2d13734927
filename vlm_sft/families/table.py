"""The existing VLMs that a recipe can start from (`model:`), as data: what each needs beside its own classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..templates.notations import DEFAULT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """What transformers' own classes of a model do not say.

    Attributes:
        processor: Name of the model's own processor in transformers.
        template: Chat template that ships for it, by the `model_type` of its language model; `""` for any.
        column: A further column of a batch that the model reads, or "".
        options: What its own processor is always told.
        one_by_one: Whether its own class calls its projector for each image by itself: where the weights are split
            among processes, one with more images than another would wait for ever.
        frames: A further column, in which the token before and after the places of an image is 1 too, or "".
        counts: What is 1 in that column: `images` (places of image features), `written` (all that its own processor
            writes for an image) or `answer` (all from the first supervised token on).
        counted: By what the model's own classes say, without an image, what stands for one of a size: `tokens` (so many
            placeholders), `patches` or `rows` (of patches, which its processor writes down); "" where they do not, or
            not rightly.
        prompt: Of a model made for one turn, whose own processor writes a part of the prompt itself: what is left for
            a template to write, as a Jinja expression on our render (`rendered`).
        boxes: How boxes are written, a key of `NOTATIONS`; of a family that was taught no notation, `DEFAULT`.
        vllm: Whether vLLM has a class for it.
        no_export: Why it is not exported to its own class, or "".
        no_packing: Why its rows are not packed, or "".
        no_sharing: Why questions on one image do not share it (`independent`), or "".
        plain_head: Whether its own class leaves out the scaling of logits that its language model's configuration
            states.
        one_image: Whether it was made for one image, so that the frames of a video are refused.
        needs: Libraries without which its processor or its tower cannot be had, in the order of their imports; the last
            is an extra of this package, which has them all.
    """

    processor: str
    template: dict[str, str]
    column: str = ""
    counts: str = "images"
    counted: str = ""
    prompt: str = ""
    boxes: str = DEFAULT
    vllm: bool = True
    no_export: str = ""
    no_packing: str = ""
    no_sharing: str = ""
    plain_head: bool = False
    one_image: bool = False
    frames: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    one_by_one: bool = False
    needs: tuple[str, ...] = ()


TORCHVISION = ("torchvision",)  # image processors that transformers has with it alone
TIMM = ("torchvision", "timm")  # towers of timm, which imports torchvision
RECURRENT = "its linear attention carries a state from one row into the next"
CONVOLVED = "its convolutions look back over the border of a row"
ONE_BLOCK = "the tokens of all images see each other, also those of other rows"
FOUR_AXES = "its positions have four axes, and none of them says which tokens are of a row"
BESIDE_THE_TEXT = "its images are no part of the text, and a text sees all those of its row"
# By `model_type`. Which parameters are which part is said in `PART_NAMES` of `model/freeze.py`.
FAMILIES: dict[str, Family] = {
    # A Llama-3 in LLaVA-1.6 has another template than Vicuna, and the model type does not tell them apart.
    "llava": Family("LlavaProcessor", {"llama": "vicuna_v1"}, boxes="llava"),
    "llava_next": Family("LlavaNextProcessor", {"mistral": "mistral", "qwen2": "ovis2", "granite": "granite_vision"},
                         counted="tokens", boxes="llava"),
    "llava_next_video": Family("LlavaNextVideoProcessor", {"llama": "vicuna_v1"}, counted="tokens", boxes="llava"),
    "vipllava": Family("LlavaProcessor", {"": "vipllava"}, boxes="llava", vllm=False),
    "llava_onevision": Family("LlavaOnevisionProcessor", {"qwen2": "internvl"}, counted="tokens"),
    "qwen2_vl": Family("Qwen2VLProcessor", {"": "qwen2_5_vl"}, "mm_token_type_ids", counted="tokens", boxes="qwen2_vl"),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", {"": "qwen2_5_vl"}, "mm_token_type_ids", counted="tokens",
                         boxes="qwen2_5_vl"),
    "qwen3_vl": Family("Qwen3VLProcessor", {"": "qwen3_vl"}, "mm_token_type_ids", counted="tokens", boxes="qwen3_vl"),
    "qwen3_vl_moe": Family("Qwen3VLProcessor", {"": "qwen3_vl"}, "mm_token_type_ids", counted="tokens",
                           boxes="qwen3_vl"),
    "qwen3_5": Family("Qwen3VLProcessor", {"": "qwen3_5"}, "mm_token_type_ids", counted="tokens", boxes="qwen3_vl",
                      no_packing=RECURRENT, no_sharing=RECURRENT),
    "qwen3_5_moe": Family("Qwen3VLProcessor", {"": "qwen3_5"}, "mm_token_type_ids", counted="tokens", boxes="qwen3_vl",
                      no_packing=RECURRENT, no_sharing=RECURRENT),
    "glm4v": Family("Glm4vProcessor", {"": "glm4v"}, "mm_token_type_ids", counted="tokens"),
    "glm46v": Family("Glm46VProcessor", {"": "glm46v"}, "mm_token_type_ids", counted="tokens", vllm=False),
    "idefics3": Family("Idefics3Processor", {"": "smolvlm"}, counted="rows"),
    "smolvlm": Family("SmolVLMProcessor", {"": "smolvlm"}, counted="rows"),
    # PaliGemma reads its prompt in both directions and writes its answer in one.
    "paligemma": Family("PaliGemmaProcessor", {"": "paligemma"}, "token_type_ids", "answer",
                        no_sharing="its image is read together with the question",
                        prompt="rendered.replace(bos_token, '', 1).removesuffix('\\n')", boxes="paligemma"),
    "internvl": Family("InternVLProcessor", {"": "internvl"}, counted="patches", boxes="internvl"),
    "gemma3": Family("Gemma3Processor", {"": "gemma3"}, "token_type_ids"),
    "gemma4": Family("Gemma4Processor", {"": "gemma4"}, "mm_token_type_ids"),
    "aya_vision": Family("AyaVisionProcessor", {"": "aya_vision"}, plain_head=True),
    "ovis2": Family("Ovis2Processor", {"": "ovis2"}, vllm=False),
    "deepseek_vl": Family("DeepseekVLProcessor", {"": "deepseek_vl"}, vllm=False),
    "deepseek_vl_hybrid": Family("DeepseekVLHybridProcessor", {"": "deepseek_vl"}, vllm=False),
    "kosmos-2": Family("Kosmos2Processor", {"": "kosmos2"}, "image_embeds_position_mask", vllm=False, one_image=True,
                       no_packing="its own class counts positions through, whatever it is given",
                       no_sharing="its own class counts positions through, whatever it is given",
                       prompt="rendered.removeprefix(bos_token ~ image_token ~ ' ')", boxes="kosmos2"),
    "granite4_vision": Family("Granite4VisionProcessor", {"": "granite4"}, counted="tokens"),
    "aria": Family("AriaProcessor", {"": "aria"}),
    "janus": Family("JanusProcessor", {"": "janus"}, vllm=False),
    "exaone4_5": Family("Exaone4_5_Processor", {"": "exaone4_5"}, counted="tokens"),
    "paddleocr_vl": Family("PaddleOCRVLProcessor", {"": "paddleocr_vl"}, "mm_token_type_ids", one_by_one=True),
    "lighton_ocr": Family("LightOnOcrProcessor", {"": "lighton_ocr"}),
    "video_llama_3": Family("VideoLlama3Processor", {"": "internvl"}, counted="tokens"),
    "video_llava": Family("VideoLlavaProcessor", {"": "vicuna_v1"}, boxes="llava", vllm=False,
                          options={"return_legacy_image_output": False}),
    # Which experts read a token depends on whether it is an image's.
    "ernie4_5_vl_moe": Family("Ernie4_5_VLMoeProcessor", {"": "ernie4_5_vl"}, "mm_token_type_ids", counted="tokens",
                              frames="moe_mm_token_type_ids"),
    "minicpmv4_6": Family("MiniCPMV4_6Processor", {"": "minicpm_v_4_6"}, no_packing=RECURRENT, no_sharing=RECURRENT,
                          vllm=False, options={"use_image_id": False}, one_by_one=True),
    "hunyuan_vl": Family("HunYuanVLProcessor", {"": "hunyuan_vl"}, "mm_token_type_ids", no_packing=FOUR_AXES,
                         no_sharing=FOUR_AXES, one_by_one=True),
    "idefics2": Family("Idefics2Processor", {"": "idefics2"}, vllm=False),
    "granite_docling": Family("GraniteDoclingProcessor", {"": "granite4"}, vllm=False),
    "got_ocr2": Family("GotOcr2Processor", {"": "got_ocr2"}, vllm=False,
                       no_export="its own processor refuses pictures as a chat template gives them"),
    "deepseek_ocr2": Family("DeepseekOcr2Processor", {"": "deepseek_ocr2"}),
    "mistral3": Family("PixtralProcessor", {"": "mistral3"}, needs=TORCHVISION),
    # A LLaVA on Pixtral's tower, which transformers has no class of its own for.
    "pixtral": Family("PixtralProcessor", {"": "mistral3"}, needs=TORCHVISION),
    "lfm2_vl": Family("Lfm2VlProcessor", {"": "lfm2_vl"}, no_packing=CONVOLVED, no_sharing=CONVOLVED, one_by_one=True,
                      needs=TORCHVISION),
    "kimi_k25": Family("Kimi_K25Processor", {"": "kimi_k25"}, counted="tokens", needs=TORCHVISION),
    "molmo2": Family("Molmo2Processor", {"": "molmo2"}, "mm_token_type_ids", "written", no_packing=ONE_BLOCK,
                     no_sharing=ONE_BLOCK, needs=TORCHVISION),
    "llama4": Family("Llama4Processor", {"": "llama4"}, needs=TORCHVISION),
    "cohere2_vision": Family("Cohere2VisionProcessor", {"": "cohere2_vision"}, plain_head=True, needs=TORCHVISION),
    "perception_lm": Family("PerceptionLMProcessor", {"": "perception_lm"}, counted="tokens", vllm=False, needs=TIMM),
    "fast_vlm": Family("LlavaProcessor", {"": "ovis2"}, boxes="llava", vllm=False, needs=TIMM),
    "gemma3n": Family("Gemma3nProcessor", {"": "gemma3"}, needs=TIMM),
    # Its images are seen from beside the text, by layers of their own.
    "mllama": Family("MllamaProcessor", {"": "mllama"}, vllm=False, no_packing=BESIDE_THE_TEXT,
                     no_sharing=BESIDE_THE_TEXT),
    "fuyu": Family("FuyuProcessor", {"": "fuyu"},
                   no_export="its own processor cannot cut images without torchvision"),
}  # fmt: skip


def family_name(config: PreTrainedConfig) -> str:
    """Key of a model among the `FAMILIES`: its `model_type`, but of a LLaVA on Pixtral's tower that one's."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    return "pixtral" if (config.model_type, tower) == ("llava", "pixtral") else config.model_type


def family_of(model_type: str, pretrained: str) -> Family:
    """The family of a model, by its `family_name`.

    Raises:
        UserError: It is none that a recipe can start from.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model.pretrained: a {model_type!r} model ({pretrained!r}) is none of those that a recipe can start from "
            f"({', '.join(FAMILIES)}); compose it from its parts under `stack`."
        )
    return FAMILIES[model_type]


def default_template(config: PreTrainedConfig, pretrained: str) -> str:
    """Name of the chat template for a model whose recipe names none.

    Raises:
        UserError: None is known for it.
    """
    template, text = family_of(family_name(config), pretrained).template, config.get_text_config().model_type
    if name := template.get(text) or template.get(""):
        return name
    raise UserError(
        f"chat_template: none is known for the {config.model_type} model {pretrained!r} with a {text} language model; "
        f"name one, or give the path of a .jinja file with generation markers."
    )
