"""Chinese, or not."""

from __future__ import annotations

import pytest

from vlm_sft.base.languages import language_of


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
