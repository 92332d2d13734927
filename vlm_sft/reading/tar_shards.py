"""Tar shards as WebDataset writes them → raw rows: the members with one key are one row.

`000012.jpg`, `000012.txt` and `000012.json` become `{"id": "000012", "image": …, "text": …, and the keys of the JSON}`.
Nothing is unpacked to disk, no name of a member is used as a path, and every size is bounded by that of the file, so a
hostile archive ends in a sentence.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..base.errors import RowError, UserError, row_error
from ..base.limits import READERS, limits
from ..base.names import ImageEntry, Json
from ..base.whole_files import open_regular
from .json_text import parse_json

IMAGE_ENDINGS = frozenset("jpg jpeg png webp bmp gif tif tiff ppm pgm".split())
VIDEO_ENDINGS = frozenset("mp4 webm mkv mov avi m4v".split())
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)

_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]*)", re.DOTALL)
"""WebDataset's rule: the key ends at the first dot of the last part. What it does not fit (`._x.jpg`) is no sample."""


class _Member(tarfile.TarInfo):
    """A header with sizes that cannot send tarfile back in the file or into long work."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in _EXTENDED and member.size > READERS.tar_header):
            raise tarfile.HeaderError("a header with an impossible size")
        return member


def read_tar(path: Path) -> Iterator[tuple[str, Json | RowError]]:
    """Yield one row for each key of a shard, in order; a sample that is wrong by itself is yielded as its error.

    A row has `id` (the key), the keys of the `.json` member, `text` of the `.txt` member, and `image` as
    ``{"path": name, "bytes": ...}`` or, of several, `images`, and likewise `video` or `videos`. Any
    other member is a column under its ending, as text.

    Raises:
        UserError: the archive is damaged, cut off or compressed.
    """
    sample: _Sample | None = None
    for member, data in _members(path):
        found = _NAME.fullmatch(member.name)
        if found is None:
            continue
        if sample is None or found["key"] != sample.key:
            if sample is not None:
                yield sample.where, sample.row()
            sample = _Sample(path, found["key"])
        sample.add(found["ending"].lower(), member.name, data)
    if sample is not None:
        yield sample.where, sample.row()


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Every member with its bytes; None for what is no regular file or too large."""
    size = os.path.getsize(path)
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            before = -1
            while (member := archive.next()) is not None:
                # tarfile keeps every header, which adds up over millions of samples.
                archive.members = []  # type: ignore[attr-defined]
                if archive.offset <= before or member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"member {member.name[:80]!a} is cut off")
                before = archive.offset
                if member.isdir():
                    continue
                readable = member.isreg() and not member.issparse() and member.size <= limits().row_bytes
                stream = archive.extractfile(member) if readable else None
                yield member, stream.read() if stream is not None else None
            _check_end(path, archive.offset)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or ["no header"])[0]
        mend = "write it again (compressed archives are not read: unpack .tar.gz to .tar first)"
        raise UserError(f"{path}: not a whole tar archive ({reason}): {mend}.") from None


def _check_end(path: Path, offset: int) -> None:
    """Look that nothing but zeros follows; tarfile takes any wrong header, and any block of zeros, for the end."""
    with open_regular(path) as file:
        file.seek(offset)
        if len(rest := file.read(2**20)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")
        while rest:
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"it goes on behind its end, from byte {offset}")
            rest = file.read(2**20)


class _Sample:
    """The members of one key, as they come."""

    def __init__(self, path: Path, key: str) -> None:
        self.key, self.where = key, f"{path}, sample {key[:80]!a}"
        self.columns: Json = {}
        self.document: Json = {}
        self.images: list[ImageEntry] = []
        self.videos: list[ImageEntry] = []
        self.problem: RowError | None = None

    def add(self, ending: str, name: str, data: bytes | None) -> None:
        """Puts one member in its column; the first thing wrong is the sample's problem."""
        try:
            self._add(ending, name, data)
        except RowError as error:
            self.problem = self.problem or error

    def _add(self, ending: str, name: str, data: bytes | None) -> None:
        shown = ascii(name[:80])
        if name.startswith("/") or ".." in name.split("/"):
            mend = "pack it under a plain name"
            raise row_error(self.where, f"the name {shown} leads out of the archive", mend, "wrong name")
        if name.encode("utf-8", "ignore").decode() != name:
            raise row_error(self.where, f"the name {shown} is not UTF-8", "pack it under a plain name", "wrong name")
        if data is None:
            what = f"the member {shown} is a link, sparse or larger than {limits().row_bytes >> 20} MiB"
            raise row_error(self.where, what, "pack the file itself", "not a file")
        column = "text" if ending == "txt" else ending
        if ending.rpartition(".")[2] in IMAGE_ENDINGS:
            self.images.append({"path": name, "bytes": data})
        elif ending.rpartition(".")[2] in VIDEO_ENDINGS:
            self.videos.append({"path": name, "bytes": data})
        elif column in self.columns:
            raise row_error(self.where, f"there are two members with the ending .{ending}", "pack one", "member twice")
        elif column == "json":
            document = parse_json(data, self.where)
            if not isinstance(document, dict):
                raise row_error(self.where, f"{shown} is not an object with named values", "correct it", "wrong type")
            self.document = document
        else:
            self.columns[column] = data
            with suppress(UnicodeDecodeError):  # what is no text stays as it is
                self.columns[column] = data.decode("utf-8")

    def row(self) -> Json | RowError:
        """Members win over the JSON, which may name the file that the image once was."""
        if self.problem is not None:
            return self.problem
        columns: Json = {}
        for name, found in (("image", self.images), ("video", self.videos)):
            if found:
                columns |= {name: found[0]} if len(found) == 1 else {f"{name}s": found}
        return {"id": self.key} | self.document | self.columns | columns
