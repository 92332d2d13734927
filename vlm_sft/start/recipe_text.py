"""The recipe that `init` writes: every line with the reason for it, in the language that was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..base.names import Options
from ..base.words import gib
from ..rows.formats import FORMATS
from .models import Plan

PROMPTS = {
    "en": ["Describe this picture.", "What does this picture show?", "Write a caption for this picture."],
    "zh": ["描述这张图片。", "这张图片里有什么？", "为这张图片写一段说明。"],
}
Prompts: TypeAlias = list[str] | Mapping[str, list[str]]
"""Questions, or those of each language."""

MOST_NAMED = 20  # classes that a question names
NEW_TOKENS = {"caption": 128, "classify": 16, "answer": 64, "talk": 256}
# What the comments say: English, Chinese.
SAYS = {
    "title": ("{name}: LoRA on {model}, learned from {source}.", "{name}：用 {source} 在 {model} 上训练 LoRA。"),
    "by": ("Written by `vlm-sft init`; change what you like. Every key: docs/recipes.md.",
           "由 `vlm-sft init` 写成，可以随意修改。所有的键见 docs/recipes.md。"),
    "rows": ("{train} rows to train on, {validation} for evaluations while training, {test} for the test.",
             "{train} 行用于训练，{validation} 行用于训练中的评估，{test} 行用于测试。"),
    "sides": ("No picture, nor one that looks like it, is on two sides (seed {seed}).",
              "同一张或相似的图片不会出现在两边（随机种子 {seed}）。"),
    "license": ("licence: {license}", "许可证：{license}"),
    "pixels": ("A larger picture is scaled down: about {tokens} tokens each; raise it for documents and small print.",
               "更大的图片会被缩小：每张约 {tokens} 个 token；文档和小字请调大"),
    "four": ("the language model in 4 bits (QLoRA), because 16 bits do not fit here",
             "语言模型用 4 比特加载（QLoRA），因为这里放不下 16 比特"),
    "lora": ("on the language model; the vision tower stays as it is", "只训练语言模型上的 LoRA，视觉部分不变"),
    "eval": ("looked at while training", "训练中查看"),
    "test": ("asked by `vlm-sft evaluate`, once, at the end", "最后用 `vlm-sft evaluate` 问一次"),
    "prompts": ("what the user asks; one is drawn for each row", "用户的提问；每行抽取一个"),
    "output": ("the bundle: what was trained, to chat with and to share", "训练结果，可以对话和分享"),
    "rate": ("LoRA's; halve it if the loss jumps", "LoRA 的学习率；如果损失跳动就减半"),
    "warm": ("a share of all steps", "占全部步数的比例"),
    "epochs": ("how often every row is seen{hours}", "每行看几遍{hours}"),
    "hours": ("; about {hours} here", "；在这里大约需要 {hours}"),
    "batch": ("global batch: {rows} x {accumulation} accumulation x {count} process{es} = {all}{memory}",
              "总批量：{rows} × {accumulation} 次累积 × {count} 个进程 = {all}{memory}"),
    "memory": ("; about {memory} of memory", "；大约需要 {memory} 显存"),
    "length": ("tokens of a row at most, those of its picture included", "每行最多的 token 数，包括图片的"),
    "checkpoint": ("true: less memory for a third more time", "true：多用三分之一的时间，省下内存"),
    "strategy": ("and saved as often; `--resume` goes on from there", "并同样频繁地保存；`--resume` 从那里继续"),
    "generation": ("of answers, in chat, generate and evaluate", "对话、生成和评估时的回答"),
}  # fmt: skip


class Part(NamedTuple):
    """A source of one side.

    Attributes:
        side: `train`, `eval` or `test`.
        settings: Its keys, as a recipe has them.
    """

    side: str
    settings: Options


class Draft(NamedTuple):
    """What a recipe is made of.

    Attributes:
        name: Of the run.
        source: What it is learned from.
        language: Of comments and questions: `en` or `zh`.
        learn: What is learned, a key of `NEW_TOKENS`.
        plan: How.
        parts: The sources.
        counts: Side (train, validation, test) → rows.
        seed: That drew the sides.
        processes: That train together.
        workers: That read pictures.
        checkpointing: Whether activations are computed once more in place of kept.
        hours: That training may take.
    """

    name: str
    source: str
    language: str
    learn: str
    plan: Plan
    parts: Sequence[Part]
    counts: dict[str, int]
    seed: int
    processes: int
    workers: int
    checkpointing: bool
    hours: float


def prompts_of(learn: str, language: str, labels: Sequence[str], mixed: bool) -> Prompts:
    """What the user asks of rows that have an answer and no question.

    Args:
        learn: `caption` or `classify`.
        language: `en` or `zh`.
        labels: The classes.
        mixed: Whether rows are of English and Chinese alone, each of which is then asked in its own.
    """
    if learn != "classify":
        return PROMPTS if mixed else PROMPTS[language]
    listed = ("、" if language == "zh" else ", ").join(labels)
    named = len(labels) <= MOST_NAMED and not any(mark in listed for mark in ("${", "{question}", "<image>"))
    if language == "zh":
        return [f"图中是什么？只回答其中一个：{listed}。" if named else "图中是什么？只回答名称。"]
    return [f"What is this? Answer with one of: {listed}." if named else "What is this? Answer with its name alone."]


def recipe_text(draft: Draft) -> str:
    """The recipe."""
    plan, known = draft.plan, draft.plan.known

    def says(key: str, **values: object) -> str:
        return SAYS[key][draft.language == "zh"].format(**values)

    counts = {side: f"{count:,}" for side, count in draft.counts.items()}
    lines = [
        f"# {says('title', name=draft.name, model=plan.pretrained, source=draft.source)}",
        f"# {says('by')}",
        "",
        "model:",
        f"  pretrained: {_quoted(plan.pretrained)}" + (f" # {says('license', license=known.license)}" if known else ""),
    ]
    if known is not None and known.max_pixels:
        lines += [f"  # {says('pixels', tokens=known.tokens)}", f"  processor: {{max_pixels: {known.max_pixels}}}"]
    if plan.four_bits:
        lines += [
            "",
            f"quantization: # {says('four')}",
            "  load_in_4bit: true",
            "  bnb_4bit_quant_type: nf4",
            "  bnb_4bit_use_double_quant: true",
            "  bnb_4bit_compute_dtype: bfloat16",
        ]
    lines += ["", f"lora: {{r: 16, lora_alpha: 32, lora_dropout: 0.05}} # {says('lora')}"]
    lines += ["", f"# {says('rows', **counts)}", f"# {says('sides', seed=draft.seed)}", "data:"]
    noted: list[Any] = []
    for side in ("train", "eval", "test"):
        lines.append(f"  {side}:" + (f" # {says(side)}" if side != "train" else ""))
        for settings in (part.settings for part in draft.parts if part.side == side):
            for number, (key, value) in enumerate(settings.items()):
                lead = "    - " if number == 0 else "      "
                if key == "prompts":
                    lines += _prompts(value, noted, says("prompts"))
                else:
                    lines.append(f"{lead}{key}: {_quoted(value)}")
    return "\n".join([*lines, "", *_training(draft, says)]) + "\n"


def _prompts(value: Prompts, noted: list[Prompts], note: str) -> list[str]:
    """Questions, written out once; where they stand again, a reference to them."""
    if value in noted:
        return [f"      prompts: *prompts_{noted.index(value) + 1}"]
    noted.append(value)
    lines = [f"      prompts: &prompts_{len(noted)} # {note}"]
    if isinstance(value, list):
        return lines + [f"        - {_quoted(each)}" for each in value]
    for language, texts in value.items():
        lines += [f"        {language}:", *(f"          - {_quoted(each)}" for each in texts)]
    return lines


def _training(draft: Draft, says: Callable[..., str]) -> list[str]:
    plan, known = draft.plan, draft.plan.known
    hours = "" if plan.hours is None else says("hours", hours=_time(plan.hours, draft.language == "zh"))
    memory = "" if plan.memory is None else says("memory", memory=gib(int(plan.memory)))
    epochs = f"{plan.epochs:g}"
    batch = says("batch", rows=plan.rows, accumulation=plan.accumulation, count=draft.processes,
                 es="" if draft.processes == 1 else "es", all=plan.rows * plan.accumulation * draft.processes,
                 memory=memory)  # fmt: skip
    often = ("epoch", []) if plan.epochs >= 1 else ("steps", ["  eval_steps: 0.25", "  save_steps: 0.25"])
    return [
        "sft:",
        f"  output_dir: {_quoted('outputs/' + draft.name)} # {says('output')}",
        f"  learning_rate: 1.0e-4 # {says('rate')}",
        "  lr_scheduler_type: cosine",
        f"  warmup_steps: 0.03 # {says('warm')}",
        f"  num_train_epochs: {epochs} # {says('epochs', hours=hours)}",
        f"  per_device_train_batch_size: {plan.rows} # {batch}",
        f"  gradient_accumulation_steps: {plan.accumulation}",
        f"  per_device_eval_batch_size: {plan.rows}",
        f"  max_length: {known.length if known else 2048} # {says('length')}",
        f"  activation_checkpointing: {str(draft.checkpointing).lower()} # {says('checkpoint')}",
        f"  dataloader_num_workers: {draft.workers}",
        "  logging_steps: 10",
        f"  eval_strategy: {often[0]} # {says('strategy')}",
        f"  save_strategy: {often[0]}",
        *often[1],
        "  save_total_limit: 2",
        f"  seed: {draft.seed}",
        "  report_to: tensorboard",
        "",
        f"generation: {{max_new_tokens: {NEW_TOKENS[draft.learn]}, do_sample: false}} # {says('generation')}",
    ]


def _time(hours: float, chinese: bool) -> str:
    if hours < 1:
        minutes = max(1, round(hours * 60))
        return f"{minutes} 分钟" if chinese else f"{minutes} min"
    return f"{hours:.3g} 小时" if chinese else f"{hours:.3g} h"


def _quoted(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_quoted(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_quoted, value)) + "]"
    return value if value in FORMATS else json.dumps(value, ensure_ascii=False)
