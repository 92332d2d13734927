"""Which language a person is spoken to in: English, or Chinese where the environment asks for it."""

from __future__ import annotations

import os
from typing import Literal

ENVIRONMENT = "VLM_SFT_LANG"
Language = Literal["en", "zh"]


def spoken_language() -> Language:
    """`VLM_SFT_LANG` where it names one of the two (`zh`, `zh_CN.UTF-8`, `en`), else the locale's."""
    own = os.environ.get(ENVIRONMENT, "").lower()
    if own.startswith(("zh", "en")):
        return "zh" if own.startswith("zh") else "en"
    locale = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def in_words(english: str, chinese: str) -> str:
    """The one of two texts in the language that is spoken."""
    return chinese if spoken_language() == "zh" else english
