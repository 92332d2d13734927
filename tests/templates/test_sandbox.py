"""What is wrong with a template is said with its file and line, before and while it runs; and it reaches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.template_texts import ENGLISH, refusal
from vlm_sft.templates.template import load_template


def test_template_without_markers(tmp_path: Path) -> None:
    file = tmp_path / "bare.jinja"
    file.write_text("{# {% generation %} #}{{ messages }}", encoding="utf-8")  # markers in a comment are none
    expected = (
        f"the chat template {file} has no generation markers; wrap what the assistant says in "
        "{% generation %} … {% endgeneration %} so that it is known what to train on."
    )
    assert refusal(file) == refusal(str(file)) == refusal(file, ENGLISH) == expected
    assert refusal("{{ messages }}").startswith("the chat template has no generation markers;")


def test_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("{% generation %}\n{% endgeneration %}\n{% if %}", encoding="utf-8")
    assert refusal(file).startswith(f"the chat template {file}, line 3: ")
    file.write_text("{% generation %}\n{{ 'x' | no_such_filter }}{% endgeneration %}", encoding="utf-8")
    assert refusal(file).startswith(f"the chat template {file}, line 2: No filter named 'no_such_filter'")
    file.write_text("{% generation %}\n{{ 'x' }}", encoding="utf-8")
    assert f"the chat template {file}, line " in refusal(file)


def test_running_errors_name_the_line() -> None:
    broken = "{% generation %}x{% endgeneration %}\n\n{{ messages[0]['content'] + 'x' }}"
    assert refusal(broken, ENGLISH).startswith("the chat template, line 3 fails with TypeError: ")
    misspelt = "{% generation %}x{% endgeneration %}\n{{ eos_tokn }}"
    assert "line 2 fails with UndefinedError: 'eos_tokn' is undefined" in refusal(misspelt, ENGLISH)
    picky = "{% generation %}{% endgeneration %}{{ raise_exception('I want a system message.') }}"
    assert refusal(picky, ENGLISH) == "the chat template, line 1: I want a system message."
    assert load_template(picky) == picky  # it may refuse the probe: that is not a fault of its own


ESCAPES = [
    "''.__class__",
    "''.__class__.__mro__[1].__subclasses__()",
    "''['__class__']",
    "''|attr('__class__')",
    "cycler.__init__.__globals__",
    "lipsum.__globals__['os'].popen('id').read()",
    "namespace.__init__.__globals__",
    "namespace(__class__=1)",
    "dict.__class__",
    "raise_exception.__globals__",
    "strftime_now.__globals__",
    "self.__init__.__globals__",
    "messages.append(1)",
    "messages[0].update({'role': 'system'})",
    "'{0.__class__}'.format('')",
    "('{0.__class__}'|string).format_map({'0': ''})",
    "range(10000000)|list",
    "(joiner.__init__ ~ '')",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_sandbox_holds(escape: str) -> None:
    message = refusal("{% generation %}{% endgeneration %}{{ " + escape + " }}", ENGLISH)
    assert message.startswith("the chat template, line 1 ")
