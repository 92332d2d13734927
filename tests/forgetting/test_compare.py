"""What is compared, when it is warned of, and what a person sees."""

from __future__ import annotations

import copy
import json
import math
import random

from vlm_sft.forgetting.bundles import _written
from vlm_sft.forgetting.compare import compare, page_tables, print_forgetting, rows_of
from vlm_sft.forgetting.texts import Asked, TextSet
from vlm_sft.pages.errors import error_page

ASKED = [Asked("首都?", ("北京",)), Asked("2+2?", ("4",)), Asked("why?")]
TEXTS = TextSet("own", "m", {"en": ["a"], "zh": ["一"]}, ASKED)


def state(en, zh, answers=("北京。", "it is 4", "because")):
    return {"texts": "m", "loss": 1.0, "perplexity": {"en": en, "zh": zh}, "answers": answers and list(answers)}


def test_a_language_that_became_much_less_likely_is_warned_of():
    found = compare(TEXTS, state(10.0, 20.0), state(11.9, 20.0))
    assert found["warning"] is None and found["right"] == {"before": 1.0, "after": 1.0} and found["changed"] == 0
    found = compare(TEXTS, state(10.0, 20.0), state(9.0, 30.0))
    assert "perplexity (zh) 20 → 30, 1.50 times" in found["warning"] and "(en)" not in found["warning"]
    assert compare(TEXTS, state(10.0, 20.0), state(9.0, 30.0), limit=2.0)["warning"] is None
    assert "nan" in compare(TEXTS, state(10.0, 20.0), state(math.nan, 20.0))["warning"]


def test_answers_that_were_right_and_are_not_are_warned_of_and_shown(capsys):
    found = compare(TEXTS, state(10.0, 20.0), state(10.0, 20.0, ("\x1b[31m猫", "it is 4", "because I say so")))
    assert found["right"] == {"before": 1.0, "after": 0.5} and found["changed"] == 2
    assert "right answers 100% → 50%" in found["warning"]
    print_forgetting(found)
    printed = capsys.readouterr().out
    assert (
        "首都? before: 北京。; after: " in printed and "\x1b[31m" not in printed and "warning: The language" in printed
    )
    assert ["questions right", "100%", "50%", "-50%"] in rows_of(found)


def test_a_model_that_is_shown_no_words_is_measured_by_texts_alone(capsys):
    found = compare(TEXTS, state(10.0, 20.0, None), state(10.0, 20.0, None))
    assert found["right"] == {"before": None, "after": None} and found["questions"] == [] and not found["warning"]
    assert [row[0] for row in rows_of(found)] == ["perplexity, en", "perplexity, zh"]
    print_forgetting(None)
    assert capsys.readouterr().out == "" and page_tables(None) == []


def test_the_page_of_errors_shows_both_tables_and_the_warning_as_text():
    found = compare(TEXTS, state(10.0, 20.0), state(10.0, 40.0, ("<b>猫</b>", "it is 4", "because")))
    page = error_page("bundle", [], tables=page_tables(found))
    for text in ("Forgetting", "遗忘", "x 2.000", "&lt;b&gt;猫&lt;/b&gt;", 'class="warning"'):
        assert text in page
    assert page.count("it is 4") == 0, "an answer that stayed is not shown"


def places(value, path=()):
    """Every place in a value, as keys."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


ODD = [
    None,
    True,
    -1,
    10**400,
    1.5,
    float("nan"),
    "",
    "\x1b]52;c;aGk=\x07",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    {"en": "x"},
]


def test_what_somebody_else_wrote_is_shown_or_none_of_ours(tmp_path, capsys):
    found = compare(TEXTS, state(10.0, 20.0), state(30.0, 20.0, ("猫", "it is 4", "because I say so")))
    rng, path, shown = random.Random(3), tmp_path / "forgetting.json", 0
    paths = [each for each in places(json.loads(json.dumps(found))) if each]
    for _ in range(400):
        changed = here = json.loads(json.dumps(found))
        *way, last = rng.choice(paths)
        for key in way:
            here = here[key]
        here[last] = copy.deepcopy(rng.choice(ODD))
        path.write_text(json.dumps(changed))
        if (read := _written(path)) is not None:
            shown += 1
            print_forgetting(read)
            error_page("b", [], tables=page_tables(read))
    assert 20 < shown < 380 and "\x1b" not in capsys.readouterr().out
    for text in ("[" * 100_000, "\xff", "3", "[]", "{}"):
        path.write_text(text, encoding="latin-1")
        assert _written(path) is None
