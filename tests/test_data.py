"""Sources to one dataset: the row contract, images, ids, mixtures, the check before training and docs/data.md."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_sft.data import FEATURES, check_images, load_mixture, load_source, mixture_counts, mixture_order
from vlm_sft.errors import UserError
from vlm_sft.formats import COLUMNS
from vlm_sft.images import load_image
from vlm_sft.recipe import Source

DOC = Path(__file__).parent.parent / "docs" / "data.md"


def write(path: Path, rows: list | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def captions(folder: Path, name: str, count: int) -> Source:
    rows = [{"image": f"{i}.png", "caption": f"{name} 第{i}张"} for i in range(count)]
    return Source(path=write(folder / f"{name}.jsonl", rows), format="caption")


def refused(*sources: Source, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load_mixture(sources, **kwargs) if len(sources) > 1 else load_source(sources[0])
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


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


# -------------------------------------------------------------------------------------------------------------- images


def image_of(tmp_path: Path, image, **options) -> dict:
    path = write(tmp_path / "one.jsonl", [{"image": image, "caption": "x"}])
    return load_source(Source(path=path, format="caption", **options))[0]["images"][0]


def test_where_relative_paths_start(tmp_path, monkeypatch):
    (tmp_path / "照片").mkdir()
    assert image_of(tmp_path, "a/../1.png")["path"] == f"{tmp_path}/1.png"
    assert image_of(tmp_path, "/abs/1.png")["path"] == "/abs/1.png"
    assert image_of(tmp_path, "1.png", images=str(tmp_path / "照片"))["path"] == f"{tmp_path}/照片/1.png"
    monkeypatch.chdir(tmp_path)
    assert image_of(Path(), "1.png", images="照片")["path"] == f"{tmp_path}/照片/1.png"
    assert image_of(Path(), "1.png")["path"] == f"{tmp_path}/1.png"
    message = refused(Source(path=str(tmp_path / "one.jsonl"), format="caption", images="没有"))
    assert "takes its images from 没有, which is no folder" in message


def test_embedded_images_are_never_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b"not an image", "path": "a.png"}], "text": ["猫"]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.to_parquet(str(tmp_path / "p.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    for path in ("p.parquet", "saved"):
        rows = load_source(Source(path=str(tmp_path / path), format="caption"))
        assert rows[0]["images"] == [{"path": "a.png", "bytes": b"not an image"}]


def test_a_data_uri_is_an_embedded_image(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    image = image_of(tmp_path, "data:image/png;base64," + base64.b64encode(data).decode())
    assert image == {"path": None, "bytes": data}
    assert load_image(image).size == (2, 2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/1.png", "line 1: the image https://example.com/1.png is a URL and no URL is fetched"),
        ({"url": "x"}, "line 1: an image is neither a path nor bytes"),
        (3, "line 1: an image is neither a path nor bytes"),
        ([["a"]], "line 1: an image is neither a path nor bytes"),
        ("nul\0.png", "is blank or no text"),
        (" ", "is blank or no text"),
        ("data:image/png;base64,@@", "holds no base64 image"),
        ("data:image/png,abc", "holds no base64 image"),
    ],
)
def test_images_refused(tmp_path, image, message):
    path = write(tmp_path / "one.jsonl", [{"image": image, "caption": "x"}])
    assert message in refused(Source(path=path, format="caption"))


def test_hub_rows_have_no_folder(monkeypatch, tmp_path):
    hub = datasets.Dataset.from_dict({"image": ["1.png"], "text": ["猫"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub)
    source = Source(path="owner/pictures", format="caption")
    assert "rows of the Hub lie in no folder" in refused(source)
    rows = load_source(source.model_copy(update={"images": str(tmp_path)}))
    assert rows[0]["images"][0]["path"] == f"{tmp_path}/1.png"
    assert rows[0]["id"] == "pictures/1"


# ------------------------------------------------------------------------------------------------------- wrong sources


def test_rules_of_every_conversation_name_the_row(tmp_path):
    def chats(*messages) -> Source:
        rows = [{"messages": [{"role": role, "content": content} for role, content in messages]}]
        return Source(path=write(tmp_path / "m.jsonl", rows), format="messages")

    assert "m.jsonl, line 1: message 1 is an empty answer" in refused(chats(("user", "q"), ("assistant", " ")))
    assert "m.jsonl, line 1: message 0 has role 'tool'" in refused(chats(("tool", "q")))
    assert 'm.jsonl, line 1: message 1 has role "user"' in refused(chats(("user", "q"), ("user", "q")))
    assert "m.jsonl, line 1: there is no answer to learn from" in refused(chats(("user", "问题")))


def test_columns_that_are_nowhere(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"prompt": "q", "completion": "a", "picture": "1.png"}])
    source = Source(path=path, format="messages", columns={"image": "pictures"})
    assert "No row of" in refused(source)
    assert '"pictures" that `columns` maps' in refused(source)
    source = Source(path=path, format="messages", columns={"imgae": "picture"})
    assert 'maps the column "imgae", which the format messages does not have; did you mean "image"' in refused(source)


def test_sources_that_cannot_be(tmp_path):
    path = write(tmp_path / "m.json", "[]")
    assert "holds no rows" in refused(Source(path=path, format="messages"))
    assert "only the format caption takes them" in refused(Source(path=path, format="vqa", prompts=["x"]))
    source = Source(path=path, format="vqa").model_copy(update={"format": "coco"})
    assert 'has the format "coco": it must be one of messages, llava, caption, vqa' in refused(source)


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


def test_weights_are_explicit_and_a_factor_elsewhere():
    assert mixture_counts([115, 14], [115, 14], "weights") == [115, 14]
    assert mixture_counts([10, 90], [1, 1], "weights") == [50, 50]
    assert mixture_counts([10, 90], [9, 1], "proportional") == [50, 50]
    assert mixture_counts([25, 100], [4, 1], "sqrt") == [83, 42]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100.0)), min_size=1, max_size=6),
    st.sampled_from(["proportional", "sqrt", "weights"]),
    st.integers(0, 2**40),
)
def test_any_mixture(parts, sampling, seed):
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    counts = mixture_counts(sizes, weights, sampling)
    assert sum(counts) == sum(sizes)
    power = {"proportional": 1.0, "sqrt": 0.5, "weights": 0.0}[sampling]
    shares = np.array([weight * size**power for size, weight in parts])
    assert np.abs(np.array(counts) - sum(sizes) * shares / shares.sum()).max() <= 1 + 1e-6

    order = mixture_order(sizes, counts, seed)
    assert (order == mixture_order(sizes, counts, seed)).all()
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        own = order[(order >= start) & (order < start + size)]
        assert len(own) == count
        times = np.bincount(own - start, minlength=size)
        assert times.max() - times.min() <= 1
        for done in range(0, count - size + 1, size):  # whole passes: every row once before any comes again
            assert len(set(own[done : done + size])) == size
        start += size


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
