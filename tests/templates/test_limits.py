"""A template can neither reach Python nor fill the memory, nor go on for ever; what templates really do still works."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.templates.limits import MAX_TEXT
from vlm_sft.templates.sandbox import MARKS, compile_template, run_template

MARKED = "{% generation %}a{% endgeneration %}"


def render(body: str, **variables) -> str:
    return run_template(compile_template(body + MARKED, "it"), "it", **{MARKS: ("", ""), **variables})


ESCAPES = {
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


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out_of_the_sandbox(name):
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(UserError, match=r"^it, line \d+ (tried to leave its sandbox|fails with (Undefined|Type)Error)"):
        render(ESCAPES[name], messages=messages)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("body", ["{{ lipsum.__globals__['os'] }}", "{{ lipsum(n=10**5) }}", "{{ os }}", "{{ open }}"])
def test_what_is_not_there(body):
    with pytest.raises(UserError, match="fails with UndefinedError"):
        render(body)


BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "a text many times": "{{ 'a' * 10**9 }}",
    "a list many times": "{{ ([1] * 10**9)|length }}",
    "from the right": "{{ (10**9 * 'a')|length }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling with +": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "~ within ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = '' ~ (n.x ~ n.x) %}{% endfor %}",
    "doubling in blocks": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
                          "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling macros": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='aa') %}"
                       "{% for i in range(60) %}{% set n.x = m(n.x) %}{% endfor %}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent with a star": "{{ '%*d' % (999999999, 1) }}",
    "percent, precise": "{{ '%.999999999f' % 1 }}",
    "the format filter": "{{ '%999999999d'|format(1) }}",
    "str.format, wide": "{{ '{:999999999}'.format(1) }}",
    "str.format, nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "center": "{{ 'a'|center(999999999) }}",
    "indent": "{{ 'a\nb'|indent(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "replace, the filter": "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "join, the filter": "{% set x = 'a' * 1000000 %}{{ x|join(x) }}",
    "tojson": "{{ [[1]]|tojson(indent=999999999) }}",
    "slices": "{{ [1]|slice(999999999)|list }}",
    "batches": "{{ [1]|batch(999999999, 0)|list }}",
    "loops within loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over texts": "{% set x = 'a' * 99999 %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
                                       "{{ m(60) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_one_sentence(name):
    with pytest.raises(UserError, match=r"^it, line \d+ (tried to leave its sandbox|fails with (Overflow|Recursion))"):
        render(BOMBS[name])


@pytest.mark.parametrize("body", ["{{ " + "(" * 50_000, "{{ " + "[" * 3000 + "]" * 3000 + " }}", "{{ 1 }}" * 150_000])
def test_sources_that_are_bombs_themselves(body):
    with pytest.raises(UserError, match=r"it (is nested too deeply|has more than 1,000,000 characters)"):
        render(body)


def test_what_templates_do_still_works():
    body = (
        "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x ~ m.role + ': ' ~ (m.text or '–') %}"
        "{{ loop.index }}/{{ loop.length }}{% if not loop.last %}, {{ loop.nextitem.role }} {% endif %}{% endfor %}"
        "{{ n.x }}{{ '%s: %05d, 20240101' % ('a', 3) }}{{ '{:>4} at 123456'.format('b') }}{{ [1, 2]|join('-') }}"
        "{{ {'猫': [1]}|tojson(indent=1) }}{{ 'x' * 3 }}{{ 2 ** 10 }}{{ 'a b'.split()|length }}{{ nothing or 'none' }}"
    )
    messages = [{"role": "user", "text": "猫"}, {"role": "bot", "text": ""}]
    wanted = '1/2, bot 2/2user: 猫bot: –a: 00003, 20240101   b at 1234561-2{\n "猫": [\n  1\n ]\n}xxx10242none'
    assert render(body, messages=messages) == wanted + "a"


def test_a_long_conversation_fits():
    messages = [{"role": "user", "text": "字" * 1000}] * 5000
    body = "{% for m in messages %}{{ m.role ~ m.text.strip() }}{% endfor %}"
    assert len(render(body, messages=messages)) == 5000 * 1004 + 1 < MAX_TEXT
