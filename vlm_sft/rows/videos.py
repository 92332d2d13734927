"""Videos in rows → frames: each an image with its time in text before it, and from there on like any other image.

What a row says of a video is checked where the row is read (`video_entry`, `place_videos`); only `with_frames` opens
it, for its header, to know which times there are. Frames are decoded where images are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..base.errors import row_error
from ..base.limits import limits
from ..base.names import VIDEO_TOKEN, ImageEntry
from ..base.words import counted, kind, short
from ..reading.image_refs import SIZES, TIME, sizes_of
from ..reading.video import Film, Films
from .keys import check_left
from .messages import Example, Message, Part, image_part, text_part, video_part
from .raw_row import RowView

REFERENCES = ("video", "path", "bytes", "url", "video_url")
COLUMNS = ("videos", "video")
_NUMBERS = {
    "fps": "fps", "sample_fps": "fps", "frames": "frames", "nframes": "frames", "num_frames": "frames",
    "max_frames": "max_frames", "min_frames": "min_frames", "video_start": "start", "video_end": "end",
}  # fmt: skip
"""What Qwen and others call what a video's entry may say → what it is called here."""
_WHOLE = ("frames", "max_frames", "min_frames")
FRAMES = 8  # of a video for which nobody says how many
FRAMES_A_SECOND = 2.0  # of a list of pictures that does not say it, as Qwen has it


class Sampling(NamedTuple):
    """Which frames of a video are shown.

    Attributes:
        frames: So many, from the first to the last in equal steps; of fewer, each.
        fps: So many a second. Of `frames` and `fps` one is given; neither means `FRAMES` frames.
        min_frames: With `fps`: where there would be fewer, so many in equal steps.
        max_frames: With `fps`: where there would be more, so many in equal steps.
        max_pixels: Width times height of a frame at most; a larger one is scaled down.
        time: What stands before a frame: `{time}` in it is the second, `{clock}` the minute and second; "" for nothing.
    """

    frames: int | None = None
    fps: float | None = None
    min_frames: int = 1
    max_frames: int = 64
    max_pixels: int = 512 * 512
    time: str = "<{time} seconds>"

    def written(self, time: float) -> str:
        """What stands before the frame at a time."""
        whole = int(time)
        clock = f"{whole // 60:02d}:{whole % 60:02d}"
        return self.time.replace("{time}", f"{time:.1f}").replace("{clock}", clock)


def video_entry(row: RowView, video: object, key: str) -> ImageEntry:
    """What a row says of one video: `file` (a path, bytes or a list of pictures), and how it is to be shown.

    Raises:
        RowError: It says what it cannot say, or two things at once.
    """
    if not isinstance(video, Mapping):
        if not isinstance(video, str | bytes | list) or not video:
            what = f"{key} is {kind(video)} and names no video"
            raise row.error(what, "write the path of a file, or a list of the pictures of one", "wrong type")
        return {"file": video}
    given = next((name for name in REFERENCES if video.get(name) is not None), None)
    if given == "path" and video.get("bytes") is not None:
        given = "bytes"
    check_left(row, "part", video, ("type", given, "path", *_NUMBERS, *SIZES), f"{key}.")
    found = None if given is None else video[given]
    if isinstance(found, Mapping):
        return video_entry(row, {**found, **{k: v for k, v in video.items() if k in (*_NUMBERS, *SIZES)}}, key)
    entry: ImageEntry = {"file": found, "name": video.get("path")}
    for name, ours in _NUMBERS.items():
        if (value := video.get(name)) is None:
            continue
        least, bound = (0, "from zero on") if ours in ("start", "end") else (1e-6, "above zero")
        number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")
        most = limits().video_frames
        if not number or (ours in _WHOLE and (value % 1 or value > most)):
            whole = f"write a whole number from 1 to {most:,} (`limits.video_frames`)"
            mend = whole if ours in _WHOLE else f"write a number {bound}"
            raise row.error(f"{key}.{name} is {short(str(value))}", mend)
        if ours in entry and entry[ours] != value:
            raise row.error(f"{key} says twice and differently what {ours} is", "keep one of them", "marks differ")
        entry[ours] = int(value) if ours in _WHOLE else float(value)
    if "fps" in entry and "frames" in entry and not isinstance(found, list):
        names = [name for name in _NUMBERS if video.get(name) is not None and _NUMBERS[name] in ("fps", "frames")]
        mend = "keep one of them: each says how many frames"
        raise row.error(f"{key} has {' and '.join(names)}", mend, "key refused")
    return {**entry, **sizes_of(video, row.where)}


def place_videos(row: RowView, example: Example) -> Example:
    """Gives each place of a video in the messages the row's next one; without any place, all stand in front.

    Raises:
        RowError: There are as many places as videos neither way.
    """
    given = [video_entry(row, video, f"videos[{i}]") for i, video in enumerate(row.images(*COLUMNS))]
    places = [part for m in example.messages for part in m["content"] if part["type"] == "video"]
    first = next((i for i, m in enumerate(example.messages) if m["role"] == "user"), None)
    if given and not places and first is not None and not example.marked:
        messages = list(example.messages)
        shown = [video_part(entry) for entry in given]
        messages[first] = {**messages[first], "content": shown + messages[first]["content"]}
        return example._replace(messages=messages)
    empty = [part for part in places if part["video"] is None]
    if len(empty) != len(given):
        found = f"{counted(len(empty), 'video mark')} ({VIDEO_TOKEN} in user text, or video parts)"
        mend = "give every mark its video, in order"
        raise row.error(f"{found} but {counted(len(given), 'video')}", mend, "marks differ")
    for part, entry in zip(empty, given, strict=True):
        part["video"] = entry
    return example


def with_frames(
    example: Example, resolve: Callable[..., ImageEntry], where: str, sampling: Sampling
) -> tuple[list[Message], list[ImageEntry]]:
    """Messages in which every video is its frames, and all images as `resolve_image` gives them, in reading order.

    Args:
        example: A conversation as `formats` gives it.
        resolve: `resolve_image` of this row: what it writes for an image → its entry.
        where: The row's place in words.
        sampling: What is shown of a video that does not say it.

    Raises:
        RowError: An image or a video cannot be had.
        UserError: As `resolve_image`.
    """
    images = [resolve(image) for image in example.images]
    if all(part["type"] != "video" for message in example.messages for part in message["content"]):
        return example.messages, images
    left, found = iter(images), list[ImageEntry]()
    place: dict[int, int] = {}  # number of an image among the row's own → among all
    messages = []
    for message in example.messages:
        parts: list[Part] = []
        for part in message["content"]:
            if part["type"] == "video":
                for said, frame in frames_of(part["video"], resolve, where, sampling):
                    parts += [*([text_part(said)] if said else []), image_part()]
                    found.append(frame)
                continue
            if part["type"] == "image":
                place[len(place)] = len(found)
                found.append(next(left))
            parts.append(part)
        messages.append({**message, "content": parts})
    for message in messages:  # when all images have their places, for a box may name one that comes later
        message["content"] = [
            {**part, "image": place[part["image"]]} if part["type"] == "box" else part for part in message["content"]
        ]
    return messages, found


def frames_of(
    entry: ImageEntry, resolve: Callable[..., ImageEntry], where: str, sampling: Sampling
) -> list[tuple[str, ImageEntry]]:
    """Each frame of a video that is shown: what stands before it, and the image; arguments as `with_frames`."""
    file = entry["file"]
    sizes = {name: entry[name] for name in SIZES if name in entry}
    if isinstance(file, list):
        pictures = [resolve(picture, noun="a frame") for picture in file]
        rate = entry.get("fps", FRAMES_A_SECOND)
        most = entry.get("frames") or entry.get("max_frames", sampling.max_frames)
        return [(sampling.written(k / rate), {**pictures[k], **sizes}) for k in evenly(len(pictures), most)]
    if not sizes.keys() - {"min_pixels"} and sizes.get("min_pixels", 0) <= sampling.max_pixels:
        sizes["max_pixels"] = sampling.max_pixels
    if entry.keys() & {"fps", "frames"}:
        sampling = sampling._replace(fps=entry.get("fps"), frames=entry.get("frames"))
    more = {name: entry[name] for name in ("max_frames", "min_frames") if name in entry}
    given = {"path": entry.get("name"), "bytes": file} if isinstance(file, bytes) else file
    video = resolve(given, noun="a video", allow_urls=False)
    with Films() as films:
        film = films.open(video, where)
        times = times_of(film, sampling._replace(**more), where, entry.get("start", 0.0), entry.get("end"))
    return [(sampling.written(time), {**video, TIME: time, **sizes}) for time in times]


def times_of(film: Film, sampling: Sampling, where: str, start: float = 0.0, end: float | None = None) -> list[float]:
    """The seconds of a video whose frames are shown, in order.

    Args:
        film: An open video.
        sampling: How many.
        where: The row's place in words.
        start: Where to begin, in seconds.
        end: Where to end; None for the end of the video.

    Raises:
        RowError: Nothing lies between `start` and `end`.
    """
    end = film.length if end is None else min(end, film.length)
    if start >= end:
        what = f"a video of {film.length:.1f} seconds is to be shown from {start:g} to {end:g}"
        raise row_error(where, what, "correct video_start and video_end", "wrong type")
    step = film.length / film.count if film.count else 0.0
    last = max(start, end - step)  # where the last frame begins
    wanted = sampling.frames or FRAMES
    if sampling.fps:
        wanted = math.floor((last - start) * sampling.fps + 1e-6) + 1
        if sampling.min_frames <= wanted <= sampling.max_frames:
            return [round(start + number / sampling.fps, 4) for number in range(wanted)]
        wanted = max(sampling.min_frames, min(wanted, sampling.max_frames))
    if step:  # at the beginning of a frame, so that what is written is when it was filmed
        first = math.floor(start / step + 1e-6)
        there = max(0, math.floor(last / step + 1e-6) - first) + 1
        return [round((first + number) * step, 4) for number in evenly(there, wanted)]
    return [round(start + (last - start) * number / 999, 4) for number in evenly(1000, wanted)]


def evenly(count: int, wanted: int) -> list[int]:
    """Numbers below `count` in equal steps from the first to the last: `wanted` of them, or all; of one, the middle."""
    if wanted >= count:
        return list(range(count))
    return [round(k * (count - 1) / (wanted - 1)) for k in range(wanted)] if wanted > 1 else [count // 2]


def shows_frames(images: Sequence[object]) -> bool:
    """Whether some images of a row are frames of a video."""
    return any(isinstance(image, Mapping) and TIME in image for image in images)
