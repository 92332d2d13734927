"""YAML 1.2 with the line of every key: what is read, what is written, and the sentence for what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.recipe_texts import problem, write
from vlm_sft.base.errors import UserError
from vlm_sft.recipe.yaml_file import YamlFile, dump_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2e+4", -20000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("3", 3),
        ("-1", -1),
        ("010", 10),
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("'1e-3'", "1e-3"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("null", None),
        ("", None),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    got = YamlFile("x", f"key: {text}").resolve()["key"]
    assert got == value
    assert type(got) is type(value)


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)


@example("a\x85b\u2028c")  # line breaks that only Unicode knows
@given(st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("abcxyz", min_size=1), inner)))
def test_dump_yaml_reads_back(value: object) -> None:
    assert YamlFile("x", dump_yaml({"key": value})).data == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path} is empty; a recipe starts with keys like `stack:`."),
        ("- a", "{path} is not a mapping of keys to values; a recipe starts with keys like `stack:`."),
        (
            "a: 1\nb: [1",
            "{path}, line 2 is not YAML: expected ',' or ']', but got '<stream end>'; the bracket of line 2 may not "
            "be closed.",
        ),
        ("a: 1\nb: 2\na: 3", '{path}, line 3 is not YAML: the key "a" is written twice.'),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]",
            "{path}, line 2: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed; "
            "a recipe holds plain values only.",
        ),
        (
            "a: 1\nb: !!timestamp 2024-01-01",
            "{path}, line 2: the tag tag:yaml.org,2002:timestamp is not allowed; a recipe holds plain values only.",
        ),
        (
            "a: !!set {中}",
            "{path}, line 1: the tag tag:yaml.org,2002:set is not allowed; a recipe holds plain values only.",
        ),
        ("a: !!bool x", "{path} is not YAML: 'x' is neither true nor false."),
        ("a: &x [*x]", "{path}, line 1: an alias refers to itself."),
        ("a: 1\n2: b", "{path}, line 2: a key must be a plain word."),
        (
            "a: ${b.c}",
            '{path}: "a" cannot be filled in: the recipe has no key b.c; name one that it has, or an '
            "environment variable: ${{oc.env:…}}.",
        ),
        ("a: ???", '{path}: "a" cannot be filled in: Missing mandatory value: a.'),
    ],
)
def test_not_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert problem(path) == message.format(path=path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty; a task starts with keys like `about:`."),
        ("[题]", "is not a mapping of keys to values; a task starts with keys like `about:`."),
        ("about: !!set {题}", "line 1: the tag tag:yaml.org,2002:set is not allowed; a task holds plain values only."),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        YamlFile.read(write(tmp_path, text), "task")
    assert str(caught.value).endswith(sentence)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("a: 中".encode("gbk"))
    assert problem(path) == (
        f"{path} is not UTF-8 text (byte 3); save it as UTF-8, for instance with `iconv -f GB18030 -t UTF-8` if it was "
        f"written as GB18030."
    )


@pytest.mark.parametrize("text", ["a: 1\x15", "\0", "a: '\x1b]52;c;aa\x07'", "a: \ufffe"])
def test_control_characters_in_a_file_are_one_sentence(text):
    with pytest.raises(UserError, match=r"^it is not YAML: unacceptable character #x[0-9a-f]{4}: [^\n]*\.$"):
        YamlFile("it", text)


@pytest.mark.parametrize("text", ['system: "\\ud83d"', '"\\udc80": 1', 'data: {train: [{path: "a\\udc80b"}]}'])
def test_half_a_character_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"a\.yaml holds half a character"):
        YamlFile("a.yaml", text)
    assert YamlFile("a.yaml", 'system: "\\U0001F600"').data == {"system": "😀"}
