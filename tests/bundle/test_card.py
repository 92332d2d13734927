"""The card of a bundle: a head the Hub can read, the numbers, and nothing of this machine."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from vlm_sft.bundle.card import shown, write_card

PIECE = {"revision": None, "fingerprint": "abc"}


@pytest.fixture
def bundle(tmp_path):
    """Writes what a card is made of; keyword arguments replace entries of the manifest. Returns the folder."""

    def write(recipe=None, results=None, **manifest):
        folder = tmp_path / "ziya_stage2"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump({"chat_template": "/home/me/chat_templates/ziya.jinja", "init_from": None, **(recipe or {})})
        )
        entries = {
            "pieces": {
                "vision_tower": {"pretrained": "Salesforce/blip2-opt-2.7b", **PIECE},
                "resampler": {"pretrained": "Salesforce/blip2-opt-2.7b", **PIECE},
                "language_model": {"pretrained": "/home/me/ziya-13b", "path": "/home/me/ziya-13b", **PIECE},
            },
            "trained": ["projector"],
            "adapter": True,
            "versions": {"torch": "2.13.0"},
            "parity": {"positions": 90, "max_difference": 0.0, "tolerance": 1e-4, "equal": True},
            **manifest,
        }
        (folder / "bundle.json").write_text(json.dumps(entries))
        if results:
            (folder / "eval.json").write_text(json.dumps(results))
        return folder

    return write


def head_of(path):
    text = path.read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    assert ModelCard(text).data.to_dict(), "the Hub's own reader reads it"
    return yaml.safe_load(head), body


def test_the_head_names_task_library_and_bases_of_the_hub_alone(bundle):
    head, _ = head_of(write_card(bundle()))
    assert head == {
        "pipeline_tag": "image-text-to-text",
        "library_name": "vlm_sft",
        "tags": ["vlm_sft", "trl", "lora"],
        "base_model": ["Salesforce/blip2-opt-2.7b"],
        "base_model_relation": "adapter",
    }


@pytest.mark.parametrize("path", ["/home/me/eye", "examples/eye", "eye"])
def test_no_base_where_every_piece_lay_in_a_folder(bundle, path):
    piece = {"pretrained": path, "path": f"/home/me/{path}", **PIECE}
    head, body = head_of(write_card(bundle(pieces={"vision_tower": piece}, adapter=False)))
    assert "base_model" not in head and head["tags"] == ["vlm_sft", "trl"]
    assert f"| vision_tower | `{path.removeprefix('/home/me/')}` |" in body


def test_nothing_of_this_machine_is_on_it(bundle, tmp_path):
    text = write_card(bundle(recipe={"init_from": "/home/me/outputs/ziya_stage1"})).read_text(encoding="utf-8")
    assert "/home/me" not in text and str(tmp_path) not in text
    assert "It starts from `ziya_stage1`." in text and 'vlm_sft.load("ziya_stage2")' in text
    assert "Chat template: `ziya`" in text


def test_paths_as_a_card_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown("outputs/ziya_stage1") == shown(tmp_path / "outputs/ziya_stage1") == "outputs/ziya_stage1"
    assert shown("/somewhere/else/ziya_stage1") == "ziya_stage1"
    assert shown("Salesforce/blip2-opt-2.7b") == "Salesforce/blip2-opt-2.7b"


def test_the_template_is_named_also_where_the_recipe_leaves_it_to_the_model(bundle):
    assert "Chat template: `ziya`." in head_of(write_card(bundle()))[1]
    pieces = {"model": {"pretrained": "HuggingFaceTB/SmolVLM-Instruct", **PIECE}}
    body = head_of(write_card(bundle(recipe={"chat_template": None}, pieces=pieces)))[1]
    assert "Chat template: that of the model, in `chat_template.jinja`." in body


def test_results_are_on_it_and_what_was_not_measured_is_not(bundle):
    results = {
        "caption_exact_match": None, "answer_accuracy": 0.951, "answer_accuracy_blank_image": 0.23,
        "answer_accuracy_by_kind": {"digit": 0.96, "颜色": 0.94}, "train_seconds": 43.2, "split": "test",
    }  # fmt: skip
    folder = bundle()
    assert "## Results" not in write_card(folder).read_text(encoding="utf-8")
    text = write_card(bundle(results=results)).read_text(encoding="utf-8")
    assert "## Results on the test set" in text
    for row in ("| answers exactly right | 95.1% |", "| the same with the image blanked | 23.0% |",
                "| answers: 颜色 | 94.0% |", "| seconds of training | 43.2 |"):  # fmt: skip
        assert row in text
    assert "captions exactly right" not in text


def test_curves_and_parity_are_shown_where_they_are(bundle):
    folder = bundle(parity=None)
    text = write_card(folder).read_text(encoding="utf-8")
    assert "curves.png" not in text and "## Parity" not in text
    (folder / "curves.png").write_bytes(b"")
    text = write_card(bundle()).read_text(encoding="utf-8")
    assert "](curves.png)" in text and "the logits of 90 positions" in text


def test_what_a_stranger_wrote_stays_where_it_stands(bundle):
    recipe = {"hub": {"license": "mine\n---\n# 大标题"}, "data": {"prompts": ["```\n# Title\n</details>"]}}
    stage = {"recipe": "a | b\n\n# Title", "trained": ["projector"], "adapter": False, "data": ["{{ 7 * 7 }}"]}
    path = write_card(bundle(recipe=recipe, stages=[stage]))
    text = path.read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == "mine\n---\n# 大标题" and card.text.startswith("\n# ziya_stage2\n")
    assert r"| 1 | a \| b # Title | projector | {{ 7 * 7 }} |" in text
    *_, last = text.split("</details>")
    assert text.count("\n````") == 2 and last == "\n", "a longer fence holds the prompt's"


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "![x](https://evil.example/a.png)",
    "[click](https://evil.example)",
    "https://evil.example",
    "www.evil.example",
    "**bold** __bold__ ~~gone~~ a*b*c",
    "`code` ``` $x$",
    "a\n\n# Title\n\n- item\n\n---\n",
    "| a | b |",
    "&lt;b&gt; &#60;b>",
    "\\\\[click](https://evil.example)",
    "@everyone mail@evil.example",
    "# Title",
    "\x1b[2J\u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_markdown_and_html_are_text_on_the_card(text, bundle):
    """Read as the Hub reads it: a renderer finds none of its elements, and the words are all there."""
    stage = {"recipe": text, "trained": [text], "adapter": True, "data": [text]}
    source = {"read": 1, "used": 1, "truncated": 0, "rejected": {text: 1}, "examples": {}, "met": {}}
    results = {"caption_exact_match": None, "answer_accuracy": 0.5, "answer_accuracy_blank_image": None, "split": text,
               "answer_accuracy_by_kind": {text: 0.5}, "metrics_by_kind": {text: {text: 0.5}}}  # fmt: skip
    pieces = {"language_model": {"pretrained": f"x{text}", **PIECE, "fingerprint": text}}
    ledger = {text: {"max_rejected": 0, "sources": {text: source}}}
    changed = bundle(recipe={"init_from": f"x{text}", "chat_template": f"x{text}"}, stages=[stage], results=results,
                     pieces=pieces, ledger=ledger, versions={text: text})  # fmt: skip
    body = ModelCard(write_card(changed).read_text(encoding="utf-8")).text
    body = body.split("<details>")[0]  # the recipe stands in its fence
    blocks = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    tokens = [token for block in blocks for token in (block, *(block.children or []))]
    assert {token.type for token in tokens if token.type.endswith("_open")} <= PLAIN
    assert not [token for token in tokens if token.type.startswith(("html", "image", "hr"))]
    links = re.findall(r"https?://|www\.|(?<=\S)@", re.sub(r"`+[^`]+`+|```.*?```", "", body, flags=re.DOTALL))
    assert links == [], "the Hub makes links of these too"
    headings = [blocks[number + 1].content for number, block in enumerate(blocks) if block.type == "heading_open"]
    assert len(headings) == len(ORDER) and all(map(str.startswith, headings, ORDER))


ORDER = ("ziya_stage2", "Load it", "Stages", "Frozen pieces", "Data", "Results on the", "Parity", "Made with", "Recipe")
PLAIN = {"heading_open", "paragraph_open"} | {f"{part}_open" for part in ("table", "thead", "tbody", "tr", "th", "td")}
