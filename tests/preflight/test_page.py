"""The page: nothing of a row is markup, nothing is loaded, and a browser shows what it should."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from support.browser import EVIL, Elements, opened
from vlm_sft.batch.token_view import TokenGroup
from vlm_sft.batch.tokenizer_coverage import Coverage
from vlm_sft.data.ledger import Ledger, SourceLedger
from vlm_sft.data.look_alikes import Compared, LookAlike, LookAlikes, Place
from vlm_sft.model.freeze import PartRow
from vlm_sft.pages.pictures import thumbnail
from vlm_sft.preflight.checks import ERROR, WARNING, Evidence, Finding
from vlm_sft.preflight.freeze_proof import Proof
from vlm_sft.preflight.page import BARS, WIDTH, Report, histogram, render_page
from vlm_sft.preflight.pairs import ShownPair
from vlm_sft.preflight.samples import Share, Shown


def full_report(text=EVIL) -> Report:
    """A report with a strange text in every place where a stranger may put one."""
    ledger = Ledger(0, {text: SourceLedger(read=3, used=2, rejected={text: 1}, examples={text: [text]})})
    coverage = {"zh": Coverage(2, 10, 21, 0, 9)}
    proof = Proof(2, [2.5, 2.25], ["projector"], {text: text}, [text], 10, [text], 4, 100.0, 0.5, text)
    groups = [
        TokenGroup("", "image", False, (9, 9), 0),
        TokenGroup(text, "user", False, (1,), 2),
        TokenGroup("\n", "template", False, (2,), 3),
        TokenGroup(text, "assistant", True, (3, 4), 4),
    ]
    plan = [PartRow("projector", text, total=10, trained=10, dtypes={"float32"}, learning_rate=1e-3)]
    picture = thumbnail(
        Image.new("RGB", (40, 30), "red"), [([0.25, 0.2, 0.75, 0.9], text, text), ([0.5, 0.5], "", text)]
    )
    pair = LookAlike(Place(text, text, text), Place(text, text, None), 0.971, True)
    alike = LookAlikes([pair] * 3, Compared(40, 40), Compared(8, 8), 2)
    return Report(
        text, text, [Finding(ERROR, text, text, [text]), Finding(WARNING, text)],
        Evidence({"train": ledger}, coverage=coverage, proof=proof, look_alikes=alike), [5, 50, 500], 100,
        [Shown(text, text, 6, 2, 1, [picture], groups), Shown(text, text, problem=text)],
        [ShownPair(pair, picture, picture), ShownPair(pair, picture, None)],
        [Share(text, 0.5, 0.25, 1)], [Share("zh", None, 1.0, 4)], plan,
        None, [text], [text],
    )  # fmt: skip


@pytest.mark.slow
def test_a_browser_shows_samples_and_runs_nothing(tmp_path):
    page = Elements(opened(render_page(full_report()), tmp_path))
    assert f"Preflight: {EVIL}" in page.text, "the title is text, and no script changed it"
    tokens = [
        given
        for tag, given in page.tags
        if tag == "span" and given.get("class", "").startswith("t ") and "title" in given
    ]
    assert [given["class"] for given in tokens] == ["t image", "t user", "t template", "t assistant in"]
    assert tokens[0]["title"] == "ids 9 9 · position 0 – 1 · image · not in the loss"
    assert tokens[3]["title"] == "ids 3 4 · position 4 – 5 · assistant · in the loss"
    assert "image · 2 tokens" in page.text and page.text.count(EVIL) > 15
    assert [given["src"][:23] for tag, given in page.tags if tag == "img"] == ["data:image/jpeg;base64,"] * 3
    assert "0.97 mirrored 镜像" in page.text and "40 training images and 8 held-out images" in page.text
    assert "not there any more" in page.text and "… 1 more;" in page.text


def test_no_markup_comes_from_rows_and_nothing_is_loaded():
    page = render_page(full_report())
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    attributes = {name for _, given in elements.tags for name in given}
    assert not [name for name in attributes if name.startswith("on")]
    links = [given.get("src") or given.get("href") for _, given in elements.tags if "src" in given or "href" in given]
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page, "and a browser would load nothing if it asked"
    harmless = Elements(render_page(full_report("word")))
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in harmless.tags], "texts make no element"


def test_labels_are_in_both_languages():
    page = render_page(full_report("word"))
    for english, chinese in (
        ("Samples", "样本"),
        ("Images that look alike", "相似图像"),
        ("Lengths", "长度"),
        ("Tokenizer coverage of the answers", "分词器覆盖"),
    ):
        assert re.search(rf'{english}<span lang="zh">{chinese}</span>', page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_a_report_with_nothing_in_it():
    page = render_page(Report("empty", "stack: {}"))
    assert "Nothing found" in page and "<h2>Samples" not in page and "<svg" not in page


def test_the_verdict_is_the_worst():
    assert full_report().verdict == "error"
    assert Report("a", "", [Finding(WARNING, "w"), Finding("note", "n")]).verdict == "warning"
    assert Report("a", "", [Finding("note", "n")]).verdict == "ok"


def test_the_histogram_has_its_cut():
    found = histogram([10, 20, 20, 150], 100)
    assert found.longest == 150 and found.beyond == 1 and len(found.bars) == BARS
    assert found.cut == pytest.approx(100 / 151 * WIDTH, abs=0.01)
    assert sum(bar.cut for bar in found.bars if bar.height) == 1
    assert max(bar.height for bar in found.bars) == 160
    assert histogram([], 100) is None
    short = histogram([3, 3], None)
    assert short.cut is None and len(short.bars) == 4 and short.beyond == 0
    assert [bar.title for bar in short.bars] == [f"{n}: 0 rows" for n in ("0 tokens", "1 token", "2 tokens")] + [
        "3 tokens: 2 rows"
    ]
    assert next(bar.title for bar in found.bars if bar.height) == "8 – 11 tokens: 1 row"


def test_boxes_are_drawn_on_their_picture_where_they_lie():
    picture = thumbnail(
        Image.new("RGB", (40, 30), "red"), [([0.25, 0.2, 0.75, 0.9], "一只猫", "box 1"), ([0.5, 0.5], "", "")]
    )
    page = Elements(
        render_page(Report("r", "", samples=[Shown("1", "s", images=[picture, thumbnail(Image.new("RGB", (8, 8)))])]))
    )
    svg, image, rect, circle = (
        next(each for tag, each in page.tags if tag == name) for name in ("svg", "image", "rect", "circle")
    )
    assert (svg["viewbox"], image["href"], image["width"]) == ("0 0 40 30", picture.data_uri, "40")
    assert [rect[name] for name in ("x", "y", "width", "height")] == ["10.0", "6.0", "20.0", "21.0"]
    assert (circle["cx"], circle["cy"]) == ("20.0", "15.0")
    assert "一只猫" in page.text and sum(tag == "img" for tag, _ in page.tags) == 1
