"""Rows before training: which are looked at, and what is told of them."""

from __future__ import annotations

import base64
import io

import pytest
from datasets import Dataset
from PIL import Image

from support.conversations import TOKENS, make_processor, make_row, turn
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.data.dataset import ROW_FEATURES
from vlm_sft.data.ledger import Ledger, SourceLedger
from vlm_sft.preflight.checks import Evidence
from vlm_sft.preflight.page import Report, render_page
from vlm_sft.preflight.samples import (
    Share,
    glance,
    look_at,
    sample_rows,
    shares_of_languages,
    shares_of_sources,
    show,
    show_samples,
    whole_lengths,
)
from vlm_sft.recipe.sections import Data
from vlm_sft.rows.merging import merged
from vlm_sft.rows.messages import box_part, packed


@pytest.fixture(scope="module")
def collator():
    return MultimodalCollator(make_processor("ziya"), max_length=60)


def rows_of(photos, *answers, source="s"):
    rows = [make_row(turn(f"q{n}", answer, images=1), photos, n) for n, answer in enumerate(answers)]
    return [{**row, "source": source, "id": f"{source}/{n}"} for n, row in enumerate(rows)]


def dataset(rows):
    return Dataset.from_list(rows, features=ROW_FEATURES)


def test_rows_are_spread_evenly_and_repeats_are_left_out(photos):
    rows = dataset(rows_of(photos, *map(str, range(9))))
    assert [row["id"] for row in sample_rows(rows, 3)] == ["s/0", "s/4", "s/8"]
    assert len(sample_rows(rows, 100)) == 9
    assert [row["id"] for row in sample_rows(rows.select([0, 1, 0, 1, 2]))] == ["s/0", "s/1", "s/2"]


def test_lengths_are_those_before_the_cut(collator, photos):
    long = make_row(turn("q", "word " * 8, images=1) + turn("again", "word " * 40), photos)
    assert collator.encode(long).turns_lost == 1
    (length,) = whole_lengths([long], collator)
    assert length > 60 and collator.max_length == 60


def test_a_sample_is_what_the_collator_makes(collator, photos):
    shown = show(make_row(turn("这是什么？", "一只猫", images=1), photos), collator)
    assert shown.tokens == len([i for group in shown.groups for i in group.ids])
    assert shown.learned == sum(len(group.ids) for group in shown.groups if group.learned) > 3
    header, data = shown.images[0].data_uri.split(",")
    assert header == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 30)
    broken = show(make_row(turn("q", "a", images=1), ["none.png"]), collator)
    assert "none.png" in broken.problem and broken.groups == []


def test_questions_that_share_an_image_are_shown_behind_it_each_with_its_answer_and_no_word_between(collator, photos):
    collator = MultimodalCollator(collator.processor)
    rows = [make_row(turn(f"{n}号是什么？", f"a {n}", images=1), photos, n) for n in range(3)]
    shown = show(merged(rows, independent=True), collator)
    alone = [show(row, collator) for row in rows]
    assert shown.tokens < sum(each.tokens for each in alone), "the image once"
    assert shown.learned == sum(each.learned for each in alone) and len(shown.images) == 1
    assert shown.questions == 3 and shown.tokens == sum(each.tokens for each in alone) - 2 * shown.prefix
    assert not any(each.questions or each.prefix for each in alone)
    page = render_page(Report("r", "", samples=[shown, alone[0]]))
    assert page.count(f"3 questions behind {shown.prefix} tokens that they share, none of which sees another") == 1
    text = "".join(group.text for group in shown.groups).replace(" ", "")
    places = [text.find(part) for n in range(3) for part in (f"{n}号是什么？", f"a{n}")]
    assert places == sorted(places) and places[0] >= 0, text


def test_boxes_lie_on_the_picture_with_their_words(collator, photos):
    collator = MultimodalCollator(collator.processor)
    cat, place = {"type": "ref", "text": "一只猫"}, "objects.bbox[0]"
    row = make_row(turn("在哪？", "x", images=1), photos)  # 40 x 30 pixels
    row["messages"][1]["content"] = [
        cat,
        box_part([10, 6, 30, 27], "pixels", 0, place),
        box_part([0.5, 0.5], "unit", 0, "k"),
    ]
    for each in (row, {**row, "extras": packed(row)}):
        shown = show(each, collator)
        boxed, point = shown.images[0].boxes
        assert boxed[:5] == (10.0, 6.0, 20.0, 21.0, "一只猫") and boxed.title == f"{place}: [10, 6, 30, 27] (pixels)"
        assert point[:4] == (20.0, 15.0, 0, 0)
    assert "一只猫[0.250,0.200,0.750,0.900;0.500,0.500]" in "".join(
        g.text for g in shown.groups if g.role == "assistant"
    )
    outside = {
        **row,
        "messages": [
            row["messages"][0],
            {"role": "assistant", "content": [box_part([0, 0, 99, 9], "pixels", 0, place)]},
        ],
    }
    assert f'"{place}" is [0, 0, 99, 9] (pixels), outside of its picture of 40 x 30' in show(outside, collator).problem


def test_samples_are_of_every_source(collator, photos):
    rows = rows_of(photos, *"abcdefgh", source="one") + rows_of(photos, "i", source="two")
    shown = show_samples(rows, collator, 4)
    assert {sample.source for sample in shown} == {"one", "two"} and len(shown) <= 4


def test_samples_of_rows_that_take_turns_are_of_each_kind(collator, photos):
    """A file of questions in two languages in turn; even steps met one of them, and of 15 rows only the first half."""
    rows = [row for k in range(8) for row in rows_of(photos, f"a cat {k}", f"一只猫{k}")]
    for number, row in enumerate(rows):
        row["id"] = str(number)
    for these in (rows, rows[:15]):
        shown = [int(sample.id) for sample in show_samples(these, collator, 8)]
        assert len(shown) == 8 and {place % 2 for place in shown} == {0, 1} and max(shown) > 7
        assert shown == [int(sample.id) for sample in show_samples(these, collator, 8)]


def test_evidence_is_filled(collator, photos):
    evidence = Evidence()
    look_at(
        evidence, collator, dataset(rows_of(photos, "a cat", "一只猫")), [dataset(rows_of(photos, "b", source="e"))]
    )
    assert len(evidence.rows) == 2 and [text for _, text in evidence.answers()] == ["a cat", "一只猫"]
    assert set(evidence.coverage) == {"en", "zh"} and evidence.ends_with == "</s>"
    assert [leak.held_out for leak in evidence.leaks] == ["e/0"]
    assert collator.processor.num_image_tokens == TOKENS


def test_a_glance_reads_texts_alone(collator, photos):
    (found,) = glance(dataset(rows_of(photos, "a cat", "two USER: dogs")), collator.processor)
    assert str(found).startswith("warning: 1 answer holds the role marker 'USER:'") and str(found).endswith("(s/1)")
    assert glance(iter(()), collator.processor) == [], "a stream is not read twice"


def test_texts_are_read_without_opening_an_image(collator, tmp_path, monkeypatch):
    photos = [str(tmp_path / f"{n}.png") for n in range(30)]
    for path in photos:
        Image.new("RGB", (4, 4)).save(path)
    rows = [make_row(turn("q", f"picture {n}", images=1), photos[n:], n) for n in range(30)]
    opened = []

    def counted(function):
        return lambda file, *how, **more: opened.append(str(file)) or function(file, *how, **more)

    for name, function in (("builtins.open", open), ("PIL.Image.open", Image.open)):
        monkeypatch.setattr(name, counted(function))
    Image.open(photos[0]).close()
    assert opened.count(photos[0]) == 2, "the count works"
    opened.clear()
    glance(dataset(rows), collator.processor)
    evidence = Evidence()
    look_at(evidence, collator, dataset(rows), [])
    assert len(evidence.rows) == 30 and not set(opened) & set(photos)


def data(**changes):
    one, two = ({"path": name, "format": "caption"} for name in ("one.jsonl", "two.jsonl"))
    return Data(train=[{**one, "weight": 3}, two], **changes)


def test_shares_are_planned_and_drawn():
    sources = {
        "one": SourceLedger(read=110, used=60, repeated=15, rejected={"missing": 10}),
        "two": SourceLedger(read=100, used=25),
    }
    shares = shares_of_sources(data(sampling="weights"), Ledger(0.5, sources), [])
    assert shares == [Share("one", 0.75, 0.75, 75), Share("two", 0.25, 0.25, 25)]


def test_shares_of_a_stream_are_drawn_from_what_came(photos):
    rows = rows_of(photos, "a", "b", "c", source="one") + rows_of(photos, "d", source="two")
    shares = shares_of_sources(data(streaming=True), Ledger(), rows)
    assert shares == [Share("one", 0.75, 0.75, 3), Share("two", 0.25, 0.25, 1)]


def test_languages_are_planned_where_the_recipe_says_so(photos):
    rows = rows_of(photos, "a cat", "一只猫", "二只狗", "三")
    assert shares_of_languages(data(), rows) == [Share("en", None, 0.25, 1), Share("zh", None, 0.75, 3)]
    assert [share.planned for share in shares_of_languages(data(languages={"zh": 1, "en": 1}), rows)] == [0.5, 0.5]
    assert shares_of_sources(data(languages={"zh": 1, "en": 1}), Ledger(), rows)[0].planned is None
