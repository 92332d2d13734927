"""The same rows through the same LLaVA by other trainers and by this toolkit, in alternation, with equal losses.

    python benchmarks/peers.py --sizes 25m 135m --rounds 4 --out outputs/benchmark_peers
    python benchmarks/peers.py --quick                      # the tiny size, one round: that it runs

`make bench` is the first, with `LLAMAFACTORY=/path/to/its/python` for LLaMA-Factory in an environment of its own (it
needs no torchvision). Each trainer is a process with one thread that loads a checkpoint of random weights and then
trains an epoch when its turn comes; rates are so small that weights hold still, so every epoch of everybody must have
the same loss. Where one has not, the program ends with an error. Seconds are those of the processor, without what comes
before the first step, so that what else runs on the machine counts little.

`allowed` is how much faster than one that scores every position a trainer may be by the products of weights alone: 2
FLOPs a weight and a place forward, 2 where a gradient passes, 2 where the weight learns; the head by the places that
are scored, padding included as it was trained on. `of the machine` is those FLOPs a second over the rate of a product
of two matrices.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch

sys.path.insert(0, str(Path(__file__).parent))
from peer_data import SIZES, make_checkpoint, make_rows, read_rows

STAGES = {"stage 1": ["projector"], "stage 2": ["projector", "language_model"]}
FIRST, PLAIN = "TRL", "plain loop"
PARTS = ("decode", "preprocess", "batches", "tower", "forward", "backward", "optimizer")
TOLERANCE = {False: 1e-4, True: 2e-2}  # of a loss, relative: in fp32, in bf16


@dataclass
class Way:
    """A trainer, and how it is told to train."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: float = 1.0  # of the rows a batch that others have
    bf16: bool = False
    equal: bool = True  # its loss is that of the others: no question sees another


SHARING = {"merge_by_image": True, "independent": True}


def ways(questions: int) -> dict[str, Way]:
    """Every way, by name; `questions` are those an image has."""
    packed = {"sft": {"packing": True}, "length": 512}
    return {
        FIRST: Way("trl"),
        PLAIN: Way("plain"),
        "LLaMA-Factory": Way("llamafactory"),
        "all positions": Way("vlm_sft", {"supervised": False}),
        "vlm_sft": Way("vlm_sft"),
        "+ by length": Way("vlm_sft", {"sft": {"train_sampling_strategy": "group_by_length"}}),
        "+ packing": Way("vlm_sft", packed, 0.25),
        "+ merged": Way("vlm_sft", {"source": {"merge_by_image": True}, "length": 1024}, 1 / questions, equal=False),
        "+ shared image": Way("vlm_sft", {"source": SHARING, "length": 1024}, 1 / questions),
        "+ cache": Way("vlm_sft", {"cache": True}),
        "+ packing, cache": Way("vlm_sft", {**packed, "cache": True}, 0.25),
        "+ compiled": Way("vlm_sft", {"sft": {"torch_compile": True}}),
        "+ packing, compiled": Way("vlm_sft", {**packed, "sft": {"packing": True, "torch_compile": True}}, 0.25),
        "+ bf16": Way("vlm_sft", bf16=True),
        "+ bf16, packing, cache": Way("vlm_sft", {**packed, "cache": True}, 0.25, bf16=True),
    }


class Runner:
    """A trainer in a process of its own: forked, where the environment is this one, so that imports are made once."""

    def __init__(self, name: str, way: Way, spec: dict[str, Any], python: str | None) -> None:
        self.name, self.way, self.spec = name, way, spec
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        Path(spec["out"]).mkdir(parents=True)
        log = os.open(Path(spec["out"]) / "log.txt", os.O_WRONLY | os.O_CREAT)
        pipes = f"{orders},{answers}"
        if python is None:
            context = multiprocessing.get_context("fork")
            process = context.Process(target=_forked, args=(way.kind, spec, pipes, log), daemon=True)
            process.start()
            self._gone: Callable[[], Any] = process.join
        else:
            clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            command = [python, str(Path(__file__).parent / "peer.py"), way.kind, json.dumps(spec)]
            environment = {**clean, "PACE_PIPES": pipes, "OMP_NUM_THREADS": "1"}
            self._gone = subprocess.Popen(
                command, stdout=log, stderr=log, pass_fds=(orders, answers), env=environment
            ).wait
        for end in (orders, answers, log):
            os.close(end)
        self._lines = os.fdopen(self._answers)

    def epoch(self) -> dict[str, float]:
        """Trains an epoch."""
        os.write(self._orders, b"go\n")
        if line := self._lines.readline():
            return json.loads(line)
        log = (Path(self.spec["out"]) / "log.txt").read_text(encoding="utf-8")
        raise SystemExit(f"{self.name} has ended:\n{log[-4000:]}")

    def end(self) -> None:
        """Ends the process."""
        with suppress(BrokenPipeError):
            os.write(self._orders, b"stop\n")
        self._gone()


def _forked(kind: str, spec: dict[str, Any], pipes: str, log: int) -> None:
    import peer

    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ["PACE_PIPES"] = pipes
    getattr(peer, kind)(spec)


def main(argv: list[str] | None = None) -> None:
    """Measures every size and stage in turn; writes results.json, table.md and speed.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "25m", "135m"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--questions", type=int, default=4, help="of an image, each a row")
    parser.add_argument("--words", type=int, default=30, help="of an answer, in the median")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="some ways")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--add", action="store_true", help="keep what results.json has of other sizes and stages")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_peers"))
    given = parser.parse_args(argv)
    if given.quick:
        given.sizes, given.stages, given.images, given.questions, given.rounds = ["tiny"], ["stage 1"], 4, 2, 1
        given.batch, given.words = 4, 8
        given.only = given.only or [FIRST, PLAIN, "vlm_sft", "+ packing, cache"]
    torch.set_num_threads(1)
    for once in ("peer", "trl", "vlm_sft.training.build_trainer"):  # for all that are forked
        importlib.import_module(once)
    rates = {False: rate_of(torch.float32), True: rate_of(torch.bfloat16)}
    results = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory(prefix="vlm_sft-bench-") as folder:
            make_checkpoint(size, Path(folder))
            make_rows(Path(folder), given.images, given.questions, given.words)
            for stage in given.stages:
                results += measure(given, size, stage, Path(folder), rates)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.add and (earlier := given.out / "results.json").is_file():
        new = {(r["size"], r["stage"]) for r in results}
        old = json.loads(earlier.read_text(encoding="utf-8"))["results"]
        results = [r for r in old if (r["size"], r["stage"]) not in new] + results
    asked = {name: value for name, value in vars(given).items() if name not in ("out", "llamafactory")}
    report = {"settings": asked, "torch": torch.__version__, "gflops": {str(k): v for k, v in rates.items()}}
    text = json.dumps({**report, "results": results}, indent=1)
    (given.out / "results.json").write_text(text + "\n", encoding="utf-8")
    kinds = dict.fromkeys((r["size"], r["stage"]) for r in results)
    table = "\n\n".join(table_of(results, *kind) for kind in kinds) + "\n"
    (given.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    draw(results, given.out / "speed.png")


def measure(
    given: argparse.Namespace, size: str, stage: str, folder: Path, rates: dict[bool, float]
) -> list[dict[str, Any]]:
    """Runs all ways in alternation, and compares them with the first."""
    chosen = {name: way for name, way in ways(given.questions).items() if not given.only or name in given.only}
    if not given.llamafactory:
        chosen.pop("LLaMA-Factory", None)
    side, patch = SIZES[size]["side"], SIZES[size]["patch"]
    runners = []
    for name, way in chosen.items():
        out = folder / f"{stage} {name}".replace(" ", "_").replace(",", "").replace("+", "with")
        batch = max(1, round(given.batch * way.batch))
        spec = {"folder": str(folder), "out": str(out), "learns": STAGES[stage], "batch": batch, "bf16": way.bf16,
                "options": way.options, "image_tokens": (side // patch) ** 2}  # fmt: skip
        runners.append(Runner(name, way, spec, given.llamafactory if way.kind == "llamafactory" else None))
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        for number in range(given.rounds + 1):  # the first warms up, and fills the cache
            found = {runner.name: runner.epoch() for runner in runners}
            check_losses(found, chosen)
            rounds += [found] if number else []
            print(size, stage, {name: round(each["seconds"], 2) for name, each in found.items()}, file=sys.stderr)
    finally:
        for runner in runners:
            runner.end()
    rows = len(read_rows(folder))
    return [summary(name, way, size, stage, rows, rounds, rates[way.bf16]) for name, way in chosen.items()]


def check_losses(found: dict[str, dict[str, float]], chosen: dict[str, Way]) -> None:
    """Ends the program where an epoch has another loss, or other supervised tokens, than the first one's."""
    first = next(iter(found.values()))
    for name, own in found.items():
        losses = [each["loss"] / each["supervised"] for each in (first, own)]
        wrong = chosen[name].equal and abs(losses[1] / losses[0] - 1) > TOLERANCE[chosen[name].bf16]
        if wrong or own["supervised"] != first["supervised"]:
            raise SystemExit(
                f"{name}: a loss of {losses[1]:.6f} over {own['supervised']:,} tokens, "
                f"where {next(iter(found))} has {losses[0]:.6f} over {first['supervised']:,}"
            )


def summary(
    name: str, way: Way, size: str, stage: str, rows: int, rounds: list[dict[str, dict[str, float]]], rate: float
) -> dict[str, Any]:
    """What the rounds say of one way."""
    own = [each[name] for each in rounds]
    best = min(own, key=lambda each: each["seconds"])
    ratios = [each[FIRST]["seconds"] / each[name]["seconds"] for each in rounds] if FIRST in rounds[0] else []
    work = flops(size, STAGES[stage], best, way.kind != "vlm_sft" or not way.options.get("supervised", True))
    base = rounds[0].get(FIRST)
    return {
        "size": size, "stage": stage, "way": name, "samples_per_second": rows / best["seconds"],
        "supervised_per_second": best["supervised"] / best["seconds"], "loss": best["loss"] / best["supervised"],
        "seconds": [each["seconds"] for each in own], "peak_mb": max(each["peak_mb"] for each in own),
        "faster": [min(ratios), statistics.median(ratios), max(ratios)] if ratios else None,
        "allowed": flops(size, STAGES[stage], base, True) / work if base else None,
        "of_the_machine": work / best["seconds"] / rate, "places": best["places"],
        "split": {part: best.get(part, 0.0) / best["seconds"] for part in PARTS},
    }  # fmt: skip


def flops(size: str, learns: list[str], counts: dict[str, float], scores_all: bool) -> float:
    """FLOPs of an epoch in the products of weights; see the top."""
    shape, lm, tower = SIZES[size], SIZES[size]["lm"], SIZES[size]["tower"]
    width, heads, wide = lm["hidden_size"], lm["num_attention_heads"], tower["hidden_size"]
    keys = width * lm.get("num_key_value_heads", heads) // heads
    layers = lm["num_hidden_layers"] * width * (2 * width + 2 * keys + 3 * lm["intermediate_size"])
    head, scored = lm["vocab_size"] * width, counts["places" if scores_all else "supervised"]
    of_tower = tower["num_hidden_layers"] * wide * (4 * wide + 2 * tower["intermediate_size"])
    patches = counts.get("pictures", 0.0) * (shape["side"] // shape["patch"]) ** 2
    each = 6 if "language_model" in learns else 4
    return each * (layers * counts["places"] + head * scored) + patches * (2 * of_tower + 6 * width * (wide + width))


def rate_of(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOPs a second of this machine's product of two matrices, in one thread: the best of some."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, until = float("inf"), time.process_time() + seconds
    while time.process_time() < until:
        began = time.process_time()
        a @ b
        best = min(best, time.process_time() - began)
    return 2 * size**3 / best


def over(results: list[dict[str, Any]], one: dict[str, Any], other: str) -> float | None:
    """How much faster one way is than another, by name, of its size and stage: the median of the rounds."""
    kind = (one["size"], one["stage"], other)
    found = next((r for r in results if (r["size"], r["stage"], r["way"]) == kind), None)
    pairs = zip(found["seconds"], one["seconds"], strict=True) if found else ()
    return statistics.median(theirs / ours for theirs, ours in pairs) if found else None


def table_of(results: list[dict[str, Any]], size: str, stage: str) -> str:
    """Markdown."""
    lines = [
        f"**{size}, {stage}**", "",
        "| way | samples/s | supervised tokens/s | faster than TRL | least – most | than the plain loop | allowed | "
        "of the machine | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    own = [each for each in results if (each["size"], each["stage"]) == (size, stage)]
    for r in own:
        least, middle, most = r["faster"] or (0.0, 0.0, 0.0)
        lines.append(
            f"| {r['way']} | {r['samples_per_second']:.3g} | {r['supervised_per_second']:,.0f} | {middle:.2f} × | "
            f"{least:.2f} – {most:.2f} | {over(results, r, PLAIN) or 0:.2f} × | {r['allowed'] or 0:.2f} × | "
            f"{100 * r['of_the_machine']:.0f} % | {r['peak_mb']:,.0f} MB |"
        )
    lines += ["", "| way | " + " | ".join(PARTS) + " | else |", "|---" * (len(PARTS) + 2) + "|"]
    for r in own:
        shares = r["split"]
        rest = 1 - sum(shares[name] for name in ("batches", "forward", "backward", "optimizer"))
        parts = [*(shares[name] for name in PARTS), max(rest, 0.0)]
        lines.append(f"| {r['way']} | " + " | ".join(f"{100 * share:.0f} %" for share in parts) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of how much faster than TRL each way is, with their spread; a mark where the plain loop's rate would be."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((r["size"], r["stage"]) for r in results))
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.6 * columns, 3.7 * lines), squeeze=False)
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    for axis, (size, stage) in zip(axes.flat, kinds, strict=False):
        own = [r for r in results if (r["size"], r["stage"]) == (size, stage) and r["faster"]][::-1]
        names, middle = [r["way"] for r in own], [r["faster"][1] for r in own]
        spread = [[r["faster"][1] - r["faster"][0] for r in own], [r["faster"][2] - r["faster"][1] for r in own]]
        grey = [name in (FIRST, PLAIN, "LLaMA-Factory") for name in names]
        axis.barh(names, middle, xerr=spread, color=["#b8b8b8" if each else "#3b6ea5" for each in grey], height=0.7)
        plain = next((r["faster"][1] for r in own if r["way"] == PLAIN), 1.0)
        limits = [r["allowed"] * plain for r in own]
        what = "its products at the plain loop's rate"
        axis.plot(limits, names, linestyle="", marker="|", markersize=13, color="#c0392b", label=what)
        axis.set_title(f"{size}, {stage}", loc="left")
        axis.set_xlabel("times as fast as TRL (samples a second of processor time)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
