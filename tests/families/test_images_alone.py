"""Processors without their parts for videos and sounds: whatever their order, and saved as what they are."""

from __future__ import annotations

import json

from transformers import Gemma4Processor, LlavaNextVideoProcessor, LlavaProcessor

from support.tiny_families import tiny
from vlm_sft.families.images_alone import images_alone


def test_what_reads_images_alone_stays_as_it_is():
    assert images_alone(LlavaProcessor) is LlavaProcessor


def test_other_parts_are_left_out_wherever_they_stand():
    assert images_alone(LlavaNextVideoProcessor).get_attributes() == ["image_processor", "tokenizer"]
    kind = images_alone(Gemma4Processor)
    assert kind.get_attributes() == ["image_processor", "tokenizer"]
    read = kind.from_pretrained(tiny("gemma4"), backend="pil")
    assert type(read.image_processor).__name__ == "Gemma4ImageProcessorPil" and read.image_seq_length == 70
    assert read.feature_extractor.sampling_rate is None and read.video_processor.fps is None


def test_it_is_saved_under_its_own_name(tmp_path):
    images_alone(Gemma4Processor).from_pretrained(tiny("gemma4"), backend="pil").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Gemma4Processor" and not {"video_processor", "feature_extractor"} & set(saved)
