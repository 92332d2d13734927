"""Records in files of one process each: read while they grow, and never half."""

from __future__ import annotations

import pytest

from vlm_sft.cache.records import Records, append_whole, is_written, new_writer


def test_what_others_write_is_found_and_half_a_record_is_not(tmp_path):
    ours, theirs = Records(tmp_path, ".index", 2, 1), Records(tmp_path, ".index", 2, 1)
    ours.append("a", b"k1xk2y")
    assert list(theirs.new()) == [("a", 0, b"k1", b"x"), ("a", 1, b"k2", b"y")] and list(theirs.new()) == []
    with open(tmp_path / "a.index", "ab") as file:
        file.write(b"k3")  # killed here
    assert list(theirs.new()) == []
    with open(tmp_path / "a.index", "ab") as file:
        file.write(b"z")
    assert list(theirs.new()) == [("a", 2, b"k3", b"z")]


def test_a_folder_that_is_not_there_has_none(tmp_path):
    assert list(Records(tmp_path / "no", ".index", 2, 1).new()) == []


def test_what_cannot_be_written_whole_is_cut_off_again(tmp_path):
    path = tmp_path / "shard"

    class Full:
        """A disk with room for three bytes more."""

        def __init__(self, file):
            self.file, self.room = file, 3

        def fileno(self):
            return self.file.fileno()

        def write(self, view):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(view[: self.room])
            self.room -= written
            return written

    with open(path, "ab", buffering=0) as file:
        append_whole(file, b"whole")
        with pytest.raises(OSError, match="No space"):
            append_whole(Full(file), b"half of it")
    assert path.read_bytes() == b"whole"


def test_a_writer_is_known_as_long_as_it_lives(tmp_path):
    name, lock = new_writer(tmp_path)
    assert new_writer(tmp_path)[0] != name and is_written(tmp_path, name)
    lock.release()
    assert not is_written(tmp_path, name) and not (tmp_path / f"{name}.lock").exists()
