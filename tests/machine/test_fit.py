"""Settings that fit a GPU: each of them does, the fastest comes first, and the rows of a step stay."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml

from support import mplug, vle
from support.tiny_families import tiny
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import ENCODER_PARTS
from vlm_sft.cli import main as cli
from vlm_sft.machine.fit import Gpu, changed, fit, keys_of, parse_gpu
from vlm_sft.machine.machine import GIB
from vlm_sft.preflight.dry_run import full_step, weigh
from vlm_sft.preflight.launch import Launch
from vlm_sft.preflight.step_memory import StorageCounter
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.recipe.schema import load_recipe
from vlm_sft.stack.build_stack import build_stack

MIB = 2**20


@pytest.fixture
def recipe(tmp_path):
    """A recipe of a tiny model, its file with comments."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"# 我的配方\nmodel: {{pretrained: {tiny('llava')}}} # tiny\nlora: {{r: 2, target_modules: [q_proj]}}\n"
        "data: {train: [{path: rows.jsonl, format: caption}]}\n"
        "sft:\n  output_dir: out # here\n  per_device_train_batch_size: 4 # at a time\n"
        "  gradient_accumulation_steps: 1\n  max_length: 96 # tokens\n",
        encoding="utf-8",
    )
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "caption": "a"}\n' * 50)
    return path


def now(path) -> int:
    return weigh(load_recipe(path), Launch()).estimate.total


def test_what_fits_fits_and_the_fastest_is_first(recipe):
    loaded = load_recipe(recipe)
    room = int(now(recipe) * 0.7)
    found = fit(loaded, Gpu(room))
    assert found.sentence and "GiB of" in found.sentence and "`vlm-sft fit RECIPE`" in found.sentence
    assert found.settings
    for each in found.settings:
        assert each.memory <= 0.9 * room and each.batch * each.accumulation == 4
        counted = weigh(changed(loaded, each), Launch())
        assert counted.estimate.total == each.memory, "counted, not extrapolated"
    times = [each.seconds for each in found.settings]
    assert times == sorted(times)
    assert not any(each.four_bits or each.length < 96 for each in found.settings), "nothing that is learned changes"
    keys = keys_of(found.settings[0], found.now)
    assert {key[0] for key in keys} == {"sft"} and ("sft", "max_length") not in keys
    assert keys_of(found.now, found.now) == {}


def test_where_all_is_large_enough_nothing_is_said(recipe):
    found = fit(load_recipe(recipe), Gpu(80 * GIB))
    assert found.sentence is None and found.settings[0].batch == 4 and not found.settings[0].checkpointing


def test_two_gpus_share_what_one_cannot_hold(recipe):
    found = fit(load_recipe(recipe), Gpu(80 * GIB, count=2))
    assert {each.sharded for each in found.settings} == {False, True}
    shared, whole = (next(each for each in found.settings if each.sharded is way) for way in (True, False))
    assert shared.seconds > whole.seconds, "weights are gathered"


def test_nothing_fits_a_thimble(recipe):
    with pytest.raises(UserError, match=r"Nothing fits: the least that was found takes .* MiB"):
        fit(load_recipe(recipe), Gpu(100_000))


@pytest.mark.parametrize(
    ("given", "gib"), [("24GB", 24), ("24 GiB", 24), ("12.5g", 12.5), ("A100 40GB", 40), ("rtx 4090", 24), ("H100", 80)]
)
def test_gpus_are_named_or_measured(given, gib):
    assert parse_gpu(given, 1).size == int(gib * GIB)


@pytest.mark.parametrize("given", ["", "24", "big", "0GB", "-3GB", "24 monkeys"])
def test_what_says_no_memory_is_refused(given):
    with pytest.raises(UserError, match="says no memory; write 24GB"):
        parse_gpu(given, 1)


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["vlm-sft", "fit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return (ended.value.code or 0, *capsys.readouterr())


def test_the_command_writes_the_fastest_and_keeps_the_comments(recipe, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    room = f"{now(recipe) * 0.7 / GIB:.6f}GB"
    code, out, _ = run(monkeypatch, capsys, recipe, "--gpu", room)
    assert code == 0 and "which it does not have" in out and "For the first: sft." in out and "TFLOPS" in out
    assert max(map(len, out.splitlines())) <= 220
    before = recipe.read_text(encoding="utf-8")
    code, out, _ = run(monkeypatch, capsys, recipe, "--gpu", room, "--write", "--json")
    found, text = json.loads(out), recipe.read_text(encoding="utf-8")
    assert code == 0 and not found["fits_now"] and found["rows"] == 50
    for comment in ("# 我的配方", "# tiny", "# here", "# at a time", "# tokens"):
        assert comment in text
    written = yaml.safe_load(text)["sft"]
    assert {f"sft.{key}": value for key, value in written.items() if f"sft.{key}" in found["keys"]} == found["keys"]
    assert text != before and fit(load_recipe(recipe), parse_gpu(room, 1)).sentence is None


def test_a_recipe_that_ships_is_not_written_to(monkeypatch, capsys):
    code, _, said = run(monkeypatch, capsys, "smolvlm_lora", "--gpu", "24GB", "--write")
    assert code == 2 and "ships with vlm_sft and is not written to; copy it: vlm-sft recipes copy smolvlm_lora" in said


def test_without_a_gpu_one_is_asked_for(recipe, monkeypatch, capsys):
    code, _, said = run(monkeypatch, capsys, recipe)
    assert code == 2 and "There is no GPU here; say which one it is for, such as --gpu 24GB" in said


@pytest.mark.parametrize("kind", ["vqa", "vcr", "mplug"])
def test_a_step_of_an_encoder_holds_what_was_counted(kind, tmp_path):
    folder = tmp_path / "it"
    section = {"pretrained": str(folder)}
    if kind == "mplug":
        mplug.save_modelscope(folder, "base")
        section["config"] = {"vision_heads": 4, "num_attention_heads": 4, "fusion_layers": 3, "stride_layer": 3}
    else:
        vle.save_vle(folder, "vqa_classifier")
        section["task"] = kind
    path = tmp_path / "mine.yaml"
    sft = {"output_dir": "out", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_length": 20}
    data = {"train": [{"path": "rows.jsonl", "format": "vcr" if kind == "vcr" else "vqa"}]}
    recipe = {"encoder": section, "train": dict.fromkeys(ENCODER_PARTS, 1e-4), "data": data, "sft": sft}
    path.write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(path)
    counted = weigh(loaded, Launch()).estimate.step
    stack = build_stack(loaded)
    batch = full_step(build_sft_config(loaded), stack.processor).batch(stack.processor)
    assert batch["input_ids"].shape[0] == 2 and batch["input_ids"].shape[-1] == 20
    stack.model.activation_checkpointing_enable({"use_reentrant": False})  # as TRL does where nothing is said
    stack.model.train()
    with StorageCounter((*stack.model.parameters(), *stack.model.buffers(), *batch.values())) as counter:
        loss = stack.model(**batch, supervised_only=True, use_cache=False).loss
        loss.backward()
    assert torch.isfinite(loss) and abs(counted.peak - counter.peak) <= 0.01 * counter.peak
    reads = stack.processor.reads(20, stack.model.config.num_patches)
    assert reads.keys() == {row.part for row in stack.plan.rows(stack.model)} and min(reads.values()) > 0
    if kind == "vqa":
        found = fit(loaded, Gpu(GIB, 2))
        assert found.settings[0].batch == 2 and not any(each.sharded or each.four_bits for each in found.settings)
