"""What things are called, wherever they are written down: parts and inputs of a model, marks in rows, files."""

from __future__ import annotations

PARTS = ("vision_tower", "resampler", "projector", "language_model")
"""In the order an image passes them: recipe keys, attributes of the model, rows of tables."""

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
