"""The fresh process that loads an export as anyone would, with transformers alone, and compares it with the bundle.

`python -m vlm_sft.export.check EXPORT PROBE` prints what differs as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from ..base.console import tell
from ..base.errors import UserError, exit_on_user_error
from ..base.names import PROCESSOR_CONFIG, Inputs, Json
from ..base.progress import telling
from ..base.whole_files import read_text
from ..batch.counts import ANSWERS
from ..model.parts import passes
from ..rows.messages import Message
from ..stack.judge import measure
from ..templates.serve import bounded

ADAPTER_FOLDER = "adapter"
PROBE, PICTURE, CONVERSATION = "probe.safetensors", "picture.png", "messages.json"
QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this? 这是什么？"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red 3 红色"}]},
    {"role": "user", "content": [{"type": "text", "text": "And now? 还有呢？"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a blue 7"}]},
]


def noise_picture() -> Image.Image:
    """A picture that is neither square nor of one colour, the same every time."""
    noise = torch.randint(0, 256, (60, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy())


@torch.inference_mode()
def compare(export: Path, probe: Path) -> Json:
    """Loads the export in fp32, sends the probe's messages through its processor, and compares ids, pixels, logits.

    Of what is returned, `logits` (against what was to be written) and `bundle` (against the bundle) are for `judge`.
    """
    wanted = load_file(probe / PROBE)
    messages = json.loads(read_text(probe / CONVERSATION))
    processor = read_processor(export)
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32)
    if (export / ADAPTER_FOLDER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, export / ADAPTER_FOLDER)
    text, inputs = inputs_of(processor, messages, [Image.open(probe / PICTURE).convert("RGB")])
    for name, value in inputs.items():
        if value.is_floating_point():  # Llama 4's processor gives bfloat16
            inputs[name] = value.float()
    if ANSWERS in wanted:  # what a decoder has read; a processor makes prompts alone
        inputs[ANSWERS] = wanted[ANSWERS]
    same_ids = all(inputs[name].tolist() == wanted[name].tolist() for name in wanted if name.endswith("input_ids"))
    result: Json = {"text": text, "ids": same_ids, "positions": wanted["logits"].shape[1]}
    result["chats"] = bool(processor.chat_template)
    if same_ids:
        with passes(model):
            logits = model.eval()(**inputs).logits
        images = [name for name in wanted if name.startswith("pixel_values")]
        result["pixels"] = max(float((inputs[name] - wanted[name]).abs().max()) for name in images)
        result["logits"] = measure(wanted["logits"], logits, wanted.get("without"))
        result["bundle"] = measure(wanted.get("bundle", wanted["logits"]), logits)
    return result


def read_processor(export: Path) -> ProcessorMixin:
    """The export's processor with PIL's images; one that also takes videos needs torchvision, and is read without."""
    name = json.loads(read_text(export / PROCESSOR_CONFIG))["processor_class"]
    kind = getattr(transformers, name)
    if "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(export, backend="pil")
    from ..families.images_alone import images_alone

    return images_alone(kind).from_pretrained(export, backend="pil")


def is_prompt(messages: list[Message]) -> bool:
    """Whether a conversation ends with the user, so that an answer comes next."""
    return messages[-1]["role"] == "user"


def inputs_of(processor: ProcessorMixin, messages: list[Message], images: list[Image.Image]) -> tuple[str, Inputs]:
    """(prompt, what the model takes), as a user of transformers makes it.

    InstructBLIP's processor knows no conversations: the question by itself is the prompt. That of KOSMOS-2 has
    no chat template either, but takes what its tokenizer makes of one.
    """
    if hasattr(processor, "qformer_tokenizer"):
        text = next(part["text"] for part in messages[0]["content"] if part["type"] == "text")
        return text, processor(text=text, images=images, return_tensors="pt")
    writer = processor if processor.chat_template else processor.tokenizer
    try:
        with bounded():  # a template may do here what it did not do in our sandbox
            text = writer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt(messages))
    except MemoryError:
        raise UserError("its chat template takes too much memory (`limits.template_bytes`); do not use it.") from None
    special = not (processor.tokenizer.bos_token and text.startswith(processor.tokenizer.bos_token))
    return text, processor(text=text, images=images, return_tensors="pt", add_special_tokens=special)


if __name__ == "__main__":
    with exit_on_user_error():
        with telling():
            found = compare(Path(sys.argv[1]), Path(sys.argv[2]))
        tell(json.dumps(found))
