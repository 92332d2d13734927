"""A rerun goes on where it was, and what is kept is what the threshold says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from vlm_sft.base.errors import UserError
from vlm_sft.prepare.filtering import Score, draw_histogram, kept_rows, score_rows, text_of, threshold_of_share

# ------------------------------------------------------------------------------------------------------------ scoring


def row(number: int, *images: str, answer: str = "a cat") -> dict:
    messages = [
        {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": "\nwhat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"id": f"s/{number}", "source": "s", "messages": messages,
            "images": [{"path": path, "bytes": None} for path in images]}  # fmt: skip


class Redness:
    """Scores by the first pixel, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images, texts):
        self.asked += len(images)
        assert set(texts) <= {"a cat"}
        return [image.getpixel((0, 0))[0] / 255 for image in images]


ABOUT = {"model": "redness", "sources": []}


def test_scores_are_means_over_images_and_errors_are_kept_beside(photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    rows = [row(1, photos[0]), row(2, photos[0], photos[4]), row(3), row(4, str(tmp_path / "broken.png"))]
    found = score_rows(rows, Redness(), tmp_path / "scores.jsonl", ABOUT, batch_size=3)
    assert [score.score for score in found] == [0.0, pytest.approx(60 / 255), None, None]
    assert [score.error is None for score in found] == [True, True, True, False] and "HTML" in found[3].error
    assert [r["id"] for r in kept_rows(rows, found, 0.1)] == ["s/2", "s/3"]


class Choosy(Redness):
    """Raises what image processors raise, for pictures of one pixel's height."""

    processor = SimpleNamespace(image_processor=SimpleNamespace(size={"shortest_edge": 224}, do_resize=True))

    def __call__(self, images, texts):
        if any(image.height == 1 for image in images):
            raise ZeroDivisionError
        return super().__call__(images, texts)


def test_a_picture_that_the_scorer_refuses_is_the_error_of_its_row(photos, tmp_path):
    line, thread = str(tmp_path / "线.png"), str(tmp_path / "thread.png")
    Image.new("RGB", (60, 1)).save(line)
    Image.new("L", (9000, 2)).save(thread)
    rows = [row(1, photos[0]), row(2, photos[0], line), row(3, thread), row(4, photos[4])]
    found = score_rows(rows, Choosy(), tmp_path / "scores.jsonl", ABOUT, batch_size=4)
    assert [score.score for score in found] == [0.0, None, None, pytest.approx(120 / 255)]
    assert found[1].error.startswith("s/2: the image ") and "is refused by the scoring model (ZeroDi" in found[1].error
    assert "has 9,000 x 2 pixels, of which the image processor would make 1,008,000 x 224" in found[2].error

    def broken(images, texts):
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        score_rows(rows[:1], broken, tmp_path / "other.jsonl", ABOUT)


def test_a_rerun_goes_on_where_it_was(photos, tmp_path):
    """Also after a kill in the middle of a line."""
    rows, path = [row(i, photos[i]) for i in range(8)], tmp_path / "scores.jsonl"
    whole = score_rows(rows, Redness(), path, ABOUT, batch_size=2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:9])
    scorer = Redness()
    assert score_rows(rows, scorer, path, ABOUT, batch_size=2) == whole
    assert scorer.asked == 3 and path.read_bytes() == b"".join(lines)
    assert score_rows(rows, scorer, path, ABOUT) == whole and scorer.asked == 3


def test_scores_of_something_else_are_refused(photos, tmp_path):
    rows, path = [row(i, photos[i]) for i in range(3)], tmp_path / "scores.jsonl"
    score_rows(rows, Redness(), path, ABOUT)
    with pytest.raises(UserError, match=r"belongs to .*redness.* not to .*other"):
        score_rows(rows, Redness(), path, {**ABOUT, "model": "other"})
    with pytest.raises(UserError, match="has 's/0' where the rows have 's/2': give another file"):
        score_rows(rows[::-1], Redness(), path, ABOUT)
    with pytest.raises(UserError, match="has 's/2' where the rows have 'no row'"):
        score_rows(rows[:2], Redness(), path, ABOUT)
    path.write_text(json.dumps({"id": 1, "answer": "x"}) + "\n" + json.dumps({"id": 2}) + "\n")
    with pytest.raises(UserError, match="is not a file of scores"):
        score_rows(rows, Redness(), path, ABOUT)


def test_what_is_compared():
    both = row(1, "a.png", answer="a  cat\nsits")
    assert text_of(both, ("assistant",)) == "a cat sits" and text_of(both, ("user", "assistant")) == "what? a cat sits"


# ------------------------------------------------------------------------------------------------------------- choice


def test_a_share_becomes_the_threshold_that_keeps_it():
    scores = [Score(str(i), i / 10, None) for i in range(10)] + [Score("text", None, None), Score("bad", None, "no")]
    for keep in (0.1, 0.3, 0.5, 1.0):
        limit = threshold_of_share(scores, keep)
        kept = sum(score.score is not None and score.score >= limit for score in scores)
        assert keep * 10 <= kept <= keep * 10 + 1
    with pytest.raises(UserError, match="No row has a score"):
        threshold_of_share(scores[-2:], 0.5)


def test_the_histogram_is_a_picture(tmp_path):
    scores = [Score(str(i), (i % 17) / 17, None) for i in range(100)]
    with Image.open(draw_histogram(scores, tmp_path / "h.png", 0.4, "clip")) as picture:
        assert picture.size[0] > 600 and len(set(picture.convert("L").getdata())) > 20


@pytest.mark.parametrize(
    "line",
    ['{"id": "s/1", "score": "1", "error": null}', '{"id": "s/1", "score": [1], "error": null}',
     '{"id": "s/1", "score": NaN, "error": null}', '{"id": "s/1", "score": 1e999, "error": null}',
     '{"id": "s/1", "score": 1' + "0" * 400 + ', "error": null}', '{"id": 1, "score": 1, "error": null}',
     '{"id": "s/1", "score": 1, "error": 5}', "[" * 100_000, "null", "[]"],
    ids=range(10),
)  # fmt: skip
def test_lines_that_are_no_scores_are_one_sentence(line, tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({**ABOUT, "text": "answers"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match="is not a file of scores: give another name"):
        score_rows([row(1)], Redness(), path, ABOUT)


def test_what_a_file_of_scores_says_of_itself_is_not_repeated_without_end(tmp_path):
    (tmp_path / "scores.jsonl").write_text(json.dumps({"model": "x" * 100_000}) + "\n")
    with pytest.raises(UserError, match="belongs to") as caught:
        score_rows([row(1)], Redness(), tmp_path / "scores.jsonl", ABOUT)
    assert len(str(caught.value)) < 1500
