"""Values in the words of a message."""

from __future__ import annotations

import pytest

from vlm_sft.base.words import (
    closest,
    duration,
    first_line,
    gib,
    kind,
    language_of,
    one_line,
    reason_of,
    short,
    short_count,
    whole_number,
)


def test_closest() -> None:
    assert closest("max_step", ["max_steps", "min_steps"]) == "max_steps"
    assert closest("qqq", ["max_steps"]) is None


def test_words_for_values():
    assert [kind(value) for value in (None, True, 1.5, "", [], {})] == [
        "null",
        "true or false",
        "a number",
        "text",
        "a list",
        "an object",
    ]
    assert kind(b"") == "of type bytes"
    assert short("a\n b" + "c" * 99) == "a b" + "c" * 34 + "..."
    assert short("猫\ud800") == "猫?", "half a character is no text that can be printed"


def test_a_whole_number_is_one_that_python_reads():
    assert [whole_number(text) for text in ("0", "12", "007")] == [0, 12, 7]
    for text in ("", "-1", "²", "٣", "1.0", "1_0", " 1", "9" * 19, "9" * 5000):
        assert whole_number(text) is None


def test_what_an_error_says_is_put_on_one_line():
    error = ValueError(" the key\n  猫 is wrong.\n")
    assert one_line(error) == "the key 猫 is wrong."
    assert first_line(error) == "the key"
    assert reason_of(error) == "the key 猫 is wrong"
    assert first_line(KeyError()) == reason_of(KeyError()) == "KeyError", "an error that says nothing has a kind"


def test_the_reason_of_the_system_comes_without_number_and_path():
    assert reason_of(FileNotFoundError(2, "No such file or directory", "猫.png")) == "No such file or directory"


@pytest.mark.parametrize(
    ("number", "words"), [(999_999, "999,999"), (1_000_000, "1.00M"), (13_040_000, "13.0M"), (6_738_000_000, "6.74B")]
)
def test_counts_have_three_digits(number, words):
    assert short_count(number) == words


def test_sizes_and_times():
    assert [gib(size) for size in (2**20, 2**28, 3 * 2**30)] == ["1.0 MiB", "0.25 GiB", "3.00 GiB"]
    assert [duration(seconds) for seconds in (0.4, 750, 86_399, 198_000)] == ["0:00:00", "0:12:30", "23:59:59", "2d 7h"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "en"),
        ("3, 4!", "en"),
        ("a red 3 at the top left", "en"),
        ("Ein roter Bus fährt über die Brücke.", "en"),
        ("左上角是红色的3", "zh"),
        ("漢字與繁體", "zh"),
        ("这是一张 iPhone 拍的照片", "zh"),
        ("The sign says 中国", "en"),
        ("赤い3があります", "en"),
        ("왼쪽 위에 漢字", "en"),
        ("𠮷", "zh"),
    ],
)
def test_language_of(text, language):
    assert language_of(text) == language


def test_a_long_text_is_decided_by_its_start():
    assert language_of("猫" * 3000 + "x" * 100_000) == "zh"
