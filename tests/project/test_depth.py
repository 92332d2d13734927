"""Few frames of ours lie between the command and the model: a traceback shows what runs, not who hands it on."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from support.paths import ROOT
from vlm_sft.model.modeling import VLMForConditionalGeneration
from vlm_sft.train import main


class ArrivedError(Exception):
    """The model is reached."""


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "lora"])
def test_at_most_six_frames_of_ours_lead_from_the_command_to_the_models_forward(lora, recipe_file, monkeypatch):
    def forward(self, *args, **kwargs):
        raise ArrivedError

    monkeypatch.setattr(VLMForConditionalGeneration, "forward", forward)
    with pytest.raises(ArrivedError) as arrived:
        main([str(recipe_file(lora=lora, chat_template="ziya")), "sft.max_steps=1"])
    frames = [
        frame.name
        for frame in traceback.extract_tb(arrived.tb)
        if Path(frame.filename).is_relative_to(ROOT / "vlm_sft")
    ]
    assert frames[0] == "main" and frames[-1] == "compute_loss"
    assert len(frames) + 1 <= 6, [*frames, "forward"]
