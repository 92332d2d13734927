"""Rows with boxes through preflight, a training, its bundle and a question, with the notation that the recipe names."""

from __future__ import annotations

import json

import yaml
from PIL import Image

from support.tiny_pieces import tiny_recipe
from vlm_sft import load, load_recipe
from vlm_sft.base.console import make_console
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.data.dataset import load_source
from vlm_sft.inference.answer_file import generate
from vlm_sft.preflight.launch import Launch
from vlm_sft.preflight.preflight import preflight
from vlm_sft.recipe.sections import Source
from vlm_sft.train import train


def test_boxes_from_rows_to_answers(pieces, caption_file, tmp_path):
    rows = []
    for number in range(6):
        Image.new("RGB", (60, 40 + number), "white").save(tmp_path / f"{number}.png")
        turns = [{"role": "user", "content": "<image>找<ref-object>"}, {"role": "assistant", "content": "<bbox>。"}]
        objects = {"ref": ["猫"], "bbox": [[6, 4, 30, 20]]}
        rows.append({"images": [f"{number}.png"], "messages": turns, "objects": objects})
    rows[5]["objects"]["bbox"] = [[6, 4, 61, 20]]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = tiny_recipe(pieces, caption_file, tmp_path / "run", chat_template="ziya", box_notation="qwen_vl")
    recipe["data"] = {"train": [{"path": str(tmp_path / "boxes.jsonl"), "format": "messages"}], "max_rejected": 0.5}
    recipe["sft"]["max_steps"] = 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load_recipe(tmp_path / "r.yaml")

    report = preflight(loaded, Launch(), make_console(), output=tmp_path / "page.html", with_model=False)
    said = " ".join(finding.sentence for finding in report.findings)
    assert "are taken for pixels in 5 rows; they are written in the notation qwen_vl." in said
    assert "1 row will be left out" in said
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<rect") >= 5 and "outside of its picture of 60 x 45 pixels" in page

    _, processor = load(train(loaded))
    row = next(iter(load_source(Source(path=str(tmp_path / "boxes.jsonl"), format="messages"))))
    text = processor.tokenizer.decode(MultimodalCollator(processor).encode(row).chat.input_ids)
    assert "找<ref>猫</ref>" in text and "<box>(100,100),(500,500)</box>。" in text

    asked = {"id": 1, "image": "0.png", "question": "<bbox>?", "objects": {"bbox": [[6, 4, 30, 20]]}}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked), encoding="utf-8")
    generate(str(tmp_path / "run"), str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl"), options={"max_new_tokens": 2})
    (line,) = map(json.loads, (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines())
    assert "answer" in line and line["objects"] == asked["objects"]
