"""What is wrong with a template is said with its file and line, before and while it runs; and it reaches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.template_texts import ENGLISH, refusal
from vlm_sft.base.errors import UserError
from vlm_sft.templates.sandbox import MARKS, compile_template, run_template
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


def run(body: str, **variables) -> str:
    marked = body + "{% generation %}a{% endgeneration %}"
    return run_template(compile_template(marked, "it"), "it", **{MARKS: ("", ""), **variables})


WAYS_OUT = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a helper": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of joiner": "{{ joiner.__init__.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "str.format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "str.format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format kept for later": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "the attr filter": "{{ ''|attr('__class__') }}",
    "the attr filter, in pieces": "{{ ''|attr('__cla' ~ 'ss__') }}",
    "the map filter": "{{ ['']|map(attribute='__class__')|list }}",
    "a subscript": "{{ ''['__class__'] }}",
    "hexadecimal": r"{{ ''['\x5f\x5fclass\x5f\x5f'] }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame }}",
    "a method's function": "{{ ''.upper.__func__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self's blocks": "{{ self._TemplateReference__context }}",
    "the context of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "changes what it is given": "{{ messages.append(1) }}",
    "changes a dict": "{{ messages[0].update({'role': 'x'}) }}",
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_no_way_out_of_the_sandbox(name):
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(UserError, match=r"^it, line \d+ (tried to leave its sandbox|fails with (Undefined|Type)Error)"):
        run(WAYS_OUT[name], messages=messages)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("body", ["{{ lipsum.__globals__['os'] }}", "{{ lipsum(n=10**5) }}", "{{ os }}", "{{ open }}"])
def test_what_is_not_there(body):
    with pytest.raises(UserError, match="fails with UndefinedError"):
        run(body)


@pytest.mark.parametrize("body", ["{{ " + "(" * 50_000, "{{ " + "[" * 3000 + "]" * 3000 + " }}", "{{ 1 }}" * 150_000])
def test_sources_that_are_bombs_themselves(body):
    with pytest.raises(UserError, match=r"it (is nested too deeply|has more than 1,000,000 characters)"):
        run(body)


def test_what_templates_do_still_works():
    body = (
        "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x ~ m.role + ': ' ~ (m.text or '–') %}"
        "{{ loop.index }}/{{ loop.length }}{% if not loop.last %}, {{ loop.nextitem.role }} {% endif %}{% endfor %}"
        "{{ n.x }}{{ '%s: %05d, 20240101' % ('a', 3) }}{{ '{:>4} at 123456'.format('b') }}{{ [1, 2]|join('-') }}"
        "{{ {'猫': [1]}|tojson(indent=1) }}{{ 'x' * 3 }}{{ 2 ** 10 }}{{ 'a b'.split()|length }}{{ nothing or 'none' }}"
    )
    messages = [{"role": "user", "text": "猫"}, {"role": "bot", "text": ""}]
    wanted = '1/2, bot 2/2user: 猫bot: –a: 00003, 20240101   b at 1234561-2{\n "猫": [\n  1\n ]\n}xxx10242none'
    assert run(body, messages=messages) == wanted + "a"
