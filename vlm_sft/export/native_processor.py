"""The processor of transformers that goes with a native class: same tokens, same pixels, no code of this package."""

from __future__ import annotations

from tokenizers.processors import TemplateProcessing
from transformers import InstructBlipProcessor, LlavaNextProcessor, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..batch.processor import VLMProcessor
from ..families.processor import FamilyProcessor
from ..model.configuration import image_size_of
from ..model.modeling import VLMForConditionalGeneration
from ..templates.render import RenderedChat
from ..templates.template import owns_bos
from .native_model import LLAVA_FORMS, llava_features, native_form


def native_template(processor: VLMProcessor) -> str:
    """The chat template as transformers and vLLM take it: with the system text and BOS that our processor adds."""
    template = str(processor.chat_template)
    # T5's tokenizer, whatever it is told, writes the end of a prompt by itself.
    before = "" if processor.answer_start is None else "{%- set eos_token = '' -%}"
    if processor.system is not None:
        message = {"role": "system", "content": [{"type": "text", "text": processor.system}]}
        before += (
            "{%- if messages[0]['role'] != 'system' -%}{%- set messages = [" + repr(message) + "] + messages -%}"
            "{%- endif -%}"
        )
    if not owns_bos(template) and processor._adds_bos(RenderedChat("", [], [])):
        before += "{{- bos_token -}}"
    return before + template


def question_template(processor: VLMProcessor) -> str:
    """What InstructBLIP's processor is to be given: the question alone, to which it adds the image and BOS itself."""
    return (
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
        "{{- raise_exception('InstructBLIP is asked one question: one message of the user, and no system text.') -}}"
        "{%- endif -%}{%- set image_token = '' -%}{%- set bos_token = '' -%}" + native_template(processor)
    )


def family_template(processor: FamilyProcessor) -> str:
    """The same for an existing VLM: the placeholder by its name, and only what its own processor leaves to a template.

    transformers gives a template the tokenizer's image token, where a processor may look for another (Gemma 3).
    """
    template, prompt = native_template(processor), processor.family.prompt
    if prompt:
        template = "{%- set rendered -%}" + template + "{%- endset -%}{{- " + prompt + " -}}"
    return "{%- set image_token = " + repr(processor.image_token) + " -%}" + template


def native_processor(
    model: VLMForConditionalGeneration, processor: VLMProcessor
) -> LlavaProcessor | LlavaNextProcessor | InstructBlipProcessor:
    """LLaVA's processor, for BLIP-2 too: BLIP-2's own drops the chat template and puts images before everything.

    InstructBLIP's has no template either: it puts the images before BOS and gives one text, the question, to both the
    Q-Former and the language model. What a bundle does otherwise shows in the comparison of tokens.
    """
    form, tokenizer, images = native_form(model), processor.tokenizer, processor.image_processor
    if processor.pad_to_square:
        settings = {k: v for k, v in images.to_dict().items() if not k.startswith(("_", "image_processor_type"))}
        images = LlavaImageProcessorPil(**{**settings, "do_pad": True})
    template = native_template(processor)
    tokenizer.chat_template = None
    if form == "instructblip":
        return InstructBlipProcessor(images, tokenizer, processor.qformer_tokenizer, processor.num_image_tokens)
    if owns_bos(str(processor.chat_template)) and tokenizer.bos_token_id is not None:
        # The template writes BOS, behind the images; the tokenizer must not write another in front of them.
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    vision = model.config.tower
    if form in LLAVA_FORMS:
        strategy, extra = llava_features(model)
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    else:  # one "patch" as large as the image, and the other queries
        strategy, extra, patch = "full", processor.num_image_tokens - 1, image_size_of(vision)[0]
    kind = LlavaNextProcessor if form == "llava_next" else LlavaProcessor
    return kind(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=template,
        image_token=processor.image_token,
    )
