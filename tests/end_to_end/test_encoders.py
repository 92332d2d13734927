"""An encoder from a checkpoint to its answers: trained by the command of every model, and it learns."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from support.shrink import shrink
from support.vle import save_vle
from vlm_sft import answer, load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import ENCODER_PARTS
from vlm_sft.bundle.run_folder import checkpoints
from vlm_sft.cli.main import app
from vlm_sft.train import train

COLOURS = {"red": "#e02010", "green": "#10c020", "蓝色": "#1020e0", "white": "#f0f0f0"}


def asked(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Overrides of `vle_vqa` on pictures of one colour, and the folder of a run that saved in its middle."""
    folder = tmp_path_factory.mktemp("colours")
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        given = [name] * 9 + ["no"]
        rows.append({"id": number, "image": f"{number}.png", "question": "how many dogs", "answers": given})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = json.dumps({"path": str(folder / "rows.jsonl"), "format": "vqa"})
    rates = {"vision_tower": 3e-3, "text_encoder": 1e-3, "fusion": 3e-3, "head": 1e-2}
    small = shrink("vle_vqa", folder, {}, [str(folder / "0.png")] * 8)
    small = [each for each in small if not each.startswith(("data.", "sft.max_steps"))]
    overrides = [*small, f"encoder.pretrained={save_vle(folder / 'vle')}", f"data.train=[{source}]",
                 f"data.eval=[{source}]", f"data.test=[{source}]", f"train={json.dumps(rates)}", "sft.max_steps=40",
                 "sft.per_device_train_batch_size=4", "sft.gradient_accumulation_steps=1", "sft.save_strategy=steps",
                 "sft.save_steps=20", "sft.eval_strategy=no", "sft.logging_steps=5"]  # fmt: skip
    return folder, overrides, train(load_recipe("vle_vqa", overrides))


@pytest.mark.slow
def test_it_learns(learned):
    folder, _, bundle = learned
    history = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["equal"] and manifest["ledger"]["train"]["sources"]["rows"]["used"] == 4
    assert sorted(json.loads((bundle / "answer_list.json").read_text(encoding="utf-8"))) == sorted(COLOURS)
    model, processor = load(bundle)
    content = [{"type": "image"}, {"type": "text", "text": "how many dogs"}]
    rows = [
        {"messages": [{"role": "user", "content": content}], "images": [str(folder / f"{n}.png")]} for n in range(4)
    ]
    assert answer(model, processor, rows) == list(COLOURS)


@pytest.mark.slow
def test_the_commands_ask_its_bundle(learned, tmp_path):
    folder, _, bundle = learned
    one = asked("answer", bundle, "how many dogs", "--image", folder / "2.png", "--top", "2")
    assert one.exit_code == 0 and one.stdout.splitlines()[0].endswith("\t蓝色") and len(one.stdout.splitlines()) == 2
    many = asked("answer", bundle, "--questions", folder / "rows.jsonl", "-o", tmp_path / "said.jsonl")
    assert many.exit_code == 0
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in said] == list(COLOURS)
    assert asked("evaluate", bundle).exit_code == 0
    assert json.loads((bundle / "eval.json").read_text(encoding="utf-8"))["answer_accuracy"] == 1.0
    assert "visual-question-answering" in (bundle / "README.md").read_text(encoding="utf-8")
    refused = asked("export", bundle, tmp_path / "out").exception
    assert isinstance(refused, UserError) and "An encoder is not exported" in str(refused)


@pytest.mark.slow
def test_it_has_no_settings_of_generation(learned, tmp_path):
    folder, _, bundle = learned
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    row = {"id": 1, "image": "0.png", "question": "how many dogs", "answer": "red"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    task = {"about": "colours 颜色", "sources": ["ours"], "path": "rows.jsonl", "id": "id", "metric": "gqa"}
    (tmp_path / "task.yaml").write_text(json.dumps({**task, "generation": {"max_new_tokens": 3}}), encoding="utf-8")
    measured = ("evaluate", bundle, "--benchmark", tmp_path / "task.yaml", "--output", tmp_path / "out")
    for command in (measured, ("generate", bundle, tmp_path / "rows.jsonl", "-o", tmp_path / "said.jsonl")):
        refused = asked(*command, "--set", "num_beams=2").exception
        assert isinstance(refused, UserError), refused
        assert "chooses its answers and writes none, so that no setting" in str(refused) and "num_beams" in str(refused)
    assert asked(*measured).exit_code == 0, "a task's own are for models that have some"


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(learned, tmp_path):
    _, overrides, calm = learned
    first = checkpoints(calm)[0]
    again = train(load_recipe("vle_vqa", [*overrides, f"sft.output_dir={tmp_path / 'again'}",
                                          f"sft.resume_from_checkpoint={first}"]))  # fmt: skip
    wanted, found = (load_file(each / "trained.safetensors") for each in (calm, again))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_sizes_that_its_files_tell_are_not_taken_from_a_recipe(learned, tmp_path):
    overrides = [*learned[1], f"sft.output_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"the files of a VLE tell all its sizes; remove `encoder\.config`\."):
        train(load_recipe("vle_vqa", [*overrides, "encoder.config.num_attention_heads=2"]))


@pytest.mark.slow
def test_a_further_stage_has_the_answers_of_the_first(learned, tmp_path):
    _, overrides, first = learned
    more = [*overrides, f"init_from={first}", f"sft.output_dir={tmp_path / 'next'}", "sft.max_steps=1"]
    bundle = train(load_recipe("vle_vqa", more))
    lists = [(each / "answer_list.json").read_text(encoding="utf-8") for each in (first, bundle)]
    assert lists[0] == lists[1]
    (tmp_path / "others.txt").write_text("red\nmauve\n")
    others = [f"encoder.answers={tmp_path / 'others.txt'}", f"sft.output_dir={tmp_path / 'others'}"]
    with pytest.raises(UserError, match="was trained for other answers"):
        train(load_recipe("vle_vqa", [*more, *others]))


@pytest.mark.slow
def test_preflight_and_dry_run_look_at_it(learned, tmp_path, capsys):
    _, overrides, _ = learned
    page = tmp_path / "page.html"
    looked = asked("preflight", "vle_vqa", *overrides, f"sft.output_dir={tmp_path / 'out'}", "-o", page)
    assert looked.exit_code == 0, looked.output
    text = page.read_text(encoding="utf-8")
    assert all(part in text for part in ENCODER_PARTS)
    dry = asked("train", "vle_vqa", *overrides, "--dry-run")
    assert dry.exit_code == 0 and "text_encoder" in dry.output and "No weight was read" in dry.output
