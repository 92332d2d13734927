"""A row or an image that cannot be trained on is named, with its file and how to mend it, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.train import main


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def broken_image(path: Path, kind: str) -> None:
    if kind == "truncated":
        Image.effect_noise((200, 200), 50).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "a web page":
        path.write_text("<!DOCTYPE html><html>404</html>")


IMAGES = {
    "missing": "row rows/9: the image bad.png was not found in the folder {folder}: correct the path in the data or "
    "the source's `images` folder.",
    "zero bytes": "row rows/9: the image {path} is empty (0 bytes): download it again or remove the row.",
    "truncated": "row rows/9: the image {path} is truncated or damaged (image file is truncated): download it again or "
    "remove the row.",
    "a web page": "row rows/9: the image {path} is not an image (it looks like HTML: a web page was saved in its "
    "place).",
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", IMAGES)
def test_broken_image(refused, recipe_file, data, tmp_path, kind, workers):
    broken_image(tmp_path / "bad.png", kind)
    rows = [{"image": "photo.png", "caption": "a"}] * 8 + [{"image": "bad.png", "caption": "b"}]
    # What only decoding shows comes out of a data-loader worker, which torch wraps in a traceback.
    path = recipe_file(data=data(*rows, kind="caption"))
    said = refused(path, f"sft.dataloader_num_workers={workers}", "sft.max_steps=3")
    assert said == f"error: {IMAGES[kind].format(path=tmp_path / 'bad.png', folder=tmp_path)}"


@pytest.fixture
def no_lines(monkeypatch):
    """Image processors raise what they raise for pictures of one pixel's height."""
    real = VLMProcessor.encode_images

    def encode(self, images):
        if any(image.height == 1 for image in images):
            raise AssertionError("height must be at least 2")
        return real(self, images)

    monkeypatch.setattr(VLMProcessor, "encode_images", encode)


@pytest.mark.parametrize(("workers", "decoded"), [(0, 500), (0, 0), (1, 0)])
def test_a_picture_that_the_image_processor_refuses(refused, recipe_file, data, tmp_path, no_lines, workers, decoded):
    Image.new("RGB", (60, 1)).save(tmp_path / "线.png")
    rows = [{"image": "photo.png", "caption": "a"}] * 8 + [{"image": "线.png", "caption": "b"}]
    path = recipe_file(data=data(*rows, kind="caption"))
    options = [f"sft.dataloader_num_workers={workers}", "sft.max_steps=9", f"data.decode_rows={decoded}"]
    assert refused(path, *options) == (
        f"error: row rows/9: the image {tmp_path}/线.png of 60 x 1 pixels is refused by the model's image processor "
        "(height must be at least 2): give it another shape or format, or remove the row."
    )


@pytest.mark.slow
@pytest.mark.parametrize("decoded", [500, 0])
def test_it_is_left_out_and_entered_in_the_ledger_where_the_recipe_says_so(
    recipe_file, data, tmp_path, no_lines, decoded
):
    Image.new("RGB", (60, 1)).save(tmp_path / "线.png")
    rows = [{"image": "photo.png", "caption": "a"}] * 8 + [{"image": "线.png", "caption": "b"}]
    path = recipe_file(data={**data(*rows, kind="caption"), "max_rejected": 0.5, "decode_rows": decoded})
    main([str(path), "sft.num_train_epochs=1", "sft.max_steps=-1", "sft.per_device_train_batch_size=3"])
    bundle = json.loads((tmp_path / "out" / "recipe" / "bundle.json").read_text(encoding="utf-8"))
    ledger = bundle["ledger"]["train"]["sources"]["rows"]
    assert ledger["rejected"] == {"image refused": 1} and "线.png of 60 x 1 pixels" in str(ledger["examples"])
    assert ledger["met"] == ({} if decoded else {"rows/9": "image refused"})


def test_broken_image_of_an_evaluation(refused, recipe_file, data, tmp_path, caption_file):
    broken_image(tmp_path / "bad.png", "truncated")
    evaluated = data({"image": "bad.png", "caption": "b"}, kind="caption")["train"]
    path = recipe_file(data={"train": [{"path": caption_file, "format": "caption"}], "eval": evaluated})
    assert refused(path).startswith(f"error: row rows/1: the image {tmp_path}/bad.png is truncated or damaged")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("llava", {"image": "photo.png", "conversations": [{"from": "human", "value": "<image>\n<image>两只？"},
                                                           {"from": "gpt", "value": "是"}]}),
        ("messages", chat([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}], "a",
                          images=["photo.png"])),
        ("vqa", {"image": "photo.png", "question": "<image> and <image>?", "answer": "a"}),
    ],
)  # fmt: skip
def test_more_marks_than_images(refused, recipe_file, data, tmp_path, kind, row):
    good = {"messages": chat("q", "a"), "llava": {**row, "image": ["photo.png"] * 2}, "vqa": {**row, "question": "q"}}
    said = refused(recipe_file(data=data(good[kind], row, kind=kind)))
    assert said.startswith(f"error: {tmp_path}/rows.jsonl, line 2: 2 image marks (")
    assert said.endswith("but 1 image: give every mark its image, in order.")


EMPTY = {
    "messages": chat("q", "  "),
    "llava": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
    "vqa": {"image": "photo.png", "question": "q", "answer": " "},
    "caption": {"image": "photo.png", "caption": ""},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_answer_empty(refused, recipe_file, data, tmp_path, kind):
    said = refused(recipe_file(data=data(EMPTY[kind], kind=kind)))
    assert said.startswith(f"error: {tmp_path}/rows.jsonl, line 1: ")
    wanted = {
        "vqa": '"answer" is empty: write an answer or remove the row.',
        "caption": '"caption" is empty: write a caption or remove the row.',
    }
    assert said.endswith(wanted.get(kind, "message 1 is an empty answer; drop the turn or give the answer some text."))


def test_no_answer_at_all(refused, recipe_file, data, tmp_path):
    row = {"messages": [{"role": "user", "content": "hello"}]}
    assert refused(recipe_file(data=data(chat("q", "a"), row))) == (
        f"error: {tmp_path}/rows.jsonl, line 2: there is no answer to learn from: add an assistant's message or remove "
        f"the row."
    )


def test_no_supervised_token(refused, recipe_file, data, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}{{ image_token }}{% else %}"
        "{% if m.role == 'assistant' and p.text != 'skip' %}{% generation %}{{ p.text }}{% endgeneration %}"
        "{% else %}{{ p.text }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    )
    path = recipe_file(chat_template=str(template), data=data(chat("q", "a"), chat("q", "skip")))
    assert refused(path) == (
        "error: row rows/2: no token would be in the loss; give the row an answer from the assistant."
    )


def test_a_row_longer_than_max_length(refused, recipe_file):
    said = refused(recipe_file(), "sft.max_length=4")
    assert said.startswith(
        'error: 8 of 8 rows of the source "captions" cannot be used, more than data.max_rejected (0)'
    )
    assert "the first: row captions/1: its first turn alone has " in said and "sft.max_length is 4" in said
