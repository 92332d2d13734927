"""Videos all the way: trained on by a stack and by a family, evaluated, and asked about."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from support.films import film, frame_of
from support.source_files import write
from support.tiny_families import processor_of, tiny
from support.tiny_pieces import tiny_recipe
from vlm_sft import MultimodalCollator, load_mixture, load_recipe
from vlm_sft.base.errors import RowError
from vlm_sft.cli.main import app
from vlm_sft.recipe.sections import Source
from vlm_sft.train import train

ROWS = [
    {"id": "a", "videos": ["1.mp4"], "messages": [{"role": "user", "content": "<video>What happens?"},
                                                  {"role": "assistant", "content": "It gets light."}]},
    {"id": "b", "messages": [{"role": "user", "content": [{"type": "video", "video": "2.webm", "fps": 5},
                                                          {"type": "text", "text": "发生了什么？"}]},
                             {"role": "assistant", "content": "变亮了。"}]},
    {"id": "c", "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}]},
    {"id": "d", "video": "1.mp4", "messages": [{"role": "user", "content": "And now?"},
                                               {"role": "assistant", "content": "亮。"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("videos")
    film(folder / "1.mp4", frames=20)
    film(folder / "2.webm", frames=10, codec="libvpx-vp9")
    return write(folder / "rows.jsonl", ROWS)


def read_metrics(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())


def data_of(rows_file: str, **video) -> dict:
    source = {"path": rows_file, "format": "messages"}
    return {"train": [source], "eval": [source], "video": {"frames": 3, **video}}


def recipe_of(root: Path, pieces, rows_file: str, **changes) -> Path:
    recipe = tiny_recipe(pieces, None, root / "out", data=data_of(rows_file), chat_template="ziya", **changes)
    recipe["sft"] |= {"max_steps": 3, "max_length": 512, "per_device_train_batch_size": 2, "dataloader_num_workers": 1,
                      "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-2}  # fmt: skip
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, pieces, rows_file) -> Path:
    root = tmp_path_factory.mktemp("stack")
    path = recipe_of(root, pieces, rows_file, train={"projector": 1e-2, "language_model": 1e-2}, lora=None)
    return train(load_recipe(path))


@pytest.mark.slow
def test_a_stack_trains_on_frames(bundle):
    said = read_metrics(bundle)
    losses = [entry["loss"] for entry in said if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert any("eval_image_use" in entry for entry in said)
    notes = json.loads((bundle / "bundle.json").read_text())
    assert notes["ledger"]["train"]["sources"]["rows"]["used"] == 4
    # Three frames, five, none, three; each of as many tokens as an image.
    assert notes["train_rows"]["rows"] == 4 and notes["train_rows"]["longest"] > 5 * 4


@pytest.mark.slow
def test_a_bundle_is_asked_about_videos(bundle, rows_file, tmp_path):
    folder = Path(rows_file).parent
    rows = [
        {"id": "good", "video": "1.mp4", "question": "What happens?"},
        {"id": "bad", "video": "none.mp4", "question": "?"},
        {"id": "marked", "videos": ["1.mp4", "2.webm"], "question": "<video>和<video>有什么不同？"},
        {"id": "none", "question": "<video>?"},
    ]
    questions, out = write(folder / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    done = CliRunner().invoke(
        app, ["generate", str(bundle), questions, "--output", str(out), "--set", "max_new_tokens=3"]
    )
    assert done.exit_code != 0  # some rows could not be asked; the others were
    lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert "answer" in lines["good"] and "answer" in lines["marked"]
    assert "none.mp4 was not found" in lines["bad"]["error"] and "0 videos" in lines["none"]["error"]
    options = ["--video", str(folder / "1.mp4"), "--set", "max_new_tokens=3"]
    assert CliRunner().invoke(app, ["chat", str(bundle), "What happens?", *options]).exit_code == 0
    evaluated = CliRunner().invoke(
        app, ["evaluate", str(bundle), "--split", "eval", "--output", str(tmp_path / "e.json")]
    )
    assert evaluated.exit_code == 0, evaluated.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_a_family_trains_on_frames(name, recipe_file, rows_file):
    changes = {"stack": None, "chat_template": None, "model": {"pretrained": str(tiny(name))}, "lora": {"r": 2}}
    data = data_of(rows_file, max_pixels=32 * 32)
    path = recipe_file("family", **{**changes, "data": {**data, "eval": []}})
    overrides = ["sft.max_steps=3", "sft.max_length=2048", "sft.per_device_train_batch_size=2"]
    folder = train(load_recipe(path, overrides))
    losses = [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert any(
        tensor.any() for key, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in key
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "internvl", "llava"])
def test_the_tokens_of_frames_are_those_of_images(name, rows_file):
    """Measured without decoding all frames, and the same when they are decoded."""
    source = Source(path=rows_file, format="messages", video={"frames": 4, "max_pixels": 32 * 32})
    collator = MultimodalCollator(processor_of(name))
    for row in load_mixture([source]):
        measured, whole = collator.encode(row, with_images=False), collator.encode(row)
        assert measured.chat.input_ids == whole.chat.input_ids and not measured.images
        assert len(whole.images) == whole.chat.num_images == len(row["images"])
        assert all(image.width * image.height <= 32 * 32 for image in whole.images)
    (first, *_) = load_mixture([source])
    sample = collator.encode(first)
    assert [frame_of(image) for image in sample.images] == [0, 6, 13, 19]
    text = collator.processor.tokenizer.decode(sample.chat.input_ids)
    assert "<0.0 seconds>" in text and "<1.9 seconds>" in text


def test_a_family_for_one_image_says_so_before_weights_are_read(rows_file):
    collator = MultimodalCollator(processor_of("kosmos-2"))
    rows = load_mixture([Source(path=rows_file, format="messages")])
    with pytest.raises(RowError) as caught:
        collator.encode(rows[0], with_images=False)
    assert (
        "row rows/a: its video is shown as 8 images, and this model was made for one: set `video: {frames: 1}`"
        in str(caught.value)
    )
    (row, *_) = load_mixture([Source(path=rows_file, format="messages", video={"frames": 1})])
    assert len(collator.encode(row).images) == 1


@pytest.mark.slow
def test_preflight_shows_frames_and_takes_real_steps(tmp_path, pieces, rows_file):
    path, page = recipe_of(tmp_path, pieces, rows_file), tmp_path / "page.html"
    done = CliRunner().invoke(app, ["preflight", str(path), "--output", str(page)])
    assert page.is_file(), (done.output, done.exception)
    shown = page.read_text(encoding="utf-8")
    assert shown.count("data:image/jpeg;base64") >= 3 + 5 + 3 and "Traceback" not in done.output, done.output[-1500:]
    assert "moved" in shown or "moves" in shown
