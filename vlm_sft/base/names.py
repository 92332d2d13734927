"""What things are called, wherever they are written down: the parts of a model, marks in rows, inputs of the model."""

from __future__ import annotations

PARTS = ("vision_tower", "resampler", "projector", "language_model")
"""In the order an image passes them: recipe keys, attributes of the model, rows of tables."""

IMAGE_TOKEN = "<image>"
"""Stands for an image, in the text of a row and in that of a rendered conversation."""

IGNORED = -100
"""The label of a token that is not in the loss, as torch's cross entropy has it."""

INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")
"""What a batch holds for a resampler that reads the instruction too (InstructBLIP): (N, L) each, one row an image."""
