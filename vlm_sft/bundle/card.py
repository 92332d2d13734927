"""The README.md of a bundle: what it is, how it was made, how well it does, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .run_folder import MANIFEST

CARD = "README.md"
# What the numbers of `train_rows` and `eval_rows` count, where their keys do not say it.
COUNTS = {"longest": "tokens of the longest row", "mean_length": "tokens of a row, in the mean"}
COUNTS |= {"read": "read from the sources", "decoded": "with images decoded"}


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Writes the card of a bundle from what lies in the bundle; called again when an evaluation was added.

    Args:
        folder: The bundle.
        repo_id: What it is called on the Hub; default the folder's name.

    Returns:
        The path of the card.
    """
    import yaml

    folder = Path(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    sections = [
        f"---\n{yaml.safe_dump(_head(manifest, recipe), sort_keys=False)}---",
        f"# {repo_id or folder.resolve().name}",
        _sentence(manifest, recipe),
        _how_to_load(repo_id or shown(folder)),
        _stages(manifest),
        _pieces(manifest),
        _data(manifest),
        _results(folder),
        _measured_in_training(folder),
        _parity(manifest),
        _curves(folder),
        f"## Made with\n\n{versions}.",
        _recipe(recipe),
    ]
    path = folder / CARD
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path


def _head(manifest: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """What the Hub reads: with `base_model_relation: adapter` it lists the bundle under its base models."""
    head: dict[str, Any] = {"pipeline_tag": "image-text-to-text", "library_name": "vlm_sft", "tags": ["vlm_sft", "trl"]}
    if manifest["adapter"]:
        head["tags"].append("lora")
    # Pieces that lay in a folder have a path; the Hub takes ids alone.
    bases = sorted({piece["pretrained"] for piece in manifest["pieces"].values() if "path" not in piece})
    if bases:
        head |= {"base_model": bases, "base_model_relation": "adapter"}
    told = recipe.get("hub") or {}
    return head | {key: told[key] for key in ("license", "language") if told.get(key)}


def _how_to_load(name: str) -> str:
    return (
        "## Load it\n\n```python\nimport vlm_sft\n\n"
        f'model, processor = vlm_sft.load("{name}")\n'
        'conversation = {"messages": [{"role": "user", "content": [{"type": "image"}, '
        '{"type": "text", "text": "What is this?"}]}],\n                "images": ["photo.jpg"]}\n'
        "print(vlm_sft.answer(model, processor, [conversation])[0])\n```"
    )


def write_export_card(out: str | Path, bundle: str | Path, result: dict[str, Any]) -> Path:
    """Writes the card of an export: what it is, how to ask it, and how far its logits are from the bundle's.

    Args:
        out: The exported checkpoint.
        bundle: The bundle that it is from.
        result: What `export` found.

    Returns:
        The path of the card.
    """
    import yaml

    out = Path(out)
    manifest = json.loads((Path(bundle) / MANIFEST).read_text(encoding="utf-8"))
    head: dict[str, Any] = {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "tags": ["vlm_sft"]}
    bases = sorted({piece["pretrained"] for piece in manifest["pieces"].values() if "path" not in piece})
    if bases:
        head |= {"base_model": bases, "base_model_relation": "finetune"}
    name = shown(out.resolve())
    adapter = (out / "adapter").is_dir()
    lora = "its LoRA lies in `adapter/`, unmerged" if adapter else "LoRA merged" if manifest["adapter"] else "no LoRA"
    bits = " Training saw the base in fewer bits; here it is in full." if result["quantised_in_training"] else ""
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"A `{result['class']}` of transformers, exported from the bundle `{shown(Path(bundle).resolve())}` of "
        f"`vlm_sft` ({lora}; weights in {result['dtype']}; names as {result['to']} has them).{bits}",
        _asking(result, name, adapter),
        _pieces(manifest),
        f"## Parity\n\nLoaded by transformers alone in a fresh process, in fp32, the logits of {result['positions']} "
        f"positions differ from the bundle's, in fp32 with LoRA unmerged, by at most {result['max_difference']:.1e} "
        f"(allowed {result['tolerance']:.2g}). The processor gave the same tokens, and pixels that differ by at most "
        f"{result['pixels']:.1e}.",
    ]
    path = out / CARD
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path


def _asking(result: dict[str, Any], name: str, adapter: bool) -> str:
    """How to ask the export, by its target alone."""
    if result["to"] == "vllm":
        return (
            f"## Ask it\n\n```\nvllm serve {name}\n```\n\nOpenAI's clients know it as `{name}`; an image is a "
            "part `image_url` of the user's message."
        )
    messages = (
        'messages = [{"role": "user", "content": [{"type": "image", "path": "photo.jpg"},\n'
        '                                         {"type": "text", "text": "What is this?"}]}]\n'
    )
    peft = "from peft import PeftModel\n" if adapter else ""
    wrap = f'{{0}} = PeftModel.from_pretrained({{0}}, "{name}/adapter")\n' if adapter else ""
    if not result["chats"] and result["form"] != "instructblip":  # KOSMOS-2, whose tokenizer alone has a template
        return (
            f"## Ask it\n\n```python\n{peft}from PIL import Image\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'processor = AutoProcessor.from_pretrained("{name}")\n'
            f'model = AutoModelForImageTextToText.from_pretrained("{name}")\n{wrap.format("model")}'
            f"{messages}prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False)\n"
            'inputs = processor(images=Image.open("photo.jpg"), text=prompt, return_tensors="pt")\n'
            "print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))\n```"
        )
    asked = "messages"
    if result["form"] == "instructblip":  # whose processor takes a question
        messages, asked = "", 'images="photo.jpg", text="What is this?"'
    # BLIP's classes generate by their language model, which has not read the export's generation config.
    limit = ", max_new_tokens=64" if result["form"] in ("blip-2", "instructblip") else ""
    return (
        f"## Ask it\n\n```python\n{peft}from transformers import pipeline\n\n"
        f'asker = pipeline("image-text-to-text", model="{name}")\n{wrap.format("asker.model")}'
        f"{messages}"
        f'print(asker({asked}, return_full_text=False{limit})[0]["generated_text"])\n```'
    )


def shown(path: str | Path) -> str:
    """A path or Hub id as a card names it: without the folders of this machine."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return path.name if path.is_absolute() else str(path)


def without_folders(value: Any) -> Any:
    """The same mappings and lists, but of an absolute path the last part alone."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _sentence(manifest: dict[str, Any], recipe: dict[str, Any]) -> str:
    trained = [*manifest["trained"], *(["LoRA on the language model"] if manifest["adapter"] else [])]
    start = f" It starts from `{shown(recipe['init_from'])}`." if recipe.get("init_from") else ""
    named = recipe["chat_template"]  # an existing VLM has one of its own where the recipe names none
    template = f"`{Path(named).stem}`" if named else "that of the model, in `chat_template.jinja`"
    return (
        f"One stage of vision-language tuning with `vlm_sft`. Trained: {' and '.join(trained)}; everything else is "
        f"frozen and not in this folder. Chat template: {template}.{start}"
    )


def _stages(manifest: dict[str, Any]) -> str:
    rows = []
    for number, stage in enumerate(manifest.get("stages", ()), start=1):
        trained = [*stage["trained"], *(["LoRA"] if stage["adapter"] else [])]
        rows.append(f"| {number} | {stage['recipe'] or '–'} | {', '.join(trained)} | {', '.join(stage['data'])} |")
    return "## Stages\n\n| stage | recipe | trained | data |\n|---|---|---|---|\n" + "\n".join(rows) if rows else ""


def _pieces(manifest: dict[str, Any]) -> str:
    rows = [
        f"| {part} | `{shown(piece['pretrained'])}` | {piece.get('commit') or piece['revision'] or '–'} "
        f"| `{piece['fingerprint']}` |"
        for part, piece in manifest["pieces"].items()
    ]
    return "## Frozen pieces\n\n| part | from | revision | fingerprint |\n|---|---|---|---|\n" + "\n".join(rows)


def _data(manifest: dict[str, Any]) -> str:
    """The rows of each set: how many, how long, and what became of each source's (the ledger)."""
    sets = {key.removesuffix("_rows"): counts for key, counts in manifest.items() if key.endswith("_rows")}
    sections = []
    for name, counts in sets.items():
        rows = [
            f"| {COUNTS.get(key, key.replace('_', ' '))} | {value:,} |"
            for key, value in counts.items()
            if _is_number(value)
        ]
        sections.append(f"| {name} rows | number |\n|---|---|\n" + "\n".join(rows))
    for name, ledger in manifest.get("ledger", {}).items():
        rows = [_source(source, counts) for source, counts in ledger["sources"].items()]
        sections.append(
            f"| {name} source | read | used | shortened | left out |\n|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(["## Data", *sections]) if sections else ""


def _source(name: str, counts: dict[str, Any]) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts["rejected"].items()) or "–"
    return f"| {name} | {counts['read']:,} | {counts['used']:,} | {counts['truncated']:,} | {reasons} |"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _results(folder: Path) -> str:
    path = folder / "eval.json"
    if not path.is_file():
        return ""
    results = json.loads(path.read_text(encoding="utf-8"))
    names = {
        "caption_exact_match": "captions exactly right",
        "answer_accuracy": "answers exactly right",
        "answer_accuracy_blank_image": "the same with the image blanked",
    }
    rows = [f"| {words} | {results[key]:.1%} |" for key, words in names.items() if results.get(key) is not None]
    rows += [f"| answers: {kind} | {share:.1%} |" for kind, share in results["answer_accuracy_by_kind"].items()]
    if results.get("train_seconds"):
        rows.append(f"| seconds of training | {results['train_seconds']:g} |")
    return f"## Results on the {results['split']} set\n\n| what | value |\n|---|---|\n" + "\n".join(rows)


def _measured_in_training(folder: Path) -> str:
    """The last evaluation of the run."""
    path = folder / "metrics.json"
    history = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    evaluations = [row for row in history if "eval_loss" in row]
    if not evaluations:
        return ""
    names = {
        "eval_loss": "loss",
        "eval_token_accuracy": "token accuracy",
        "eval_image_use": "image use (loss with another image, less that with its own)",
    }
    last = evaluations[-1]
    rows = [f"| {words} | {last[key]:.4g} |" for key, words in names.items() if _is_number(last.get(key))]
    what = f"## Validation at step {last.get('step', '–')}"
    return f"{what}\n\n| what | value |\n|---|---|\n" + "\n".join(rows)


def _curves(folder: Path) -> str:
    if not (folder / "curves.png").is_file():
        return ""
    return "## Curves\n\n![Loss, accuracy, image use and throughput over the steps](curves.png)"


def _recipe(recipe: dict[str, Any]) -> str:
    """What the recipe says, without folders of this machine."""
    from ..recipe.yaml_file import dump_yaml

    text = dump_yaml(without_folders(recipe)).rstrip()
    return f"## Recipe\n\n<details><summary>recipe.yaml</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _parity(manifest: dict[str, Any]) -> str:
    parity = manifest.get("parity")
    if not parity:
        return ""
    return (
        f"## Parity\n\nReloaded in a fresh process, the logits of {parity['positions']} positions differ from the "
        f"trainer's by at most {parity['max_difference']:.1e} (allowed {parity['tolerance']:g})."
    )
