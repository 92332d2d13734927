"""Sources to one dataset: the row contract, images, ids, mixtures, the check before training and docs/data.md."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from support.paths import ROOT
from support.source_files import captions, refused, write
from vlm_sft.base.errors import UserError
from vlm_sft.data.dataset import ROW_FEATURES, load_mixture, load_source
from vlm_sft.recipe.sections import Source
from vlm_sft.rows.formats import FORMATS
from vlm_sft.rows.keys import KEYS
from vlm_sft.rows.messages import unpacked

DOCS = ROOT / "docs"


# -------------------------------------------------------------------------------------------------------- the contract


def test_the_row_contract(tmp_path):
    path = write(
        tmp_path / "qa.jsonl",
        [
            {"image": "红.png", "question": "什么颜色？", "answer": "红色", "id": "q-7"},
            {"image": "b.png", "question": "Which digit?", "answers": ["3", "3", "8"]},
        ],
    )
    rows = load_source(Source(path=path, format="vqa", name="zh"))
    assert rows.features == {**ROW_FEATURES, "extras": Value("string")}, "the last where a row has some"
    assert rows.column_names == ["messages", "images", "source", "id", "extras"]
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "什么颜色？"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "红色"}]},
        ],
        "images": [{"path": str(tmp_path / "红.png"), "bytes": None}],
        "source": "zh",
        "id": "zh/q-7",
        "extras": None,
    }
    assert rows[1]["id"] == "zh/2"
    said = unpacked(rows[1])["messages"][1]
    assert (said["content"][0]["text"], said["answers"]) == ("3", ["3", "3", "8"])
    rows = load_source(Source(path=path, format="vqa", max_rows=1))
    assert rows.features == ROW_FEATURES and rows.column_names == ["messages", "images", "source", "id"]


def test_several_captions_of_a_row_have_ids_of_their_own(tmp_path):
    path = write(
        tmp_path / "c.jsonl", [{"image": "a", "caption": ["x", "猫"], "id": 5}, {"image": "a", "caption": "z"}]
    )
    assert load_source(Source(path=path, format="caption"))["id"][:] == ["c/5#1", "c/5#2", "c/2"]


def test_text_only_and_image_rows_share_one_schema(tmp_path):
    text = write(tmp_path / "t.jsonl", [{"prompt": "你好", "completion": "你好！"}])
    sources = [Source(path=text, format="messages"), captions(tmp_path, "c", 2)]
    rows = load_mixture(sources)
    assert rows["source"][:] == ["t", "c", "c"]
    assert [len(images) for images in rows["images"]] == [0, 1, 1]


def test_nothing_is_written_and_rows_travel_to_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_mixture([captions(tmp_path, "a", 3), captions(tmp_path, "b", 9)], "sqrt")
    assert rows.cache_files == []
    assert not (tmp_path / "cache").exists()
    assert pickle.loads(pickle.dumps(rows))[:] == rows[:]


def test_more_rows_than_one_chunk(tmp_path):
    rows = load_source(captions(tmp_path, "c", 2500))
    assert len(rows) == 2500
    assert rows[2499]["messages"][1]["content"][0]["text"] == "c 第2499张"


def test_max_rows_are_the_first_and_nothing_behind_them_is_read(tmp_path):
    source = captions(tmp_path, "c", 3)
    with open(source.path, "a", encoding="utf-8") as file:
        file.write("\nbroken")
    assert "line 4: not JSON" in refused(source)
    rows = load_source(source.model_copy(update={"max_rows": 2}))
    assert rows["id"][:] == ["c/1", "c/2"]


def test_prompts_are_drawn_by_seed_and_row(tmp_path):
    source = captions(tmp_path, "c", 40).model_copy(update={"prompts": ["Describe it.", "描述这张图。"]})

    def drawn(seed: int, **changes) -> list[str]:
        rows = load_source(source.model_copy(update=changes), seed=seed)
        return [messages[0]["content"][1]["text"] for messages in rows["messages"]]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0, max_rows=5) == drawn(0)[:5]
    assert set(drawn(0)) == {"Describe it.", "描述这张图。"}


def test_prompts_are_in_the_row_s_language(tmp_path):
    lines = [{"image": "a", "caption": text} for text in ["a cat", "一只猫"] * 20]
    lines.append({"image": "a", "caption": "eine Katze", "lang": "de-DE"})
    prompts = {"en": ["Describe it.", "What is this?"], "zh": ["描述这张图。"], "de": ["Beschreibe es."]}
    source = Source(
        path=write(tmp_path / "c.jsonl", lines), format="caption", columns={"language": "lang"}, prompts=prompts
    )
    asked = [messages[0]["content"][1]["text"] for messages in load_source(source)["messages"]]
    assert set(asked[1:40:2]) == {"描述这张图。"} and set(asked[0:40:2]) == {"Describe it.", "What is this?"}
    assert asked[40] == "Beschreibe es."
    del prompts["de"]
    message = refused(source.model_copy(update={"prompts": prompts}))
    assert 'line 41: the row is in "de" and the source has prompts for en, zh only: add prompts for it' in message


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_proportional_is_all_rows_in_order(tmp_path):
    sources = [captions(tmp_path, "a", 3), captions(tmp_path, "b", 2)]
    assert load_mixture(sources)["id"][:] == ["a/1", "a/2", "a/3", "b/1", "b/2"]
    assert load_mixture(sources[:1], "sqrt")["id"][:] == ["a/1", "a/2", "a/3"]


def test_sqrt_is_instructblip(tmp_path):
    sources = [captions(tmp_path, "small", 16), captions(tmp_path, "large", 144)]
    rows = load_mixture(sources, "sqrt", seed=3)
    assert Counter(rows["source"]) == {"small": 40, "large": 120}  # 4 : 12 of 160
    times = Counter(rows["id"])
    assert {times[f"small/{i}"] for i in range(1, 17)} == {2, 3}  # every row twice before any comes a third time
    assert max(count for row, count in times.items() if row.startswith("large")) == 1
    assert len(set(rows["source"][:20])) == 2  # interleaved
    assert rows["id"][:] == load_mixture(sources, "sqrt", seed=3)["id"][:]
    assert rows["id"][:] != load_mixture(sources, "sqrt", seed=4)["id"][:]


def test_repeat_makes_a_source_larger(tmp_path):
    twice = captions(tmp_path, "a", 2).model_copy(update={"repeat": 2})
    assert load_mixture([twice])["id"][:] == ["a/1", "a/2", "a/1", "a/2"]
    rows = load_mixture([twice, captions(tmp_path, "b", 3)])
    assert Counter(rows["id"]) == {"a/1": 2, "a/2": 2, "b/1": 1, "b/2": 1, "b/3": 1}
    four = captions(tmp_path, "c", 2).model_copy(update={"repeat": 8})
    assert Counter(load_mixture([four, captions(tmp_path, "d", 4)], "sqrt")["source"]) == {
        "c": 13,
        "d": 7,
    }  # 4 : 2 of 20


def bilingual(folder: Path, name: str, chinese: int, english: int) -> Source:
    texts = [f"第{i}张" for i in range(chinese)] + [f"picture {i}" for i in range(english)]
    rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(texts)]
    return Source(path=write(folder / f"{name}.jsonl", rows), format="caption")


def test_languages_are_balanced_over_all_sources(tmp_path):
    sources = [bilingual(tmp_path, "a", 10, 70), bilingual(tmp_path, "b", 0, 10), bilingual(tmp_path, "c", 10, 0)]
    rows = load_mixture(sources, languages={"zh": 1, "en": 1}, seed=5)

    def is_chinese(row: dict) -> bool:
        return row["messages"][1]["content"][0]["text"].startswith("第")

    drawn = Counter((row["source"], is_chinese(row)) for row in rows)
    assert drawn == {("a", True): 25, ("c", True): 25, ("a", False): 44, ("b", False): 6}
    assert {is_chinese(row) for row in rows.select(range(12))} == {True, False}, "interleaved"
    assert rows["id"][:] == load_mixture(sources, languages={"zh": 1, "en": 1}, seed=5)["id"][:]
    by_size = load_mixture(sources, "sqrt", languages={"zh": 3, "en": 1})
    assert Counter(map(is_chinese, by_size)) == {True: 75, False: 25}


def test_languages_that_do_not_fit(tmp_path):
    both = [bilingual(tmp_path, "a", 2, 2), bilingual(tmp_path, "b", 2, 2)]
    message = refused(*both, languages={"zh": 1})
    assert 'Some rows are in "en", which `languages` gives no share: add it, or map the column' in message
    message = refused(*both, languages={"zh": 1, "en": 1, "de": 1})
    assert '`languages` gives a share to "de", but the rows are in en, zh: remove it' in message


def test_the_same_rows_in_every_step_whatever_the_number_of_processes(tmp_path):
    """accelerate's own sampler and shards, as the trainer uses them."""
    sources = [captions(tmp_path, "a", 20), captions(tmp_path, "b", 44)]

    def steps(processes: int, batch: int) -> list[list[str]]:
        parts = []
        for rank in range(processes):
            rows = load_mixture(sources, "sqrt", seed=3)  # every process computes it for itself
            loader = DataLoader(
                rows, batch_size=batch, shuffle=True, collate_fn=lambda found: [row["id"] for row in found]
            )
            shard = prepare_data_loader(
                loader,
                num_processes=processes,
                process_index=rank,
                put_on_device=False,
                use_seedable_sampler=True,
                data_seed=7,
            )
            parts.append(list(skip_first_batches(shard, 2)))
        return [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]

    assert steps(1, 8) == steps(2, 4) == steps(4, 2)
    assert len(steps(2, 4)) == 6


@pytest.mark.slow
def test_a_fresh_process_draws_the_same(tmp_path):
    """Python hashes text differently in every process; nothing may depend on it."""
    prompts = {"zh": ["描述。", "这是什么？"], "en": ["Describe it.", "What is this?"]}
    for name in "ab":
        bilingual(tmp_path, name, 30, 50)
    keys = [{"path": str(tmp_path / f"{name}.jsonl"), "format": "caption", "prompts": prompts} for name in "ab"]
    program = """
import json, sys
from vlm_sft.data.dataset import load_mixture
from vlm_sft.recipe.sections import Source
sources = [Source(**keys) for keys in json.load(sys.stdin)]
print(json.dumps(load_mixture(sources, "sqrt", languages={"zh": 2, "en": 1}, seed=9).to_list()))
"""
    drawn = load_mixture([Source(**each) for each in keys], "sqrt", languages={"zh": 2, "en": 1}, seed=9).to_list()
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(keys),
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == drawn


def test_mixtures_refused(tmp_path):
    a, b = captions(tmp_path, "a", 3), captions(tmp_path, "b", 3)
    assert 'Two sources are called "a": give each its own `name`' in refused(a, a)
    assert 'The source "b" would get no row' in refused(a, b.model_copy(update={"weight": 1e-9}), sampling="weights")
    assert 'sampling is "squrt"' in refused(a, b, sampling="squrt")
    with pytest.raises(UserError, match="at least one source"):
        load_mixture([])


# ------------------------------------------------------------------------------------------------------ the pages


def blocks() -> list[tuple[str, str, str]]:
    """The examples of the pages: (name of the file in front of the block or "", language, text)."""
    errors = (DOCS / "data.md").read_text(encoding="utf-8").split("## What an error looks like", 1)[1]
    page = (DOCS / "data_formats.md").read_text(encoding="utf-8") + errors
    return re.findall(r"(?:^`(\S+)`(?: \([^\n]*\))?:\n\n)?^```(\w+)\n(.*?)^```$", page, re.M | re.S)


def test_every_example_of_the_pages_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    formats, errors = Counter(), 0
    source = None
    for file, language, text in blocks():
        if file:
            write(tmp_path / file, text.replace("file:///data", f"file://{tmp_path}"))
        elif language == "python":
            exec(text, {})
        elif language == "yaml":
            source = Source(**yaml.safe_load(text))
        elif language == "json":
            expected = json.loads(text)
            for row in expected:
                for image in row["images"]:
                    image["path"] = (image["path"] or "").replace("/data", str(tmp_path)) or None
                    image["bytes"] = image["bytes"] and image["bytes"].encode("latin-1")
                for part in (part for message in row["messages"] for part in message["content"]):
                    part.setdefault("text", None)
            assert [unpacked(row) for row in load_source(source)] == expected
            formats[source.format] += 1
        else:
            assert refused(source) == text.strip()
            errors += 1
    assert set(formats) == set(FORMATS)
    assert errors == 4


def test_the_page_has_an_example_of_every_key_that_is_honoured():
    said: set[str] = set()
    for _, language, text in blocks():
        if language in ("json", "jsonl", "tsv"):
            said |= set(re.findall(r'"(\w+)":', text)) | set(text.split("\n")[0].split("\t"))
    honoured = {key for kind in KEYS.values() for key, known in kind.items() if known.mend is None}
    assert honoured | {"history", "tools", "mask"} <= said | {"bytes"}


def test_the_page_names_every_key_of_a_source():
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    example = yaml.safe_load(re.search(r"## A source\n\n```yaml\n(.*?)```", page, re.S).group(1))
    assert set(example) == set(Source.model_fields)
    Source(**example)


# ---------------------------------------------------------------------------------------------------------------- fuzz

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["<image>", "a.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "path"]), inner),
    max_leaves=8,
)
GOOD = {
    "messages": {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "是"}],
        "image": "a",
    },
    "llava": {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "是"}], "image": "a"},
    "caption": {"image": "a", "caption": "猫"},
    "vqa": {"image": "a", "question": "几？", "answer": "2"},
}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(GOOD)), st.data())
def test_a_good_row_with_any_one_value_is_rows_or_a_sentence(tmp_path_factory, format_name, data):
    row = dict(GOOD[format_name])
    key = data.draw(st.sampled_from([*row, "id", "text"]))
    row[key] = data.draw(ANY)
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    try:
        rows = load_source(Source(path=str(path), format=format_name))
    except UserError as error:
        rows, message = [], str(error)
    else:
        message = ""
    assert "\n" not in message
    for found in rows:
        parts = [part["type"] for message in found["messages"] for part in message["content"]]
        assert parts.count("image") == len(found["images"])
        assert all(os.path.isabs(image["path"]) for image in found["images"])
        assert not math.isnan(len(found["id"]))
