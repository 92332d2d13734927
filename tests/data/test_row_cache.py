"""Rows of large text files: read once, mapped at the next start, never taken for those of other files or settings."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import datasets
import pytest

from support.source_files import captions, write
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.data import dataset as data
from vlm_sft.data import row_cache
from vlm_sft.data.dataset import load_source, read_source
from vlm_sft.recipe.sections import Source


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The cache, in which so few rows as a test has are kept."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(row_cache, "FEWEST", 3)
    return tmp_path / "cache" / "vlm_sft"


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The paths of the sources that were read through."""
    read, seen = data.rows_with_language, []
    monkeypatch.setattr(
        data, "rows_with_language", lambda source, **given: seen.append(source.path) or read(source, **given)
    )
    return seen


def test_the_second_start_does_not_read_and_finds_the_same(tmp_path, passes, folder):
    source = captions(tmp_path, "c", 9)
    first, second = read_source(source, languages=True), read_source(source, languages=True)
    assert passes == [source.path] and [file.suffix for file in folder.iterdir()] == [".arrow"]
    assert (
        second.rows[:] == first.rows[:] == load_source(source)[:] and first.languages == second.languages == ["zh"] * 9
    )
    assert second.rows.features == datasets.Features(data.ROW_FEATURES)
    assert pickle.loads(pickle.dumps(second.rows))[:] == first.rows[:]


def test_other_bytes_are_read_anew_also_with_the_same_size_and_time(tmp_path, passes, folder):
    source = captions(tmp_path, "c", 9)
    load_source(source)
    before, text = os.stat(source.path), Path(source.path).read_text()
    Path(source.path).write_text(text.replace("第3张", "第7张"))
    os.utime(source.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_source(source)[3]["messages"][1]["content"][0]["text"] == "c 第7张"
    Path(source.path).write_text(text + "\nbroken")
    with pytest.raises(UserError, match="line 10: not JSON"):
        load_source(source)
    assert len(passes) == 3 and len(list(folder.iterdir())) == 1, "a changed file takes the place of the old one"


@pytest.mark.parametrize("changed", ["reading/json_text.py", "rows/formats.py", "data/source.py"])
def test_an_edit_of_the_code_that_makes_rows_reads_them_anew(tmp_path, passes, folder, monkeypatch, changed):
    """The rooms are copied, and a line of one of their modules changes."""
    copies = tuple(Path(shutil.copytree(there, tmp_path / there.name)) for there in row_cache._ROOMS)
    monkeypatch.setattr(row_cache, "_ROOMS", copies)
    source = captions(tmp_path, "c", 9)

    def start() -> int:
        row_cache._code.cache_clear()  # a new process
        load_source(source)
        return len(passes)

    assert [start(), start()] == [1, 1]
    module = tmp_path / changed
    module.write_text(module.read_text(encoding="utf-8") + "# 改了一行\n", encoding="utf-8")
    assert [start(), start()] == [2, 2] and len(list(folder.iterdir())) == 1
    row_cache._code.cache_clear()


def test_the_rooms_whose_code_makes_rows_are_those_that_reading_a_source_loads():
    """Every module of ours that `data.source` imports, in turn, but for `base` and `spoken`, which know no rows."""
    found, new = set(), [sys.modules["vlm_sft.data.source"]]
    while new:
        found.add(module := new.pop())
        imported = {sys.modules.get(getattr(value, "__module__", None) or "") for value in vars(module).values()}
        new += [one for one in imported - found - {None} if one.__name__.startswith("vlm_sft.")]
    rooms = {Path(module.__file__).parent for module in found}
    assert set(row_cache._ROOMS) == {room for room in rooms if room.name not in ("base", "spoken")}


@pytest.mark.parametrize(
    "change",
    [{"images": "photos"}, {"name": "d"}, {"max_rows": 5}, {"prompts": ["What?"]}, {"columns": {"caption": "image"}}],
)
def test_other_settings_are_read_anew_but_not_another_weight(tmp_path, passes, monkeypatch, change):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    source = captions(tmp_path, "c", 9)
    load_source(source)
    changed = source.model_copy(update=change)
    kept, read = load_source(changed)[:], len(passes)
    datasets.disable_caching()
    try:
        assert kept == load_source(changed)[:] != load_source(source)[:]
    finally:
        datasets.enable_caching()
    assert read == 2
    load_source(source.model_copy(update={"weight": 7.0, "repeat": 2}))
    assert len(passes) == read + 2, "only the two without a cache"


def test_prompts_are_drawn_by_the_seed(tmp_path, passes):
    source = captions(tmp_path, "c", 30).model_copy(update={"prompts": ["A?", "B?"]})
    drawn = [[row["messages"][0]["content"][1]["text"] for row in load_source(source, seed=seed)] for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1] and len(passes) == 2


def test_rejected_rows_are_told_again(tmp_path, passes):
    rows = [{"image": "a.png", "caption": text} for text in ("one", " ", "two", "three", "")]
    source = Source(path=write(tmp_path / "c.jsonl", rows), format="caption")
    told: list[list[tuple[str, str, str]]] = [[], []]
    for sentences in told:
        load_source(source, reject=lambda error, to=sentences: to.append((str(error), error.where, error.reason)))
    assert told[0] == told[1] and [reason for _, _, reason in told[1]] == ["no answer"] * 2 and len(passes) == 1
    with pytest.raises(RowError, match="line 2: "):
        load_source(source)


def test_what_is_never_kept(tmp_path, passes, folder, monkeypatch):
    rows = [{"image": {"bytes": b"png", "path": None}, "text": "x"}] * 9
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    uri = "data:image/png;base64," + base64.b64encode(b"png").decode()
    embedded = write(tmp_path / "u.jsonl", [{"image": uri, "text": "x"}] * 9)
    for path in (str(tmp_path / "p.parquet"), embedded, captions(tmp_path, "few", 2).path):
        load_source(Source(path=path, format="caption"))
    assert not folder.exists()


def test_a_damaged_file_is_written_again_and_a_full_disk_is_no_error(tmp_path, passes, folder, monkeypatch):
    source = captions(tmp_path, "c", 9)
    rows = load_source(source)[:]
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", b"no Arrow", whole[: len(whole) // 2]):
        kept.write_bytes(damaged)
        assert load_source(source)[:] == rows
        assert kept.read_bytes() == whole
    assert len(passes) == 4

    def full(*args):
        raise OSError(28, "No space left on device")

    kept.unlink()
    monkeypatch.setattr("os.replace", full)
    assert load_source(source)[:] == rows and list(folder.iterdir()) == []


def test_documents_and_their_annotations(tmp_path, passes):
    questions = {
        "data_subtype": "x",
        "questions": [{"image_id": i, "question": "?", "question_id": i} for i in range(9)],
    }
    paths = []
    for answer in ("yes", "no"):
        records = [{"question_id": i, "answers": [{"answer": answer}]} for i in range(9)]
        write(tmp_path / "a.json", json.dumps({"annotations": records}))
        path = write(tmp_path / "q.json", json.dumps(questions))
        source = Source(path=path, format="vqav2", annotations=str(tmp_path / "a.json"))
        load_source(source)
        paths.append(load_source(source)[0]["messages"][1]["content"][0]["text"])
    assert paths == ["yes", "no"] and len(passes) == 2


@pytest.fixture
def two(monkeypatch) -> None:
    """Two processes read sources of a few rows, a few at a time."""
    monkeypatch.setattr(data, "cores_for_each", lambda: 2)
    monkeypatch.setattr(data, "ROWS_WORTH_A_WORKER", 1)
    monkeypatch.setattr(data, "_CHUNK_ROWS", 3)


PROMPTS = {"zh": ["描述这张图。", "图里有什么？"], "en": ["Describe it.", "What is there?"]}
KINDS = {
    "lines": ({"format": "caption", "prompts": PROMPTS}, ".jsonl"),
    "a document": ({"format": "caption", "prompts": PROMPTS}, ".json"),
    "a table": ({"format": "caption", "prompts": PROMPTS}, ".csv"),
    "several rows of one": ({"format": "caption"}, ".jsonl"),
    "columns": ({"format": "caption", "columns": {"caption": "text"}}, ".jsonl"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("two")
def test_what_two_processes_read_is_what_one_reads(tmp_path, monkeypatch, kind):
    given, suffix = KINDS[kind]
    name = given.get("columns", {}).get("caption", "caption")
    rows = [{"image": f"{i}.png", name: f"图 {i}" if i % 2 else f"picture {i}", "seen": "x"} for i in range(20)]
    if kind == "several rows of one":
        rows = [{**row, "caption": [row["caption"], "另一个"]} for row in rows]
    for number in (4, 5, 19):
        rows[number][name] = ""
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        table = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(table), encoding="utf-8")
    else:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    source = Source(path=str(path), **given)
    found = []
    for cores in (2, 1):
        monkeypatch.setattr(data, "cores_for_each", lambda cores=cores: cores)
        errors, counts, told = [], {}, []
        part = read_source(
            source, languages=True, reject=lambda error, errors=errors: errors.append((str(error), error.reason)),
            unused=counts.update, tell=lambda done, of, told=told: told.append(done),
        )  # fmt: skip
        found.append((part.rows[:], part.rows.features, part.languages, errors, counts, told[-1]))
        shutil.rmtree(tmp_path / "cache")
    assert found[0] == found[1] and len(found[0][3]) == 3 and found[0][4] == {"seen": 17}


@pytest.mark.usefixtures("two")
def test_where_one_of_two_processes_cannot_go_on_its_sentence_is_said(tmp_path, passes):
    source = captions(tmp_path, "c", 20)
    lines = Path(source.path).read_bytes().splitlines()
    Path(source.path).write_bytes(b"\n".join([*lines[:11], "中文".encode("gb18030"), *lines[11:]]))
    with pytest.raises(UserError, match="line 12: byte 0xd6 is not UTF-8") as raised:
        load_source(source)
    assert "Traceback" not in str(raised.value) and not passes
    with pytest.raises(UserError, match=r'No row of .* has the column "other"'):
        load_source(captions(tmp_path, "d", 20).model_copy(update={"columns": {"id": "other"}}))
    Path(source.path).write_bytes(b"\n" * 100)
    with pytest.raises(UserError, match="holds no rows"):
        load_source(source)
    Path(source.path).write_bytes(b"\n".join([*lines[:7], b"{broken", *lines[7:]]))
    with pytest.raises(RowError, match="line 8: not JSON"):
        load_source(source)
