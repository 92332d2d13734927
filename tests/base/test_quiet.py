"""What libraries say is left out where a user can do nothing about it; what they warn of otherwise stays."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import logging, os, warnings
from vlm_sft.base.quiet import quiet_libraries
quiet_libraries()
from transformers.utils import logging as transformers_logging
warnings.warn("old call", DeprecationWarning)
warnings.warn("old name", FutureWarning)
warnings.warn("a loss is odd", UserWarning)
logging.getLogger("bitsandbytes").warning("a faster kernel exists")
logging.getLogger("bitsandbytes").error("a kernel is broken")
transformers_logging.get_logger("transformers.x").warning("a note of transformers")
print(os.environ["TOKENIZERS_PARALLELISM"], transformers_logging.is_progress_bar_enabled())
"""


def said(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**kept, **environment}, check=True
    )


def test_notes_and_deprecations_are_left_out_and_errors_stay():
    result = said()
    for noise in ("old call", "old name", "faster kernel", "a note of transformers"):
        assert noise not in result.stderr
    assert "a loss is odd" in result.stderr and "a kernel is broken" in result.stderr
    assert result.stdout.split() == ["false", "False"]


def test_what_the_user_has_set_stays():
    assert said(TOKENIZERS_PARALLELISM="true").stdout.split()[0] == "true"
