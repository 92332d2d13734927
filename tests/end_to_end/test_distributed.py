"""Two processes learn what one learns, whatever engine holds the weights, and neither waits for ever for the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.paths import ROOT, accelerate_config
from support.tiny_families import encoded, tiny
from vlm_sft import load_recipe
from vlm_sft.bundle.run_folder import read_lines
from vlm_sft.families.table import FAMILIES
from vlm_sft.train import train

DRIVER = ROOT / "tests" / "support" / "distributed_driver.py"

# fp32 on a CPU: sums are added up in another order by two processes, and Adam's division makes the most of it.
WEIGHTS = {"atol": 5e-6, "rtol": 0.0}
LOSS = {"rel": 1e-5}


@pytest.fixture
def chats(tmp_path, photos) -> str:
    """Eight rows, every second one text alone; in reading order, two processes get one of each kind at a time."""
    rows = []
    answers = ["a red 3", "a blue 7", "左上角是红色的3", "two dogs", "a cat", "这是一只猫", "a bus", "three birds"]
    for i, answer in enumerate(answers):
        look = [{"type": "image"}] if i % 2 == 0 else []
        ask = {"role": "user", "content": [*look, {"type": "text", "text": "What is this?"}]}
        say = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        rows.append({"images": photos[i : i + 1] if look else [], "messages": [ask, say]})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def questions(tmp_path, photos) -> str:
    """Four questions on each of three pictures, and a row of text."""
    said = ["a red 3", "左上角是红色的3", "two dogs", "7"]
    rows = [(photos[k % 3], f"第{k}: what is this?", said[k % 4]) for k in range(12)] + [(None, "hello", "hi")]
    lines = []
    for photo, ask, answer in rows:
        look = [{"type": "image"}] if photo else []
        messages = [{"role": "user", "content": [*look, {"type": "text", "text": ask}]}]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        lines.append(json.dumps({"images": [photo] if photo else [], "messages": messages}, ensure_ascii=False))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def write(recipe_file, chats, tmp_path):
    """Writes a recipe with a trained projector and LoRA beside a frozen tower, resampler and language model."""

    def write_one(name: str, batch: int, sft: dict | None = None, rows: int = 8, **changes) -> Path:
        source = {"path": chats, "format": "messages", "max_rows": rows}
        options = {
            "output_dir": str(tmp_path / name), "per_device_train_batch_size": batch, "use_cpu": True, "max_steps": 6,
            "per_device_eval_batch_size": batch, "learning_rate": 1e-3, "bf16": False, "report_to": "none",
            "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "max_length": 128,
            "lr_scheduler_type": "linear", "warmup_steps": 1, **(sft or {}),
        }  # fmt: skip
        recipe = {"chat_template": "ziya", "train": {"projector": 1e-2}, "lora": {"r": 4},
                  "data": {"train": [source], "eval": [source]}, "sft": options, **changes}  # fmt: skip
        return recipe_file(name, **recipe)

    return write_one


@pytest.fixture
def pictures(tmp_path) -> str:
    """Rows with an image of another shape each, or with none, in turn; then text for both processes."""
    rows = []
    for i, size in enumerate([(40, 30), None, (300, 60), None, None, None, None, (60, 200)]):
        if size:
            (tmp_path / f"{i}.png").write_bytes(encoded(size))
        ask = [*([{"type": "image"}] if size else []), {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": "a red 3 and a blue 7"[: 5 + i]}]
        rows.append({"images": [f"{i}.png"] if size else [], "messages": messages})
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(tmp_path / "pictures.jsonl")


@pytest.fixture
def write_model(write, pictures):
    """Writes a recipe that starts from an existing VLM."""

    def write_one(name: str, batch: int, family: str, **changes) -> Path:
        source = {"path": pictures, "format": "messages"}
        model = {"model": {"pretrained": str(tiny(family))}, "stack": None, "chat_template": None, "lora": None}
        data = {"train": [source], "eval": [source]}
        return write(name, batch, {"max_length": 1024, "max_steps": 4}, **{**model, "data": data, **changes})

    return write_one


def launch(config: Path, program: list[str], **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes; the address is free, and nothing is asked of a network."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return subprocess.run(
        [*command, "--num_processes", "2", "--main_process_port", "0", *program],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def on_cpu(name: str, folder: Path) -> Path:
    """A file that ships, with `use_cpu` in place of the GPUs."""
    config = {**yaml.safe_load(accelerate_config(name).read_text(encoding="utf-8")), "use_cpu": True}
    path = folder / f"{name}_cpu.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / name for name in ("trained.safetensors", "adapter_model.safetensors")]
    return {name: tensor for file in files if file.is_file() for name, tensor in load_file(file).items()}


def history(folder: Path, key: str) -> list[float]:
    rows = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return [row[key] for row in rows if key in row]


def ledger(folder: Path) -> dict[str, int]:
    """How the rows of the one source of a run were used."""
    (source,) = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["ledger"]["train"]["sources"].values()
    return source


def answers(folder: Path) -> list[tuple[str, str]]:
    """What the rows that a run shows were answered before its first step."""
    return [(record["id"], record["answer"]) for record in read_lines(folder / "samples.jsonl") if not record["step"]]


def assert_same_run(one: Path, two: Path) -> None:
    """The same keys, shapes, weights, losses and image use."""
    ours, theirs = tensors(one), tensors(two)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, **WEIGHTS, msg=lambda text, name=name: f"{name}: {text}")
    assert history(two, "loss") == pytest.approx(history(one, "loss"), **LOSS)


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """No fresh process for the bundles of one process."""
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 0, "max_difference": 0.0})


@pytest.fixture
def alone(write, unchecked) -> Path:
    """What one process makes of the same global batches."""
    return train(load_recipe(write("alone", 2)))


@pytest.mark.slow
def test_fsdp2_makes_what_one_process_makes(write, write_model, alone, tmp_path):
    # Qwen: a frozen language model without LoRA, through which a gradient comes back only for the image path's sake.
    # Idefics3: as many crops as an image is large.
    asked = os.environ.get("VLM_SFT_FAMILIES", "qwen2_5_vl idefics3").split()  # of benchmarks/families.py
    names = [name for name in asked if not FAMILIES[name].one_by_one]
    plain: dict = {"train": {"projector": 1e-2}}
    kept = {"path": str(tmp_path / "features")}
    kinds = {name: plain if name == "qwen2_5_vl" else {**plain, "lora": {"r": 4}} for name in names}
    recipes = [
        *(write_model(f"{kind}_two", 1, kind, **changes) for kind, changes in kinds.items()),
        write("fsdp2", 1, {"save_strategy": "steps", "save_steps": 3}),
        # Nothing of the image path is trained, but the process with text must still lend its share of the tower.
        write("adapter", 1, {"max_steps": 2}, train={}),
        write("kept", 1, {"save_strategy": "steps", "save_steps": 3}, cache=kept),
        write("kept_on", 1, {"resume_from_checkpoint": str(tmp_path / "kept" / "checkpoint-3")}, cache=kept),
        write("resumed", 1, {"resume_from_checkpoint": str(tmp_path / "fsdp2" / "checkpoint-3")}),
    ]
    done = launch(on_cpu("fsdp2", tmp_path), [str(DRIVER), *map(str, recipes)])
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, tmp_path / "fsdp2")
    # No process holds a share of tower and resampler, whose features both processes write.
    assert_same_run(alone, tmp_path / "kept")
    assert_same_run(tmp_path / "kept", tmp_path / "kept_on")
    assert len(list(tmp_path.glob("features/*/*.index"))) >= 1
    for kind, changes in kinds.items():
        one = train(load_recipe(write_model(f"{kind}_one", 2, kind, **changes)))
        assert_same_run(one, tmp_path / f"{kind}_two")
    assert len(history(tmp_path / "adapter", "loss")) == 2
    assert "The model is not asked while it is trained: its weights are split." in done.stderr
    # Shares and optimizer state are put back: the run that went on ends where the other did, and loads anywhere.
    assert_same_run(tmp_path / "fsdp2", tmp_path / "resumed")
    assert f"Bundle: {tmp_path / 'resumed'}" in done.stderr and "Parity: reloaded" in done.stderr
    files = {path.name for path in (tmp_path / "fsdp2" / "checkpoint-3").iterdir()}
    assert "optimizer.bin" in files and not any(name.startswith("pytorch_model") for name in files)


@pytest.mark.slow
def test_ddp_makes_what_one_process_makes_uneven_rows_end_and_packs_and_streams_are_dealt(
    write, write_model, alone, chats, questions, pictures, tmp_path
):
    llava = {"family": "llava", "train": {"projector": 1e-2}, "lora": {"r": 4}}
    source = {"path": chats, "format": "messages"}
    stream = {"data": {"train": [source], "streaming": True, "shuffle_buffer": 1},
              "collator": "distributed_driver:NotesIds"}  # fmt: skip
    asked = {
        "data": {"train": [{"path": questions, "format": "messages", "merge_by_image": True, "independent": True}]}
    }
    of = {"pretrained": str(tiny("llava_next"))}
    tower = {**of, "tiles": "anyres", "feature_layer": -2, "feature_select": "patch"}
    cut = {"stack": {"vision_tower": tower, "projector": {"type": "mlp", **of}, "language_model": of},
           "chat_template": "mistral", "data": {"train": [{"path": pictures, "format": "messages"}]}}  # fmt: skip
    packed = {"packing": True, "max_length": 64, "train_sampling_strategy": "random"}
    saves = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 3}
    recipes = [
        write("stream", 1, saves, **stream),
        write("went_on", 1, {**saves, "resume_from_checkpoint": str(tmp_path / "stream" / "checkpoint-3")}, **stream),
        write_model("llava", 1, **llava),
        write("uneven", 1, {"max_steps": -1, "num_train_epochs": 2}, rows=7),
        write("ddp", 1),
        write("packs", 1, packed),
        write("asked", 1, **asked),
        write("cached", 1, cache={"path": str(tmp_path / "features")}),
        write("tiles", 1, **cut),
    ]
    done = launch(accelerate_config("cpu_2"), [str(DRIVER), *map(str, recipes)], IDS=str(tmp_path / "ids"))
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, tmp_path / "ddp")
    assert_same_run(alone, tmp_path / "cached")
    # Two processes, and a cache in the tower's place, say what one with a tower does before the first step.
    assert answers(tmp_path / "ddp") == answers(tmp_path / "cached") == answers(alone) != []
    assert answers(tmp_path / "llava") and answers(tmp_path / "packs")
    assert list(tmp_path.glob("features/*/*.index"))
    assert_same_run(train(load_recipe(write("packs_alone", 2, packed))), tmp_path / "packs")
    # Twelve questions on three pictures and a text: four conversations, two a step, counted as their rows.
    assert_same_run(train(load_recipe(write("asked_alone", 2, **asked))), tmp_path / "asked")
    rows = [ledger(tmp_path / name) for name in ("asked", "asked_alone")]
    assert rows[0] == rows[1] and (rows[0]["used"], rows[0]["merged"], rows[0]["conversations"]) == (13, 12, 3)
    assert_same_run(train(load_recipe(write_model("llava_alone", 2, **llava))), tmp_path / "llava")
    # Images of other shapes, so of other numbers of tiles, on each process, and none on one of them.
    assert_same_run(train(load_recipe(write("tiles_alone", 2, **cut))), tmp_path / "tiles")
    # Eight rows are four steps of two: each comes once before any comes again, and goes on where a checkpoint stopped.
    given = [(tmp_path / f"ids-{rank}").read_text().splitlines()[:6] for rank in (0, 1)]
    assert len({row for rows in given for row in rows[:4]}) == 8 and all(rows[:2] == rows[4:] for rows in given)
    assert_same_run(tmp_path / "stream", tmp_path / "went_on")
    # Seven rows are four steps of two: the last batch is filled up from the start, and nobody waits.
    assert len(history(tmp_path / "uneven", "loss")) == 8
    # Images are exchanged with those of earlier batches, also where one process has none in this one.
    assert history(tmp_path / "uneven", "eval_image_use")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_sentence_said_once(write, tmp_path):
    recipe = write("failing", 1, collator="distributed_driver:FailsOnTheSecondProcess")
    tests = os.pathsep.join((str(ROOT), str(DRIVER.parent)))
    program = [str(DRIVER), str(recipe)]
    done = launch(accelerate_config("cpu_2"), program, PYTHONPATH=tests)
    assert done.returncode != 0
    assert done.stderr.count("dogs.png has vanished.") == 1
    assert "error (process 1): dogs.png has vanished." in done.stderr
    assert "[rank0]" not in done.stderr and "[rank1]" not in done.stderr, "no traceback of either"
    assert "exitcode  : 2" in done.stderr, "the launcher's report names the code of the first that failed"
