"""Which language a person is spoken to in."""

from __future__ import annotations

import pytest

from vlm_sft.spoken.language import in_words, spoken_language


@pytest.mark.parametrize(
    ("environment", "language"),
    [({}, "en"), ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
     ({"LANG": "de_DE.UTF-8", "VLM_SFT_LANG": "zh"}, "zh"), ({"LANG": "zh_TW", "VLM_SFT_LANG": "en"}, "en"),
     ({"LANG": "zh_CN", "VLM_SFT_LANG": "fr"}, "zh"), ({"VLM_SFT_LANG": "ZH_cn"}, "zh")],
)  # fmt: skip
def test_the_environment_decides(environment, language, monkeypatch):
    for name in ("VLM_SFT_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert spoken_language() == language
    assert in_words("yes", "是") == {"en": "yes", "zh": "是"}[language]
