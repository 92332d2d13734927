"""Tasks: those that ship are whole, and what is wrong in one of one's own is one sentence with its line."""

from __future__ import annotations

import re
import resource

import pytest
import yaml

from support.benchmark_files import lines, own_task, picture
from support.paths import ROOT
from vlm_sft.base.assets import list_tasks
from vlm_sft.base.errors import UserError
from vlm_sft.evaluation.benchmark import read_benchmarks
from vlm_sft.evaluation.tasks import load_task, render_prompt
from vlm_sft.metrics.measures import MEASURES


@pytest.mark.parametrize("name", list_tasks())
def test_tasks_that_ship_say_where_everything_is_from(name):
    found, task = load_task(name)
    assert found == name and task.about.endswith(".")
    assert all(what in " ".join(task.sources) for what in ("layout", "prompt", "metric"))
    assert task.hub or task.files or task.layouts
    assert ("zh" in name or "cn" in name) == (task.language == "zh")
    text = render_prompt(
        task.prompt, "here", {"question": "有吗？", "options": "A. 有", "choices": {"A": "有"}, "hint": ""}
    )
    assert "{" not in text and text == text.strip() and (task.question is None or "有吗？" in text)
    # LLaVA-1.5's own words, where its paper reports the benchmark.
    short = ("vqav2", "okvqa", "gqa", "textvqa", "vizwiz", "pope", "mme")
    if name in short:
        assert text.endswith("\nAnswer the question using a single word or phrase.")


def test_a_prompt_may_ask_for_columns():
    values = {"question": "Which?", "hint": "提示", "row": {"a b": 3}}
    assert render_prompt("{{ hint }} {{ question }} {{ row['a b'] }}", "here", values) == "提示 Which? 3"


@pytest.mark.parametrize(
    "prompt", ["{{ 'x' * 9**9 }}", "{{ question }}{% for i in range(9**5) %}{{ 'x' * 9**5 }}{% endfor %}"]
)
def test_a_prompt_of_somebody_else_s_task_cannot_fill_the_memory(prompt, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_SFT_LIMITS", f"template_seconds=2,template_bytes={2**28}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="line 1 takes more than 2 seconds or 256 MiB") as refused:
        read_benchmarks([own_task(tmp_path, prompt=prompt)], None)
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metric": "exact_mach"}, r'line \d+: the metric "exact_mach" is none; did you mean "exact_match"'),
        ({"metric": "choice"}, 'the metric "choice" needs `choices`'),
        ({"answer": "x"}, r'line 2: there is no key "answer"; did you mean "answers"'),
        ({"about": None}, '"about" is missing'),
        ({"prompt": "{{ question"}, r"line \d+: the prompt is no jinja"),
        (
            {"prompt": "{{ quest }}"},
            r"rows.jsonl, line 1: the prompt of the benchmark fails there: 'quest' is undefined",
        ),
        ({"prompt": "{{ ''.__class__ }}"}, "the prompt of the benchmark fails there: .*__class__"),
        (
            {"answers": "label"},
            'line 1: the column "label" of the right answer is missing or empty .the row has id, image',
        ),
        ({"question": "text"}, 'line 1: the column "text" of the question is missing or empty'),
        ({"images": "photo/{id}.png"}, r"line 1: .*q0.png"),
        ({"id": "image"}, 'line 3: the id "0.png" is that of .*line 1 too'),
        ({"path": "/etc"}, r'line \d+: "/etc" leads elsewhere; name files beside the YAML file, or give another'),
        ({"path": "../.."}, '"../.." leads elsewhere'),
        ({"files": ["../*.jsonl"]}, 'jsonl" leads elsewhere'),
        ({"files": ["/home/*/*.json"]}, 'json" leads elsewhere'),
        ({"layouts": [{"join": {"files": ["a/../../b.csv"], "on": "a", "key": "b"}}]}, 'b.csv" leads elsewhere'),
        *(
            ({"files": [pattern]}, r'line \d+: ".*" is no name or pattern of files; write one like')
            for pattern in ("**", "**/*.json", "a**", "", ".", "*/" * 11 + "x", "x" * 300)
        ),
        ({"path": "x" * 300}, r'line \d+: "x+..." is no name or pattern of files'),
        ({"hub": {"path": "x" * 300}}, "is no data set of the Hub"),
        ({"hub": {"path": "a/b", "token": "x"}}, 'there is no key "hub.token"; there are path, name, split, revision'),
        (
            {"judge": {"promt": "x"}, "metric": "judge"},
            r'there is no key "judge.promt"; did you mean "prompt"|"judge.prompt" is missing',
        ),
        ({"answers": True}, r"line \d+: answers: Input should be"),
        (
            {"images": "photo"},
            r"no row has the column photo of its pictures \(the rows have answer, id, image, question",
        ),
        ({"images": "photos/{image:xx}.jpg"}, "correct `images`, or write `images: \\[\\]`"),
        ({"kind": "imge"}, 'no row has the column "imge" of its `kind` .the rows have answer, .*did you mean "image"'),
        ({"group": "题组"}, 'no row has the column "题组" of its `group` .*; correct `group`, or leave it out'),
        ({"id": "ident"}, 'no row has the column "ident" of its `id`'),
        ({"id": "id.number"}, 'no row has the column "id.number" of its `id`'),
        ({"answers": ["answer", "anser"]}, 'no row has the column "anser" of its `answers` .*mean "answer"'),
        ({"images": ["image", "image_2"]}, 'no row has the column "image_2" of its `images`'),
        ({"only": {"splt": "test"}}, r'rows\.jsonl: no row has the column "splt" of `only`; correct it'),
        (
            {"join": {"files": ["rows.jsonl"], "on": "no", "key": "none"}},
            'line 1: the row has no column "no", by which',
        ),
        ({"join": {"files": ["rows.jsonl"], "on": "id", "key": "x"}}, '"id" is q0, and no row has that "x"'),
        ({"choices": "options", "metric": "choice"}, 'no row has options, which the metric "choice" needs'),
        ({"choices": "id", "metric": "choice"}, "correct `choices`"),
        ({"metric": "vqa"}, "the answers of ten annotators, and rows have one to three; take `exact_match`"),
        ({"hub": {"path": "/home/me"}}, '"/home/me" is no data set of the Hub; write name/data-set'),
        ({"hub": {"path": "../data"}}, "is no data set of the Hub"),
        ({"hub": {"path": "hf://datasets/a/b"}}, "is no data set of the Hub"),
        ({"generation": {"custom_generate": "me/code"}}, 'unknown key "generation.custom_generate"'),
        ({"generation": {"max_new_tokens": 10**9}}, "`max_new_tokens` is 1,000,000,000, but `limits.cache_tokens`"),
        ({"generation": {"top_p": "x"}}, "`generation.top_p` must be a number from 0 to 1, not 'x'"),
        ({"path": "gone.jsonl"}, "there is no folder or file .*gone.jsonl"),
        ({"path": None}, "is on no Hub: give the folder of its data with --benchmark-data"),
        ({"circular": True}, "`circular` is measured by"),
        ({"metric": "judge"}, "`metric: judge` and `judge` belong together"),
        ({"judge": {"prompt": "x"}}, "`metric: judge` and `judge` belong together"),
        ({"metric": "judge", "judge": {"prompt": "{{ first }}"}}, r"line \d+: its prompt shows no `second`"),
        ({"metric": "judge", "judge": {"prompt": "{{ first }}", "compare": False}}, "its prompt shows no `answer`"),
        (
            {"metric": "judge", "judge": {"prompt": "{{ caption }} {{ answer }}", "compare": False}},
            "rows.jsonl, line 1: the prompt of the benchmark fails there: 'caption' is undefined",
        ),
        ({"metric": "judge", "judge": {"prompt": "{{ first second"}}, r"line \d+: the prompt is no jinja"),
        (
            {"metric": "judge", "judge": {"prompt": "{{ first }}{{ second }}", "scale": [10, 1]}},
            r"line \d+: `scale` is the lowest and the highest",
        ),
        (
            {"metric": "judge", "judge": {"prompt": "{{ first }}{{ second }}", "scale": [0, 5]}},
            "`scale` begins above 0",
        ),
        ({"metric": "judge", "judge": {"prompt": "{{ first }}{{ second }}", "scale": [1]}}, "judge.scale"),
        ({"metric": "judge", "judge": {"url": "http://evil"}}, "judge"),
        *(
            ({"metric": "judge", "judge": {"prompt": "{{ first }}{{ second }}", "settings": {name: value}}}, "settings")
            for name, value in (
                ("tools", [{"type": "web_search"}]),
                ("model", "another"),
                ("messages", []),
                ("stream", True),
                ("user", "x"),
                ("store", "true"),
                ("extra_headers", {"a": "b"}),
                ("temperature", [1]),
            )
        ),
        ({"only": {"image": "7.png"}}, "holds no rows"),
        ({"rows": "data"}, "rows.jsonl"),
        (
            {"join": {"files": ["rows.jsonl"], "on": "answer", "key": "question"}},
            'line 1: "answer" is 0, and no row has',
        ),
    ],
)
def test_a_task_that_is_wrong_is_one_sentence(tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as refused:
        read_benchmarks([own_task(tmp_path, **keys)], None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("page", ["evaluation.md", "evaluation_zh.md"])
def test_the_page_names_every_task_and_metric_and_its_example_is_one(page, tmp_path):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name in list_tasks():
        _, task = load_task(name)
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{task.metric}`" in line and (task.hub is None or f"`{task.hub.path}`" in line)
    assert all(f"`{metric}`" in text for metric in MEASURES)
    example, judged = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "dogs.yaml").write_text(example, encoding="utf-8")
    row = {
        "id": 1,
        "photo": "0.png",
        "question": "几只？",
        "answers": "B",
        "a": "一",
        "b": "二",
        "c": "三",
        "breed": "x",
    }
    lines(tmp_path / "dogs.jsonl", [row])
    picture(tmp_path / "0.png", 0)
    own = own_task(tmp_path / "own", **yaml.safe_load(judged))
    row = {"id": 1, "image": "0.png", "question": "几只？", "answer": "2", "caption": "草地"}
    lines(tmp_path / "own" / "rows.jsonl", [row])
    columns = read_benchmarks([own], None)[0].asked[0].columns
    said = render_prompt(load_task(own)[1].judge.prompt, "here", {**columns, "answer": "两只"})
    assert said.startswith("问题：几只？\n照片：草地\n回答：两只\n")
    asked = read_benchmarks([str(tmp_path / "dogs.yaml")], None)[0].asked
    assert [one.answers for one in asked] == [["B"], ["A"], ["C"]] and asked[0].text.startswith(
        "几只？\nA. 一\nB. 二\nC. 三\n"
    )
