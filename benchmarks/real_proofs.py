"""What the toolkit promises, each promise run on published weights by the commands that users type.

    python benchmarks/real_proofs.py --tower data/real/dinov2 --language-model data/real/smollm2 --pictures FOLDER \
        --out outputs/proofs [--gguf model.gguf …] [--only parity resume …]

Trains a few steps on PNG files of a folder, and prints one line for each promise: the figure, CPU seconds of all
processes and the memory of the largest at its peak. `OUT/proofs.json` is written after each; what stands there is not
run again. Exit code 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from proof_commands import BATCH, LAUNCH, NAMES, QUESTIONS, ROOT, TOOL, TRAIN, Proofs


def parity(proofs: Proofs) -> tuple[bool, str]:
    """Bundle reloaded in a fresh process; and the second stage begins with the projector of the first."""
    found = [number_after("largest difference of a logit", ran.text) for ran in proofs.stages()]
    return max(found) < 1e-4, f"largest difference of a logit: stage 1 {found[0]:.2g}, stage 2 from it {found[1]:.2g}"


def exports(proofs: Proofs) -> tuple[bool, str]:
    """Export with LoRA merged, with it kept beside (PEFT), and as a bundle; each compared in a fresh process."""
    said = []
    for name, options in {"merged": (), "kept": ("--keep-adapter",), "bundle": ("--to", "bundle-merged")}.items():
        out = proofs.out / f"export-{name}"
        shutil.rmtree(out, ignore_errors=True)
        text = " ".join(proofs.run(*TOOL, "export", proofs.bundle, out, *options).text.split())
        found = re.search(r"(?:at most|by) ([\d.e+-]+) \(allowed ([\d.e+-]+)\)", text)
        said.append(f"{name} {found[1]} (allowed {found[2]})" if found else f"{name}: {text[-80:]}")
    return True, "logits differ at most: " + ", ".join(said)


def resume(proofs: Proofs) -> tuple[bool, str]:
    """Killed with SIGKILL after its first save, gone on with `--resume`: the weights of a run never killed."""
    saves = {"sft": {"save_strategy": "steps", "save_steps": 2}, "init_from": str(proofs.bundle.parent / "stage1")}
    recipe, checkpoint = proofs.recipe("killed", **saves), proofs.out / "killed" / "checkpoint-2"
    killed = proofs.run(*TRAIN, recipe, kill=lambda: checkpoint.exists())
    if killed.code != -signal.SIGKILL:
        return False, "it ended before it was killed"
    proofs.run(*TRAIN, recipe, "--resume")
    worst = proofs.difference("stage2", "killed")
    return worst == 0, f"largest difference of a trained weight {worst:.2g}"


def bits(number: int) -> Callable[[Proofs], tuple[bool, str]]:
    """QLoRA on bitsandbytes, on this device; reloaded in a fresh process."""

    def prove(proofs: Proofs) -> tuple[bool, str]:
        ran = proofs.train(f"bits{number}", quantization={f"load_in_{number}bit": True}, sft={"max_steps": 2})
        found = number_after("largest difference of a logit", ran.text)
        losses = [float(each) for each in re.findall(r"step \d+/\d+: loss ([\d.]+)", ran.text)]
        return found < 1e-3, f"losses {losses}, reloaded: largest difference of a logit {found:.2g}"

    return prove


def processes(proofs: Proofs) -> tuple[bool, str]:
    """Two processes, with DDP and with FSDP2, learn what one does of the same batches; their bundles load."""
    same: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    proofs.train("alone", sft=same)
    sharded = {**yaml.safe_load((ROOT / "accelerate_configs/fsdp2.yaml").read_text()), "use_cpu": True}
    (proofs.out / "fsdp2_cpu.yaml").write_text(yaml.safe_dump(sharded))
    # accelerate does not enter FSDP without a GPU; the tests' driver opens that door alone.
    programs = {
        "DDP": (ROOT / "accelerate_configs/cpu_2.yaml", "-m", "vlm_sft.train"),
        "FSDP2": (proofs.out / "fsdp2_cpu.yaml", ROOT / "tests/support/distributed_driver.py"),
    }
    holds, said = True, []
    for name, (config, *program) in programs.items():
        recipe = proofs.recipe(name, sft={**same, "per_device_train_batch_size": BATCH // 2})
        ran = proofs.run(*LAUNCH, config, "--num_processes", "2", "--main_process_port", "0", *program, recipe)
        worst = relative(proofs.losses("alone"), proofs.losses(name))
        reloaded, weights = number_after("largest difference of a logit", ran.text), proofs.difference("alone", name)
        holds &= worst < 1e-4 and reloaded < 1e-3
        said.append(f"{name} losses {worst:.1g}, weights {weights:.1g}, reloaded {reloaded:.1g}")
    return holds, "largest difference from one process (losses relative): " + "; ".join(said)


def checkpointing(proofs: Proofs) -> tuple[bool, str]:
    """Layers computed again in the backward pass: the losses and weights of a run that keeps them."""
    peaks = [
        proofs.train(name, sft={"activation_checkpointing": again}).peak
        for name, again in (("kept", False), ("again", True))
    ]
    worst, weights = relative(proofs.losses("kept"), proofs.losses("again")), proofs.difference("kept", "again")
    said = (
        f"losses differ by {worst:.1g}, weights by {weights:.1g}; peak {peaks[0]:,.0f} MB without, {peaks[1]:,.0f} with"
    )
    return worst < 1e-5, said


def chat(proofs: Proofs) -> tuple[bool, str]:
    """`chat` says what the bundle was taught: a question on the command line, and the conversation through a pipe."""
    ran = proofs.run(*TOOL, "chat", proofs.taught, QUESTIONS[0], "--image", proofs.pictures[0])
    typed = "".join(f"/reset\n/image {proofs.pictures[i]}\n{question}\n" for i, question in enumerate(QUESTIONS))
    (proofs.out / "typed.txt").write_text(typed, encoding="utf-8")
    line = f"{TOOL[0]} chat {proofs.taught} < {proofs.out / 'typed.txt'} 2> {proofs.out / 'chat.err'}"
    piped = proofs.run("sh", "-c", line).text.strip().splitlines()
    said = list(zip((NAMES[0], *NAMES), (ran.text.strip().splitlines()[-1], *piped), strict=True))
    return all(name == answer for name, answer in said), "; ".join(f"{name} → {answer}" for name, answer in said)


def serve(proofs: Proofs) -> tuple[bool, str]:
    """OpenAI's client asks `transformers serve` about the export; the bundle's own answers, whole and in pieces."""
    from openai import OpenAI

    folder = proofs.out / "served"
    shutil.rmtree(folder, ignore_errors=True)
    proofs.run(*TOOL, "export", proofs.taught, folder / "taught")
    said = []
    with proofs.server(folder) as address:
        client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
        for i, name in enumerate(NAMES):
            picture = base64.b64encode(proofs.pictures[i].read_bytes()).decode()
            image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
            content = [image, {"type": "text", "text": QUESTIONS[i]}]
            ask: dict[str, Any] = {"model": "taught", "messages": [{"role": "user", "content": content}]}
            ask |= {"max_tokens": 24, "temperature": 0}
            whole = client.chat.completions.create(**ask).choices[0].message.content or ""
            chunks = [
                each.choices[0].delta.content or "" for each in client.chat.completions.create(**ask, stream=True)
            ]
            said.append((name, whole.strip(), "".join(chunks).strip(), sum(map(bool, chunks))))
    holds = all(name == whole == streamed and pieces > 1 for name, whole, streamed, pieces in said)
    return holds, "; ".join(f"{name} → {whole}, streamed {streamed}" for name, whole, streamed, _ in said)


def preflight(proofs: Proofs) -> tuple[bool, str]:
    """The page of `preflight`: nothing wrong found, pictures shown, every trained tensor seen to move."""
    page = proofs.out / "preflight.html"
    recipe = proofs.recipe("preflight")
    ran = proofs.run(*TOOL, "preflight", recipe, "--output", page)
    html = page.read_text(encoding="utf-8")
    pictures = html.count("data:image/")
    apart = re.findall(r"<(?:script|link)|(?:src|href)=.https?:", html)
    text = unescape(re.sub(r"<[^>]*>", "", html))
    (moved,) = re.findall(r"已更新张量\s*(\d+ of \d+)", text)
    (still,) = re.findall(r"逐位不变\s*(\d+ of \d+)", text)
    holds = pictures > 0 and not apart and all(question in text for question in QUESTIONS)
    said = f"{len(html) / 1e3:,.0f} kB, {pictures} pictures; trained tensors moved: {moved}, frozen ones still: {still}"
    return holds and "Nothing found" in text and ran.code == 0, said


def memory(proofs: Proofs) -> tuple[bool, str]:
    """What `--dry-run` says of rows as long as the longest against the resident memory of the process at its peak."""
    recipe = proofs.recipe("memory", sft={"max_steps": 2})
    (longest,) = re.findall(r"([\d,]+) at most", proofs.run(*TRAIN, recipe, "sft.max_steps=1").text)
    shutil.rmtree(proofs.out / "memory")
    length = f"sft.max_length={longest.replace(',', '')}"
    estimate = most_of(proofs.run(*TRAIN, recipe, length, "--dry-run").text)
    bare = proofs.run(
        sys.executable, "-c", "import vlm_sft, trl, peft, torch, transformers; from trl import SFTTrainer"
    )
    real = proofs.run(*TRAIN, recipe, length).peak - bare.peak
    return (
        0.5 < estimate / real < 2,
        f"estimate {estimate:,.0f} MB, real {real:,.0f} MB beyond the libraries' {bare.peak:,.0f}",
    )


def gguf(proofs: Proofs) -> tuple[bool, str]:
    """Language models in GGUF files: three steps, saved, reloaded in a fresh process."""
    said, worst = [], 0.0
    for file in proofs.given.gguf:
        template = "chatml" if "smol" in file.name.lower() else "plain"
        stack = yaml.safe_load(proofs.recipe("gguf").read_text())["stack"]
        stack["language_model"] = {"pretrained": str(file.resolve())}
        ran = proofs.train(f"gguf-{file.stem}", stack=stack, chat_template=template, sft={"max_steps": 3})
        found = number_after("largest difference of a logit", ran.text)
        worst = max(worst, found)
        losses = [round(loss, 2) for loss in proofs.losses(f"gguf-{file.stem}")]
        said.append(f"{file.name} {found:.2g} after losses {losses}")
    return bool(said) and worst < 1e-4, "largest difference of a logit: " + ", ".join(said)


PROOFS: dict[str, Callable[[Proofs], tuple[bool, str]]] = {
    "parity": parity,
    "exports": exports,
    "resume": resume,
    "4 bits": bits(4),
    "8 bits": bits(8),
    "processes": processes,
    "checkpointing": checkpointing,
    "chat": chat,
    "serve": serve,
    "preflight": preflight,
    "memory": memory,
    "gguf": gguf,
}


def relative(one: list[float], other: list[float]) -> float:
    """Largest difference of two lists of losses, as a share of the first's."""
    assert len(one) == len(other) and one, (one, other)
    return max(abs(ours - theirs) / ours for ours, theirs in zip(one, other, strict=True))


def most_of(text: str) -> float:
    """MB at any moment, as a dry run says it."""
    number, unit = re.findall(r"most at any moment ([\d.]+) (MiB|GiB)", " ".join(text.split()))[0]
    return float(number) * {"GiB": 1073.7, "MiB": 1.0486}[unit]


def number_after(words: str, text: str) -> float:
    """The number behind these words, in a text that may be broken into lines."""
    found = re.search(re.escape(words) + r" ([\d.]+(?:e[+-]?\d+)?)", " ".join(text.split()))
    assert found, text[-2000:]
    return float(found[1].rstrip("."))


def main(arguments: list[str] | None = None) -> int:
    """Runs the proofs that are asked for; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="folder of DINOv2, or of another tower")
    parser.add_argument("--language-model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder with PNG files, also below it")
    parser.add_argument("--image-size", type=int, default=112, help="pixels; fewer take less time")
    parser.add_argument("--out", type=Path, default=Path("outputs/proofs"))
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="+", choices=PROOFS)
    given = parser.parse_args(arguments)
    for name in ("tower", "language_model", "pictures"):
        setattr(given, name, getattr(given, name).resolve())
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    proofs, report = Proofs(given), given.out / "proofs.json"
    done = json.loads(report.read_text()) if report.exists() else {}
    for name in given.only or PROOFS:
        if name not in done or given.only:
            proofs.cpu, proofs.peak, proofs.commands = 0.0, 0.0, []
            try:
                holds, said = PROOFS[name](proofs)
            except Exception as error:
                holds, said = False, f"{type(error).__name__}: {error}"
            done[name] = {"holds": holds, "said": said, "cpu": round(proofs.cpu), "peak_mb": round(proofs.peak)}
            done[name]["commands"] = list(proofs.commands)
            report.write_text(json.dumps(done, indent=1, ensure_ascii=False), encoding="utf-8")
        each = done[name]
        print(
            f"| {name} | {'yes' if each['holds'] else 'NO'} | {each['said']} | {each['cpu']} | {each['peak_mb']:,} |",
            flush=True,
        )
    return 0 if all(each["holds"] for each in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
