"""`vlm-sft preflight`: the page, the exit code, and what is said in between."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from support.pictures import COPIES, photo, write
from support.tiny_families import tiny
from vlm_sft.cli import main as cli

pytestmark = pytest.mark.slow


@pytest.fixture
def preflight(monkeypatch, tmp_path, capsys):
    """Runs the command in a folder of its own; returns exit code, what was said, and the page or None."""

    def run(*words) -> tuple[int, str, str | None]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["vlm-sft", "preflight", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        page = tmp_path / "preflight.html"
        return ended.value.code or 0, capsys.readouterr().err, page.read_text() if page.exists() else None

    return run


def write_rows(folder: Path, rows) -> list[dict]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [{"path": str(path), "format": "caption"}]


def test_a_good_recipe_ends_with_0(preflight, recipe_file):
    path = recipe_file(chat_template="ziya", lora={"r": 2}, train={"projector": 1e-3})
    code, said, page = preflight(path)
    assert code == 0 and "Page: preflight.html" in said and "About " in said
    for words in ("Samples", "Lengths", "Mixture", "Tokenizer coverage", "What is frozen", "Real steps", "Recipe"):
        assert words in page
    assert "30 of 30" in page, "two tensors of the projector, twenty-eight of LoRA"
    assert page.count("data:image/jpeg;base64,") == 8
    assert not Path(yaml.safe_load(path.read_text())["sft"]["output_dir"]).exists()


def test_wrong_images_end_with_1_and_a_page(preflight, recipe_file, tmp_path, photos):
    rows = [{"image": photos[0], "caption": "a red 3"}, {"image": "gone.png", "caption": "two dogs"}]
    code, said, page = preflight(recipe_file(data={"train": write_rows(tmp_path, rows)}), "--no-model")
    assert code == 1 and "gone.png" in said
    assert "gone.png" in page and '<li class="error">' in page
    assert "--no-model: no weight was read" in page


def test_no_row_left_ends_with_1_and_a_page(preflight, recipe_file, tmp_path):
    data = {"train": write_rows(tmp_path, [{"image": "gone.png", "caption": "two dogs"}])}
    code, _, page = preflight(recipe_file(data=data))
    assert code == 1 and "No row was left to look at" in page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sft.max_stepz=1"], "max_stepz"),
        (["data.train.0.path=none.jsonl"], "none.jsonl"),
        (["--output", "."], "--output . is a folder; name a file, such as preflight.html."),
        (["--output", "none/page.html"], "--output none/page.html: the folder none does not exist; make it first."),
        (["--accelerate-config", "none.yaml"], "--accelerate-config none.yaml: it cannot be read"),
    ],
)
def test_a_wrong_recipe_ends_with_2_and_no_page(words, sentence, preflight, recipe_file):
    code, said, page = preflight(recipe_file(), *words)
    assert code == 2 and page is None
    assert said.splitlines()[-1].startswith("error: ") and sentence in said


def test_a_stream_is_looked_at(preflight, recipe_file, caption_file):
    data = {"train": [{"path": caption_file, "format": "caption"}], "streaming": True, "shuffle_buffer": 4}
    code, _, page = preflight(recipe_file(data=data))
    assert code == 0 and "only the first rows of the stream were looked at" in page and "Real steps" in page


def test_a_leak_is_a_warning(preflight, recipe_file, caption_file, tmp_path, photos):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photos[2]).read_bytes())
    data = {"train": [{"path": caption_file, "format": "caption"}],
            "test": write_rows(tmp_path, [{"image": str(copy), "caption": "seen"}])}  # fmt: skip
    code, said, _ = preflight(recipe_file(data=data), "--no-model")
    assert code == 0 and "1 training image is among the evaluation images, byte for byte." in said


def test_look_alikes_are_a_warning_and_pairs_on_the_page(preflight, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.data.looks.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "评测").mkdir()
    train = [{"image": write(photo(n), tmp_path / f"照片{n}.png"), "caption": f"照片 {n}"} for n in range(6)]
    test = [
        {"image": write(COPIES["all of it"](photo(n)), tmp_path / "评测" / f"{n}.jpg"), "caption": "副本"}
        for n in (2, 9)
    ]
    data = {"train": write_rows(tmp_path, train), "test": [{**write_rows(tmp_path / "评测", test)[0], "name": "测试"}]}
    code, said, page = preflight(recipe_file(data=data), "--no-model")
    assert (
        code == 0 and "warning: 1 training image (16.7%) looks like 1 held-out image (50.0%) with other bytes." in said
    )
    assert "照片2.png) ≈ 测试/1 (" in said and "Images that look alike" in page and "mirrored 镜像" in page
    code, said, page = preflight(recipe_file(data=data), "--no-model", "data.look_images=0")
    assert code == 0 and "with other bytes" not in said and "data.look_images: 0: images were compared byte" in page
    code, said, page = preflight(recipe_file(data=data), "--no-model", "data.look_images=3")
    assert "Of 6 training images 3, drawn at random, were compared by look" in page


def test_a_projector_that_no_image_reaches_cannot_be_trained(preflight, recipe_file, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": f"hi {i}"}]}
            for i in range(4)]  # fmt: skip
    data = {"train": [{**write_rows(tmp_path, rows)[0], "format": "messages"}]}
    code, said, _ = preflight(recipe_file(data=data, chat_template="ziya"))
    assert code == 1 and "that should learn did not move" in said and "its gradient is zero" in said


def test_rows_that_are_too_long_stand_behind_the_cut(preflight, recipe_file, tmp_path, photos):
    rows = [{"image": photos[0], "caption": "a red 3"}, {"image": photos[1], "caption": "鑫" * 60}]
    code, _, page = preflight(recipe_file(data={"train": write_rows(tmp_path, rows)}), "--no-model")
    assert code == 1 and "1 × too long" in page
    assert "The first rows of the sources (2), as they are before any cut; 1 of them is longer than max_length" in page


def test_an_existing_model_is_looked_at_as_any_other(preflight, recipe_file):
    model = {"stack": None, "chat_template": None, "model": {"pretrained": str(tiny("llava"))}}
    path = recipe_file(**model, train={"projector": 1e-3}, lora={"r": 2})
    code, _, page = preflight(path, "sft.max_length=256")
    assert code == 0 and "LlavaMultiModalProjector" in page
    assert "frozen tensors unchanged" in page and "image · " in page


def test_a_quantised_language_model_stays_as_it_is(preflight, recipe_file, pieces):
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path = recipe_file(quantization=quantization, lora={"r": 2}, chat_template="ziya", train={"projector": 1e-3})
    code, said, page = preflight(path)
    assert code == 0, said
    assert "nf4" in page
