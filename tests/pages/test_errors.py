"""The page of errors: every wrong answer, the surest first; filters that a browser runs, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from PIL import Image

from support.browser import EVIL, Elements, opened
from vlm_sft.metrics.intervals import mean_of
from vlm_sft.pages import errors
from vlm_sft.pages.against import against
from vlm_sft.pages.errors import confusion_of, confusions_by_kind, draw, error_page, files_of, kinds_of, shade
from vlm_sft.pages.records import entries_of, sheet_of


def record(number, score=0.0, **changes):
    return {
        "id": f"q{number}", "images": [], "question": "什么颜色？", "choices": None, "answers": ["red"], "kind": None,
        "answer": "red" if score else "blue", "answer_blank": None, "score": score, "score_blank": None,
        "confidence": [["b", 0.9], ["lue", 0.5]], **changes,
    }  # fmt: skip


def sheet(*records, name="gqa"):
    def of(key):
        total = mean_of([one[key] or 0.0 for one in records])
        low, high = total.interval()
        return {"exact_match": {"value": total.score(), "low": low, "high": high}}

    return sheet_of(name, records, {"scores": of("score"), "scores_blank": of("score_blank")})


@pytest.fixture
def full(tmp_path):
    """A page with a strange text in every place where a stranger may put one, compared with another bundle."""

    def make(text=EVIL):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
        image = str(tmp_path / "a.png")
        verdicts = [{"order": text, "reference": 8, "answer": 2, "text": text},
                    {"order": "answer first", "reference": None, "answer": None, "text": text},
                    {"order": "alone", "reference": None, "answer": None, "text": "", "error": text}]  # fmt: skip
        rows = [
            record(0, images=[image], question=text, choices={text: text}, answers=[text], kind=text, answer=text,
                   answer_blank=text, confidence=[[text, 0.3]], verdicts=verdicts),
            record(1, 1.0, images=[image, "sha256:00"], answers=[text], confidence=[[text, 0.95]], kind="数量"),
            record(2, 0.0, score_blank=1.0, answer_blank="red", confidence=[["blue", 0.99]]),
            record(3, 0.0, error=text, confidence=None), record(4, 0.6), record(5, 1.0, id=text),
        ]  # fmt: skip
        one = sheet(*rows)
        against(one, [{**row, "answer": text, "score": 1 - row["score"]} for row in rows], text)
        one.notes.append(text)
        one.warnings.append(text)
        note = {"text": text, "warn": True}
        tables = [{"title": text, "chinese": text, "columns": [(text, text)], "rows": [[text]], "notes": [note]}]
        return error_page(text, [one], text, tables=tables)

    return make


def test_long_answers_are_cut_in_the_table_and_only_doubts_are_coloured():
    said = "because there are many vehicles on the street"
    one = sheet(*[record(n, 1.0) for n in range(2)], *[record(n, answers=["green"], answer=said) for n in (3, 4)])
    one.notes.append("None of its pictures was seen.")
    one.warnings.append("Two were.")
    page = error_page("x", [one])
    assert f'<th title="{said}">{said[:31]}…</th>' in page and '<th title="green">green</th>' in page
    assert '<p class="soft">None of its' in page and '<p class="warning">Two were.</p>' in page


def articles(page):
    return [given for tag, given in page.tags if tag == "article"]


@pytest.mark.slow
def test_a_browser_filters_and_runs_nothing_else(full, tmp_path):
    page = Elements(opened(full(), tmp_path))
    assert f"Evaluation: {EVIL}" in page.text, "the title is text, and no script of a row changed it"
    shown = [given["data-what"] for given in articles(page) if "hidden" not in given]
    assert shown and all("wrong" in what.split() for what in shown), "at first the wrong ones"
    assert len(shown) < len(articles(page)) == 6 and f"{len(shown)} / 6" in page.text
    pictures = [given["src"][:23] for tag, given in page.tags if tag == "img"]
    assert pictures == ["data:image/jpeg;base64,"] * 2, "the second is the first once more, put there by the script"
    worse = full().replace('value="wrong" selected', 'value="wrong"').replace('value="worse"', 'value="worse" selected')
    shown = [given["data-what"] for given in articles(Elements(opened(worse, tmp_path))) if "hidden" not in given]
    assert len(shown) == 3 and all("worse" in what.split() for what in shown)


@pytest.mark.slow
def test_a_phone_shows_the_page_without_scrolling_sideways(full, tmp_path):
    page = re.sub(r"<meta http-equiv.*?>", "", full("a_very_long_word" * 20 + " 猫" * 90))
    measure = "<script>document.title = `${document.documentElement.scrollWidth}/${innerWidth}`</script></body>"
    found = re.search(r"(\d+)/(\d+)", opened(page.replace("</body>", measure), tmp_path, width=500))
    assert found and int(found[1]) <= int(found[2]) <= 500


def test_no_markup_comes_from_answers_and_nothing_is_loaded(full):
    elements, harmless = Elements(full()), Elements(full("word"))
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in harmless.tags], "texts make no element"
    assert sum(tag == "script" for tag, _ in elements.tags) == 1
    assert not [name for _, given in elements.tags for name in given if name.startswith("on")]
    assert all(given["src"].startswith("data:image/jpeg;base64,") for _, given in elements.tags if "src" in given)
    assert "url(" not in full() and "@import" not in full() and "default-src 'none'" in full()
    assert elements.text.count(EVIL) > 20


def test_the_surest_wrong_answer_is_first_and_right_ones_are_last():
    rows = [record(i, confidence=[["blue", share]]) for i, share in enumerate((0.2, 0.9, 0.6))]
    rows += [record(3, 1.0, confidence=[["red", 0.99]]), record(4, confidence=None)]
    shown = draw([sheet(*rows)], files_of).shown
    assert [item.entry.id for item in shown] == ["q1", "q2", "q0", "q4", "q3"]


def test_what_there_is_no_room_for_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "SHOWN", 4)
    monkeypatch.setattr(errors, "RIGHT", 1)
    monkeypatch.setattr(errors, "PICTURES", 2)
    names = []
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        names.append(str(tmp_path / f"{i}.png"))
    wrong = [record(i, images=[names[i]], confidence=[["b", 1 - i / 9]]) for i in range(6)]
    found = draw([sheet(*wrong, *[record(9 + i, 1.0) for i in range(3)])], files_of)
    assert [item.entry.id for item in found.shown] == ["q0", "q1", "q2", "q3"]
    assert found.left_out[:2] == [
        "2 more wrong or changed answers, of which the model was less sure.",
        "3 right answers.",
    ]
    assert found.left_out[2].startswith("2 pictures: a page holds 2")
    few = draw([sheet(wrong[0], *[record(9 + i, 1.0) for i in range(3)])], files_of)
    assert len(few.shown) == 2 and few.left_out == ["2 right answers."]


def test_pictures_that_are_gone_or_in_a_table_are_said(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    lost = [str(tmp_path / "none.png"), str(tmp_path / "broken.png"), "sha256:00"]
    found = draw([sheet(record(0, images=lost))], files_of)
    assert found.shown[0].pictures == [None] * 3 and found.left_out == ["3 pictures that cannot be read any more."]
    inside = draw([sheet(record(0, images=["sha256:00"]))], lambda entry: [Image.new("RGB", (8, 8))])
    assert inside.shown[0].pictures[0].startswith("data:image/jpeg;base64,") and inside.left_out == []


def test_what_is_mixed_up_is_shown_of_each_kind_for_itself():
    rows = [record(i, float(i < 3), answers=[right], answer=right if i < 3 else "four 四", kind=kind)
            for i, (right, kind) in enumerate([("two", "count"), ("two", "count"), ("red", "color"), ("three", "count"),
                                               ("three", "count"), ("red", "color")])]  # fmt: skip
    found = confusions_by_kind(sheet(*rows).entries)
    assert list(found) == ["count"]  # of colours one answer alone is right
    assert found["count"].rows == ["two", "three"] and found["count"].counts[1][-1] == 2
    assert confusions_by_kind(sheet(record(0), record(1)).entries) == {}
    assert "<summary>count</summary>" in error_page("x", [sheet(*rows)])


def test_kinds_have_intervals_and_the_worst_is_first():
    rows = [record(i, float(i % 2), kind="color", score_blank=0.0) for i in range(8)]
    rows += [record(10 + i, 0.0, kind="数量") for i in range(3)]
    first, second = kinds_of(sheet(*rows).entries)
    assert (first.name, first.questions, first.mean, first.blank) == ("数量", 3, 0.0, None)
    assert second.mean == 0.5 and second.low < 0.5 < second.high and second.blank == 0.0
    assert kinds_of(sheet(record(0), record(1)).entries) == []


def test_what_is_mixed_up_with_what():
    said = [("Red.", "red", 1.0), ("red", "blue", 0.0), ("red", "blue", 0.0), ("蓝", "蓝", 1.0), ("蓝", "red", 0.0)]
    rows = [record(i, score, answers=[right], answer=answer) for i, (right, answer, score) in enumerate(said)]
    found = confusion_of(sheet(*rows).entries)
    assert found.rows == ["red", "蓝"] and found.columns == ["red", "蓝", "blue"]
    assert found.counts == [[1, 0, 2], [1, 1, 0]] and found.marks == [[True, False, False], [False, True, False]]
    assert confusion_of(sheet(*[record(i, answers=[f"caption {i}"]) for i in range(9)]).entries) is None


def test_rare_answers_are_one_column(monkeypatch):
    monkeypatch.setattr(errors, "ANSWERS", 2)
    rows = [record(i, answers=[right], answer=f"{i}") for i, right in enumerate(["a", "a", "b", "b", "c", "c"])]
    found = confusion_of(sheet(*rows).entries)
    assert found.rows == ["a", "b"] and found.columns == ["a", "b", "0", "…"]
    assert found.counts == [[0, 0, 1, 1], [0, 0, 0, 2]]


def test_pieces_are_coloured_by_their_probability():
    assert [shade(share) for share in (1.0, 0.9, 0.89, 0.5, 0.49, 0.0)] == [
        "sure",
        "sure",
        "so",
        "so",
        "unsure",
        "unsure",
    ]


def test_scores_beyond_one_are_no_shares():
    one = sheet(record(0))
    one = replace(one, scores={"CIDEr": {"value": 1.2345, "low": 1.1, "high": 1.4}}, blank={})
    page = error_page("b", [one])
    assert "1.23" in page and "123" not in page.replace("1.2345", "") and 'class="bar"' not in page


def test_an_answer_without_confidence_is_shown_as_it_is():
    page = error_page("b", [sheet(record(0, confidence=None, answer="<b>猫</b>"))])
    assert "<dd>&lt;b&gt;猫&lt;/b&gt;</dd>" in page and "stand in the order of their file" in page
    assert next(entries_of("gqa", [record(0, confidence=None)])).sure is None
