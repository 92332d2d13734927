"""What runs in the process of templates: one line of questions, one of answers, within bounds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

from vlm_sft.templates.process import SERVING
from vlm_sft.templates.serve import as_json, bounded, serve

SOURCE = "{% if n == 1 %}{% set x = 'a' * 10 ** 9 %}{% endif %}{% generation %}{{ n }}{% endgeneration %}"


def served(*given):
    asked = {"work": "render", "key": "k", "label": "it", "seconds": 5, "source": SOURCE}
    asked["given"] = [{"n": n, "generation_marks": ["", ""]} for n in given]
    program = f"from {SERVING} import serve; serve({2**28}, {os.getpid()})"
    line = as_json(asked).encode("utf-8", "surrogatepass") + b"\n"
    done = subprocess.run([sys.executable, "-c", program], input=line, capture_output=True, timeout=60)
    return json.loads(done.stdout) if done.stdout else None


def test_each_question_of_a_line_has_its_answer_in_order():
    assert served("猫\ud83d", "a", "\ud83d\ude42") == [{"found": n} for n in ("猫\ud83d", "a", "\ud83d\ude42")]


def test_a_line_with_one_that_takes_too_much_is_not_answered():
    assert served("a", 1, "b") is None


def test_bounds_hold_inside_and_end_with_it():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounded():
        assert resource.getrlimit(resource.RLIMIT_AS) != before
    assert resource.getrlimit(resource.RLIMIT_AS) == before and serve.__module__ == SERVING
