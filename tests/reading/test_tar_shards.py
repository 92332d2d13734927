"""WebDataset's tar shards to rows, and archives that are damaged or hostile."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.reading.tar_shards import read_tar


def shard(path: Path, members: dict[str, bytes | str], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        list(read_tar(path))
    assert not isinstance(raised.value, RowError)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rows_or_sentence(path: Path) -> tuple[list, str]:
    try:
        return [row for _, row in read_tar(path)], ""
    except UserError as error:
        return [], str(error)


def test_members_with_one_key_are_a_row(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        {
            "0001.jpg": b"JPEG",
            "0001.txt": "一只猫",
            "0001.json": json.dumps({"url": "http://x", "image": "old.png", "id": 7}),
            "sub.dir/0002.left.png": b"PNG",
            "sub.dir/0002.right.webp": b"WEBP",
            "sub.dir/0002.cls": "3",
            "._0003.jpg": b"of a Mac",
            "README": "no sample",
            "0003.txt": "text alone",
            "0003.npy": b"\x93NUMPY",
        },
    )
    rows = dict(read_tar(path))
    assert list(rows) == [f"{path}, sample {key}" for key in ("'0001'", "'sub.dir/0002'", "'0003'")]
    assert list(rows.values()) == [
        {"id": 7, "url": "http://x", "text": "一只猫", "image": {"path": "0001.jpg", "bytes": b"JPEG"}},
        {
            "id": "sub.dir/0002",
            "cls": "3",
            "images": [
                {"path": "sub.dir/0002.left.png", "bytes": b"PNG"},
                {"path": "sub.dir/0002.right.webp", "bytes": b"WEBP"},
            ],
        },
        {"id": "0003", "text": "text alone", "npy": b"\x93NUMPY"},
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format(tmp_path, form):
    path = shard(tmp_path / "a.tar", {"d/" * 40 + "long.txt": "x", "猫.txt": "y"}, format=form)
    assert [row["text"] for _, row in read_tar(path)] == ["x", "y"]


def test_a_wrong_sample_leaves_the_others(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        {"1.txt": "x", "2.json": "{", "3.json": "[]", "4.txt": "a", "4.TXT": "b", "../5.txt": "x", "/6.txt": "x"},
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("7.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    rows = [row for _, row in read_tar(path)]
    assert rows[0] == {"id": "1", "text": "x"}
    reasons = ["not JSON", "wrong type", "member twice", "wrong name", "wrong name", "not a file"]
    assert [row.reason for row in rows[1:]] == reasons
    assert (
        str(rows[4])
        == f"{path}, sample '../5': the name '../5.txt' leads out of the archive: pack it under a plain name."
    )
    assert not list(tmp_path.glob("[!a]*")), "nothing is unpacked"


@pytest.mark.parametrize("cut", [1, 511, 512, 700, 1023, 1024, 1025, 1536, 2047])
def test_an_archive_that_is_cut_off(tmp_path, cut):
    whole = shard(tmp_path / "a.tar", {"1.txt": "x" * 100, "2.txt": "y"}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:cut])
    assert f"{tmp_path}/b.tar: not a whole tar archive (" in refused(tmp_path / "b.tar")


def test_what_lies_behind_the_end_is_not_dropped(tmp_path):
    parts = [shard(tmp_path / "a.tar", {name: "x"}).read_bytes() for name in ("1.txt", "2.txt")]
    (tmp_path / "b.tar").write_bytes(b"".join(parts))
    assert "(it goes on behind its end, from byte 1024)" in refused(tmp_path / "b.tar")
    wrong = bytearray(parts[0][:1024] + parts[1])
    wrong[1024 + 148] ^= 1  # of the second header's checksum
    (tmp_path / "b.tar").write_bytes(wrong)
    assert "(it goes on behind its end, from byte 1024)" in refused(tmp_path / "b.tar")


def test_names_that_are_no_text(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.\udcff.jpg": b"x", "2.txt": "x"}, format=tarfile.GNU_FORMAT)
    rows = [row for _, row in read_tar(path)]
    assert (rows[0].reason, rows[1]["id"]) == ("wrong name", "2")
    assert str(rows[0]) == f"{path}, sample '1': the name '1.\\udcff.jpg' is not UTF-8: pack it under a plain name."


def test_compressed_archives_are_named(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.txt": "x"})
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(path)
    assert "unpack .tar.gz to .tar first" in refused(tmp_path / "b.tar")


def endless() -> dict[str, bytes]:
    """Archives that send a plain reader back in the file, into very long work or into all memory."""
    negative = bytearray(header("1.txt"))
    negative[124:136] = (b"\xff" * 11) + b"\x00"  # a size below zero in base 256
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:]))
    record = b"20 size=-1024\n".ljust(512, b"\0")
    digits = b"1" * 2**20
    return {
        "negative size": bytes(negative) * 2,
        "negative size in pax": header("x", tarfile.XHDTYPE, 14) + record + header("1.txt", size=3) + b"x" * 512,
        "long digits in pax": header("x", tarfile.XHDTYPE, len(digits)) + digits + header("1.txt") + bytes(1024),
        "a member of 7 GiB": header("1.jpg", size=7 * 2**30) + bytes(1024),
        "a sparse file": header("1.jpg", tarfile.GNUTYPE_SPARSE, 0) + bytes(1024),
        "global pax header": header("x", tarfile.XGLTYPE, 14) + record + header("1.txt", size=3) + b"x" * 512,
    }


@pytest.mark.parametrize("name", list(endless()))
def test_hostile_archives_end(tmp_path, name):
    (tmp_path / "a.tar").write_bytes(endless()[name])
    rows, message = rows_or_sentence(tmp_path / "a.tar")
    assert "not a whole tar archive" in message or (rows and all(isinstance(row, RowError) for row in rows))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_rows_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    form = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    whole = shard(path, {"é1.txt": "x", "d/" * 60 + "2.json": "{}", "2.jpg": b"x" * 600}, format=form).read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, 6000))])
    for place in data.draw(st.lists(st.integers(0, 5000), max_size=6)):
        if place < len(damaged):
            damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    rows, message = rows_or_sentence(path)
    assert "\n" not in message
    assert all(isinstance(row, dict | RowError) for row in rows)


def test_videos_are_their_own_column(tmp_path):
    members = {"1.mp4": b"A", "1.json": '{"video": "old.mp4"}', "2.a.webm": b"B", "2.b.mkv": b"C", "2.jpg": b"D"}
    (_, one), (_, two) = read_tar(shard(tmp_path / "a.tar", members))
    assert one == {"id": "1", "video": {"path": "1.mp4", "bytes": b"A"}}
    assert [video["bytes"] for video in two["videos"]] == [b"B", b"C"] and two["image"]["bytes"] == b"D"
