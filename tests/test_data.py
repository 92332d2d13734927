"""Sources to one dataset: the row contract, images, ids, mixtures, the check before training and docs/data.md."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import captions, refused, write

from vlm_sft.data import FEATURES, check_images, load_mixture, load_source
from vlm_sft.errors import UserError
from vlm_sft.formats import COLUMNS
from vlm_sft.recipe import Source

DOC = Path(__file__).parent.parent / "docs" / "data.md"


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
    assert rows.features == FEATURES
    assert rows.column_names == ["messages", "images", "source", "id"]
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "什么颜色？"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "红色"}]},
        ],
        "images": [{"path": str(tmp_path / "红.png"), "bytes": None}],
        "source": "zh",
        "id": "zh/q-7",
    }
    assert rows[1]["id"] == "zh/2"


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


def test_mixtures_refused(tmp_path):
    a, b = captions(tmp_path, "a", 3), captions(tmp_path, "b", 3)
    assert 'Two sources are called "a": give each its own `name`' in refused(a, a)
    assert 'The source "b" would get no row' in refused(a, b.model_copy(update={"weight": 1e-9}), sampling="weights")
    assert 'sampling is "squrt"' in refused(a, b, sampling="squrt")
    with pytest.raises(UserError, match="at least one source"):
        load_mixture([])


# -------------------------------------------------------------------------------------------------------- check_images


def test_check_images(tmp_path):
    source = captions(tmp_path, "c", 600)
    for i in range(600):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    rows = load_source(source)
    check_images(rows)
    check_images(load_mixture([source, captions(tmp_path, "d", 5)], "sqrt"))
    for i in (555, 7):
        (tmp_path / f"{i}.png").unlink()
    (tmp_path / "9.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        check_images(rows)
    message = f"3 of 600 images cannot be used; the first is {tmp_path}/7.png (c/8), which does not exist"
    assert message in str(error.value)
    (tmp_path / "7.png").mkdir()
    with pytest.raises(UserError, match="which is not a file"):
        check_images(rows)


def test_check_images_leaves_embedded_ones_alone():
    table = pa.Table.from_pylist(
        [{"messages": [], "images": [{"path": "gone.png", "bytes": b"x"}], "source": "a", "id": "a/1"}],
        schema=FEATURES.arrow_schema,
    )
    check_images(datasets.Dataset(table))


# ------------------------------------------------------------------------------------------------------ docs/data.md


def blocks() -> list[tuple[str, str, str]]:
    """The examples of the page: (name of the file in front of the block or "", language, text)."""
    page = DOC.read_text(encoding="utf-8").split("## Formats", 1)[1]
    return re.findall(r"(?:^`(\S+)`:\n\n)?^```(\w+)\n(.*?)^```$", page, re.M | re.S)


def test_every_example_of_the_page_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    formats, errors = Counter(), 0
    source = None
    for file, language, text in blocks():
        if file:
            write(tmp_path / file, text)
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
            assert list(load_source(source)) == expected
            formats[source.format] += 1
        else:
            assert refused(source) == text.strip()
            errors += 1
    assert set(formats) == set(COLUMNS)
    assert errors == 4


def test_the_page_names_every_key_of_a_source():
    page = DOC.read_text(encoding="utf-8")
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
