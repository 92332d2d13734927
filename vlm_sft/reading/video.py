"""One video, whatever it is on disk: how long it is, and the picture at each time of it, or why there is none.

PyAV reads films; Pillow reads GIF, WebP and PNG that move. Only the film itself is opened: no playlist, no URL and no
file that it names. A time is reached from the keyframe before it, and what is decoded on the way is bounded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

from PIL import Image

from ..base.errors import RowError, row_error
from ..base.limits import READERS, limits
from ..base.names import ImageEntry
from ..base.whole_files import IrregularError, open_regular
from ..base.words import reason_of
from .image_kinds import kind_of
from .image_refs import size_asked

if TYPE_CHECKING:
    from av import VideoFrame

NEAR = 1.0  # seconds ahead, for which decoding on is quicker than to seek
_TICK = 0.001  # seconds by which containers round the time of a frame
_UNTIMED = 0.1  # seconds that a picture of a GIF is shown where it does not say so, as browsers have it
_MOVING = ("GIF", "PNG", "WebP")
# What films come in, and sound, so that it can be called so. No playlist is among them: those name other files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,mpegvideo,ogg,ivf,mxf,nut,dv,yuv4mpegpipe,"
    "mp3,wav,flac,aac"
)


class Films(AbstractContextManager["Films"]):
    """Videos by what rows say of their frames; the last one stays open for the next frame. Never across a fork."""

    def __init__(self) -> None:
        self._key: str | bytes | None = None
        self._film: Film | None = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open."""
        if self._film is not None:
            self._film.close()
        self._key = self._film = None

    def open(self, video: ImageEntry, where: str) -> Film:
        """The open video of an entry ``{"path", "bytes"}``.

        Raises:
            RowError: It cannot be read as one.
        """
        key = video["path"] if video["bytes"] is None else video["bytes"]
        if self._film is None or key != self._key:
            self.close()
            self._film, self._key = open_film(video, where), key
        return self._film

    def size(self, frame: ImageEntry, where: str) -> tuple[int, int]:
        """(width, height) that `frame` will give, mostly from the header and one frame."""
        film = self.open(frame, where)
        with _readable(frame, where):
            return size_asked(film.size, frame)

    def frame(self, frame: ImageEntry, where: str, max_pixels: int) -> Image.Image:
        """The picture that an entry ``{"path", "bytes", "time"}``, maybe with sizes, stands for.

        Raises:
            RowError: The video ends before, is damaged there, or has more than `max_pixels`.
        """
        film = self.open(frame, where)
        with _readable(frame, where):
            _check_pixels(film.pixels, max_pixels)  # before anything is decoded
            film.show(frame["time"])
            size = size_asked(film.size, frame)
            _check_pixels(math.prod(size), max_pixels)
            return film.picture(size)


def _check_pixels(pixels: int, most: int) -> None:
    if pixels > most:
        what = f"has {pixels:,} pixels a frame, more than the {most:,} allowed"
        raise _ProblemError(what, "scale it down or remove the row", "image too large")


class _ProblemError(Exception):
    """What is wrong with a video: the rest of a sentence that begins with its name, its mend and its reason."""


@contextmanager
def _readable(video: ImageEntry, where: str) -> Iterator[None]:
    """Makes what goes wrong with a video the error of its row."""
    name = f"the video {video['path'] or '(embedded)'}"
    try:
        yield
    except RowError:
        raise
    except _ProblemError as problem:
        what, mend, reason = problem.args
        raise row_error(where, f"{name} {what}", mend, reason) from None
    except Exception as error:  # FFmpeg and Pillow raise anything on a damaged file
        why = reason_of(error).partition(": ")[0]
        # FFmpeg calls a container that is not in the list an invalid argument.
        found = "in a container that is not read" if why == "Invalid argument" else f"damaged or no video ({why})"
        mend = "write it anew as mp4 or remove the row"
        raise row_error(where, f"{name} is {found}", mend, "video damaged") from None


def open_film(video: ImageEntry, where: str) -> Film:
    """Opens a video ``{"path", "bytes"}``, of which the bytes win.

    Raises:
        RowError: It is missing, empty, no video, a still picture, or has sound alone.
    """
    with _readable(video, where):
        encoded, path = video["bytes"], video["path"]
        head = encoded[:64] if encoded is not None else _head(path)
        if not head:
            raise _ProblemError("is empty (0 bytes)", "write it anew or remove the row", "video damaged")
        kind = kind_of(head) if head[:4] != b"RIFF" or head[8:12] == b"WEBP" else None  # AVI and WAV are RIFF too
        if kind is not None and kind.name in _MOVING:
            return _Animation(path if encoded is None else io.BytesIO(encoded))
        if kind is not None:
            raise _ProblemError(f"is a picture ({kind.name})", "name it under `images`", "not a video")
        # Without "file:", a name could be taken for one of FFmpeg's protocols.
        return _Stream(f"file:{path}" if encoded is None else io.BytesIO(encoded))
    raise AssertionError


def _head(path: str) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(64)
    except IrregularError as error:
        kind = error.what if error.what == "a folder" else "not a regular file"
        raise _ProblemError(f"is {kind}", "correct the path or remove the row", "video missing") from None
    except (FileNotFoundError, NotADirectoryError):
        raise _ProblemError("was not found", "correct the path or remove the row", "video missing") from None
    except OSError as error:
        what = f"cannot be opened ({reason_of(error)})"
        raise _ProblemError(what, "check its permissions and the disk", "video missing") from None


class _Stream:
    """A film that PyAV reads.

    Attributes:
        length: Seconds.
        count: Frames, about; None where nobody knows.
        pixels: Of a frame, as it is encoded.
        size: (width, height) of a frame as it is shown, upright.
    """

    def __init__(self, file: str | io.BytesIO) -> None:
        self._file = file
        self._shown: VideoFrame | None = None
        self._turn: int | None = None
        self._seeks = True
        self._open()
        stream = self._stream
        self.pixels = stream.width * stream.height
        self._base = float(stream.time_base or 0) or 1e-3
        self._start = (stream.start_time or 0) * self._base
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self._step = 1 / rate if rate else 0.0
        counted = stream.frames  # now: a length that has to be looked for opens the film again
        self.length = self._length()
        self.count = counted or (max(1, round(self.length * rate)) if rate else None)

    def _open(self) -> None:
        import av

        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        self._container = av.open(self._file, "r", options=options, metadata_errors="replace")
        pictures = av.stream.Disposition.attached_pic  # such as the cover of a song
        found = [stream for stream in self._container.streams.video if not stream.disposition & pictures]
        if not found:
            heard = "has sound but no picture" if self._container.streams.audio else "has no picture"
            self.close()
            raise _ProblemError(heard, "give a video, or remove the row", "not a video")
        self._stream = found[0]
        self._stream.codec_context.thread_count = 1  # many workers decode at once
        self._frames: Iterator[VideoFrame] = iter(self._container.decode(self._stream))
        self._following: VideoFrame | None = None

    def _length(self) -> float:
        stream, container = self._stream, self._container
        found = 0.0
        if stream.duration:
            found = stream.duration * self._base
        elif said := stream.metadata.get("DURATION"):  # Matroska: 00:00:04.000000000
            found = sum(float(part) * 60**power for power, part in enumerate(reversed(said.split(":"))))
        elif container.duration:
            found = container.duration / 1e6
        if found <= 0 or not math.isfinite(found):
            found = self._counted()
        return found

    def _counted(self) -> float:
        """The length of a film whose header does not say it, by the times of its packets; nothing is decoded."""
        last, seen = -math.inf, 0
        for seen, packet in enumerate(self._container.demux(self._stream), start=1):
            if packet.pts is not None:
                last = max(last, (packet.pts + (packet.duration or 0)) * self._base)
            if seen > READERS.video_packets:
                raise _ProblemError("does not say how long it is", "write it anew with `ffmpeg -i`", "length unknown")
        self._container.close()
        self._open()
        if seen <= 1:  # the last packet is an empty one
            raise _ProblemError("holds no frame", "write it anew or remove the row", "video damaged")
        if last == -math.inf:
            raise _ProblemError("does not say when its frames are shown", "write it anew as mp4", "length unknown")
        return max(last - self._start, self._step)

    @property
    def size(self) -> tuple[int, int]:
        if self._turn is None:  # only a frame says that the film lies on its side
            self.show(0.0)
        width, height = self._stream.width, self._stream.height
        wide = float(self._stream.sample_aspect_ratio or 1) or 1.0  # width of a pixel by its height
        shown = (round(width * wide), height) if wide > 1 else (width, round(height / wide))
        return shown[::-1] if (self._turn or 0) % 180 else shown

    def show(self, time: float) -> None:
        """Goes to the frame that is seen at a time."""
        target = self._start + time + _TICK
        if self._must_seek(target):
            self._seek(target)
        for _ in range(limits().video_decoded):
            if self._following is None:
                self._following = next(self._frames, None)
            if self._following is None or (self._shown is not None and self._time(self._following) > target):
                break
            self._shown, self._following = self._following, None
            if self._time(self._shown) > target:  # the film begins later
                break
        else:
            what = f"has no keyframe in the {limits().video_decoded:,} frames before {time:.1f} s"
            raise _ProblemError(what, "write it anew with `ffmpeg -g 250`", "video damaged")
        if self._shown is None:
            raise _ProblemError("holds no frame that can be read", "write it anew or remove the row", "video damaged")
        self._turn = self._shown.rotation
        end = self._time(self._shown) + (self._shown.duration or 0) * self._base
        if self._following is None and target > end + max(NEAR, self.length / 20):
            what = f"breaks off after {end - self._start:.1f} of {self.length:.1f} seconds"
            raise _ProblemError(what, "write it anew or remove the row", "video damaged")

    def _time(self, frame: VideoFrame) -> float:
        return -math.inf if frame.time is None else float(frame.time)

    def _must_seek(self, target: float) -> bool:
        if self._shown is None:
            return target > self._start + NEAR
        now = self._time(self._shown)
        if target < now:
            return True
        if target - now < NEAR or not self._seeks:
            return False
        index = self._stream.index_entries
        if len(index) > 1:
            entry = index.search_timestamp(int(target / self._base))
            return entry >= 0 and index[entry].timestamp * self._base > now
        return True

    def _seek(self, target: float) -> None:
        """Goes to the keyframe before a time, or earlier where the container's index is not exact."""
        now = -math.inf if self._shown is None else self._time(self._shown)
        for back in (0.0, 2.0, 15.0):
            if (to := target - back) <= self._start:
                break
            try:
                self._container.seek(int(to / self._base), stream=self._stream)
            except OSError:  # a container without any way to seek
                break
            self._frames = iter(self._container.decode(self._stream))
            first = next(self._frames, None)
            if first is not None and self._time(first) <= target:
                self._seeks = self._time(first) > now  # else every seek of this film leads back to its beginning
                self._shown, self._following = None, first
                return
        self._container.close()
        self._open()
        self._shown, self._seeks = None, False

    def picture(self, size: tuple[int, int]) -> Image.Image:
        """That frame, upright, in that size."""
        assert self._shown is not None
        turn = (self._turn or 0) % 360
        width, height = size[::-1] if turn % 180 else size
        pixels = self._shown.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
        picture = Image.fromarray(pixels)
        turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
        return picture.transpose(turns[turn]) if turn in turns else picture

    def close(self) -> None:
        self._container.close()


class _Animation:
    """A GIF, WebP or PNG that moves; as `_Stream`."""

    def __init__(self, file: str | io.BytesIO) -> None:
        self._file = file
        self._open()
        self.count = getattr(self._image, "n_frames", 1)
        if self.count == 1:
            self.close()
            raise _ProblemError("is a picture that does not move", "name it under `images`", "not a video")
        if self.count > limits().video_decoded:
            what = f"has {self.count:,} pictures, more than the {limits().video_decoded:,} that are read"
            raise _ProblemError(what, "write it anew as mp4", "video damaged")
        shown = []
        for number in range(self.count):
            self._image.seek(number)
            shown.append(self._image.info.get("duration", 0) / 1000 or _UNTIMED)
        *self._starts, self.length = accumulate(shown, initial=0.0)
        self.size, self.pixels = self._image.size, math.prod(self._image.size)

    def _open(self) -> None:
        self._image = Image.open(self._file, formats=("GIF", "PNG", "WEBP"))

    def show(self, time: float) -> None:
        wanted = max(k for k, start in enumerate(self._starts) if k == 0 or start <= time + _TICK)
        if wanted < self._image.tell():  # Pillow loses its way in a PNG that goes back
            if isinstance(self._file, str):
                self._image.close()
            self._open()
        self._image.seek(wanted)

    def picture(self, size: tuple[int, int]) -> Image.Image:
        return self._image.convert("RGBA").resize(size, Image.Resampling.BICUBIC)  # of its own size, it stays as it is

    def close(self) -> None:
        self._image.close()


Film = _Stream | _Animation
