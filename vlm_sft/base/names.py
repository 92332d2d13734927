"""What things are called, wherever they are written down: parts and inputs of a model, marks in rows, files, and the
types of what has names and values alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
"""A row of a dataset: its `messages`, its `images` and what stands beside them, as `ROW_FEATURES` types them."""

ImageEntry: TypeAlias = dict[str, Any]
"""An image, a video or a frame, as a row has it: `path` and `bytes`, one of them None, and what says more of it."""

Record: TypeAlias = dict[str, Any]
"""What is written of one question and its answer; docs/evaluation.md has the keys."""

Inputs: TypeAlias = dict[str, Any]
"""What a model's forward takes, by name: tensors, and what a collator says beside them."""

Options: TypeAlias = dict[str, Any]
"""Arguments by name, for a library's function that judges them itself."""

Json: TypeAlias = dict[str, Any]
"""An object of a JSON or YAML file: one that was read and not yet judged, or one to be written."""

Values: TypeAlias = Mapping[str, Any]
"""The same where it is only read: a file's row, the settings of others, what a template is filled with."""

PARTS = ("vision_tower", "resampler", "projector", "language_model")
"""In the order an image passes them: recipe keys, attributes of the model, rows of tables."""

ENCODER_PARTS = ("vision_tower", "text_encoder", "fusion", "head")
"""Of an encoder; of one that writes its answers, the head is its decoder."""

ALL_PARTS = (*PARTS, *(part for part in ENCODER_PARTS if part not in PARTS))
"""Those of every kind of model, for tables that are not of one."""

WHOLES = ("model", "encoder")
"""Keys of a recipe for a model that is one piece, in place of the parts of a stack; also what that piece is called."""

IMAGE_TOKEN = "<image>"
"""Stands for an image, in the text of a row and in that of a rendered conversation."""

VIDEO_TOKEN = "<video>"
"""Stands for a video, in the text of a row; a conversation has its frames in its place."""

GROUPED = "group_by_length"
"""The value of `sft.train_sampling_strategy` with which rows of similar length come together."""

IGNORED = -100
"""The label of a token that is not in the loss, as torch's cross entropy has it."""

INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")
"""What a batch holds for a resampler that reads the instruction too (InstructBLIP): (N, L) each, one row an image."""

ROW_LENGTHS = "row_lengths"
"""What a batch of packs holds in place of an attention mask: (B, R) tokens of each row, 0 where a pack has fewer."""

ROW_HEADS = "row_heads"
"""What it holds beside them where rows share the prefix that has their image: (B, R) number of each one's prefix, or
its own. The prefix counts as a row there, and the rest of each row as another."""

MANIFEST = "bundle.json"
"""Makes a folder a bundle: its pieces, what is trained, the ledger, versions; written last."""

RECIPE, TEMPLATE, TRAINED = "recipe.yaml", "chat_template.jinja", "trained.safetensors"
"""Of a bundle: the resolved recipe, the chat template, and the trained tensors that are not LoRA's."""

ANSWER_LIST = "answer_list.json"
"""Of the bundle of an encoder that chooses its answers: these, in the order of its head."""

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""LoRA, as PEFT names its files."""

CARD, METRICS, CURVES, SCORES = "README.md", "metrics.json", "curves.png", "eval.json"
"""What a bundle tells a reader: the model card, the numbers of its training, their curves, what `evaluate` found."""

EVALUATION, ERROR_PAGE = "evaluation", "evaluation.html"
"""Folder of a bundle with the answers that `evaluate` wrote down, and the page in it that shows them."""

HISTORY, RUN_FACTS, RUN_PAGE = "history.jsonl", "run.json", "run.html"
"""Of a run: its numbers, a line at each log; what is fixed of it; and the page that `vlm-sft watch` makes of both."""

FORGETTING = "forgetting.json"
"""In the folder of the answers: what the language model forgot of texts without pictures."""

STRANGE_STEPS = "watch.jsonl"
"""Of a run: the steps that went wrong."""

SAMPLES = "samples.jsonl"
"""Of a run: what it answered to a few rows at each evaluation."""

RUN_LOCK = ".run.lock"
"""Of a run that is going on: which process writes to the folder."""

PREFLIGHT_PAGE = "preflight.html"
"""What `vlm-sft preflight` writes."""

CHECKPOINT_FILES = "checkpoint.json"
"""Of a checkpoint: its files and their sizes."""

EXPORT_REPORT = "export.json"
"""Makes a folder an export: what it was made from and how its logits were compared."""

CONFIG, PROCESSOR_CONFIG = "config.json", "processor_config.json"
"""Of a checkpoint of transformers."""
