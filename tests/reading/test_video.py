"""Videos: the right frame at each time, from any container, without reading all of it; and a sentence for the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from support.films import animation, film, frame_of
from vlm_sft.base.errors import RowError
from vlm_sft.base.limits import READERS, hold
from vlm_sft.reading import video as video_module
from vlm_sft.reading.images import image_size, load_image
from vlm_sft.reading.video import Films
from vlm_sft.rows.videos import Sampling, evenly, times_of

WHERE = "rows.jsonl, line 3"


def named(path: Path, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "bytes": None, **more}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    with Films() as films:
        yield films.open(named(path), WHERE)


def refused(path: Path, **more: Any) -> tuple[str, str]:
    with Films() as films, pytest.raises(RowError) as caught:
        films.open({**named(path), **more}, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: the video ") and caught.value.where == WHERE
    return str(caught.value), caught.value.reason


FORMS = {
    "mp4": {}, "webm": {"codec": "libvpx-vp9"}, "mkv": {"codec": "libx264"}, "avi": {},
    "mov": {"movflags": "frag_keyframe+empty_moov"}, "ts": {"codec": "mpeg2video", "rate": 25}, "flv": {"codec": "flv"},
}  # fmt: skip


@pytest.mark.parametrize("ending", [*FORMS, "gif", "webp", "png"])
def test_every_container_gives_the_frame_of_each_time(tmp_path, ending):
    options = FORMS.get(ending)
    path = animation(tmp_path / f"a.{ending}") if options is None else film(tmp_path / f"影.{ending}", **options)
    rate = (options or {}).get("rate", 10)
    with Films() as films:
        found = films.open(named(path), WHERE)
        assert found.length == pytest.approx(40 / rate, abs=0.11) and found.size == (64, 48)
        times = times_of(found, Sampling(frames=14), WHERE)
        assert [round(time * rate, 1) for time in times] == [3 * k for k in range(14)]
        shown = [load_image(named(path, time=time), films=films) for time in times]
        assert [frame_of(picture) for picture in shown] == [3 * k for k in range(14)]
        assert {(picture.mode, picture.size) for picture in shown} == {("RGB", (64, 48))}
        back = [frame_of(load_image(named(path, time=time), films=films)) for time in (times[9], times[2], times[7])]
    assert back == [27, 6, 21]  # in any order
    assert frame_of(load_image(named(path, time=times[5]))) == 15  # and by itself
    encoded = {"path": None, "bytes": path.read_bytes(), "time": times[11]}
    assert frame_of(load_image(encoded)) == 33


def test_between_two_frames_the_earlier_is_seen(tmp_path):
    path = film(tmp_path / "a.mp4")
    found = [frame_of(load_image(named(path, time=time))) for time in (0.0, 0.09, 0.1, 1.19, 1.2, 3.9, 4.0, 4.5)]
    assert found == [0, 0, 1, 11, 12, 39, 39, 39]


@pytest.mark.parametrize(
    ("sampling", "more", "expected"),
    [
        (Sampling(), {}, [0.0, 0.6, 1.1, 1.7, 2.2, 2.8, 3.3, 3.9]),
        (Sampling(frames=2), {}, [0.0, 3.9]),
        (Sampling(frames=1), {}, [2.0]),
        (Sampling(frames=4000), {}, [k / 10 for k in range(40)]),
        (Sampling(fps=2), {}, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]),
        (Sampling(fps=0.1), {}, [0.0]),
        (Sampling(fps=0.1, min_frames=3), {}, [0.0, 2.0, 3.9]),
        (Sampling(fps=5, max_frames=4), {}, [0.0, 1.3, 2.6, 3.9]),
        (Sampling(fps=30), {}, [0.0, 0.1, 3.9]),
        (Sampling(frames=3), {"start": 1.0, "end": 3.0}, [1.0, 2.0, 2.9]),
        (Sampling(fps=1), {"start": 1.5}, [1.5, 2.5, 3.5]),
        (Sampling(frames=2), {"end": 100.0}, [0.0, 3.9]),
    ],
)
def test_which_times(tmp_path, sampling, more, expected):
    with opened(film(tmp_path / "a.mp4")) as found:
        times = times_of(found, sampling, WHERE, **more)
    times = [*times[:2], times[-1]] if sampling.fps == 30 else times
    if sampling.fps == 30:
        expected = [0.0, pytest.approx(1 / 16, abs=0.1), 3.9]
    assert [round(time, 1) for time in times] == [pytest.approx(e) for e in expected]


def test_nothing_between_start_and_end(tmp_path):
    with (
        opened(film(tmp_path / "a.mp4")) as found,
        pytest.raises(RowError, match="seconds is to be shown from 7 to"),
    ):
        times_of(found, Sampling(), WHERE, start=7.0)


def test_equal_steps():
    assert [evenly(10, n) for n in (1, 2, 3, 10, 99)] == [[5], [0, 9], [0, 4, 9], [*range(10)], [*range(10)]]


def test_what_is_written_before_a_frame():
    assert Sampling().written(0.05) == "<0.1 seconds>" and Sampling().written(125.04) == "<125.0 seconds>"
    assert Sampling(time="第{time}秒").written(3) == "第3.0秒"
    assert Sampling(time="Frame from {clock}:").written(125.9) == "Frame from 02:05:"
    assert Sampling(time="").written(1) == ""


@pytest.mark.parametrize(("turn", "white"), [(0, (1, 24)), (90, (24, 62)), (-90, (24, 1)), (180, (62, 24))])
def test_a_film_stands_upright(tmp_path, turn, white):
    path = film(tmp_path / "a.mp4", frames=4, turn=turn)
    size = (48, 64) if turn % 180 else (64, 48)
    assert image_size(named(path, time=0.1)) == size
    picture = load_image(named(path, time=0.1))
    assert picture.size == size and min(picture.getpixel(white)) > 200


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for packet in (*stream.encode(av.VideoFrame(64, 48, "yuv420p")), *stream.encode()):
            container.mux(packet)
    assert load_image(named(path, time=0.0)).size == image_size(named(path, time=0.0)) == (128, 48)


def test_sizes_are_bounded_like_those_of_images(tmp_path):
    path = film(tmp_path / "a.mp4", frames=3)
    small = named(path, time=0.1, max_pixels=768)
    assert load_image(small).size == image_size(small) == (32, 24)
    asked = named(path, time=0.1, resized_width=40, resized_height=10)
    assert load_image(asked).size == image_size(asked) == (40, 10)
    with pytest.raises(RowError, match="has 3,072 pixels a frame, more than the 1,000 allowed"):
        load_image(named(path, time=0.1), max_pixels=1000)


def test_a_time_is_reached_from_the_keyframe_before_it(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", gop=5)
    hold({"video_decoded": 8})  # frames of one step; from the beginning it would be 40
    assert frame_of(load_image(named(path, time=3.9))) == 39
    with Films() as films:
        assert [frame_of(load_image(named(path, time=t), films=films)) for t in (0.1, 2.2, 3.8)] == [1, 22, 38]
    long = film(tmp_path / "b.mp4", gop=40)
    with pytest.raises(RowError, match="has no keyframe in the 8 frames before"):
        load_image(named(long, time=3.9))


def test_a_film_with_one_keyframe_is_decoded_once(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mkv", gop=50)
    decoded = []
    real = video_module._Stream._time
    monkeypatch.setattr(
        video_module._Stream, "_time", lambda self, frame: decoded.append(frame.pts) or real(self, frame)
    )
    with Films() as films:
        found = [frame_of(load_image(named(path, time=k * 1.3), films=films)) for k in range(4)]
    assert found == [0, 13, 26, 39]
    assert max(decoded.count(pts) for pts in {*decoded}) <= 8  # 13 where each of four times began anew


def test_frames_of_one_film_open_it_once(tmp_path, monkeypatch):
    opens = []
    real = video_module.open_film
    monkeypatch.setattr(
        video_module, "open_film", lambda video, where: opens.append(video["path"]) or real(video, where)
    )
    one, other = film(tmp_path / "a.mp4", frames=9), film(tmp_path / "b.mp4", frames=9)
    with Films() as films:
        for path in (one, other):
            for k in range(9):
                load_image(named(path, time=k / 10), films=films)
    assert opens == [str(one), str(other)]


def test_a_song_with_a_cover_and_sound_beside_a_film(tmp_path):
    assert frame_of(load_image(named(film(tmp_path / "a.mp4", sound=True), time=1.7))) == 17
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        wave.rate = 16000
        for packet in (*stream.encode(wave), *stream.encode()):
            container.mux(packet)
    sentence, reason = refused(tmp_path / "song.m4a")
    assert sentence.endswith("song.m4a has sound but no picture: give a video, or remove the row.")
    assert reason == "not a video"


def test_a_length_that_the_header_does_not_say(tmp_path, monkeypatch):
    path = film(tmp_path / "a.webm", codec="libvpx-vp9", live="1")
    with opened(path) as found:
        assert found.length == pytest.approx(4.0, abs=0.11)
        assert len(times_of(found, Sampling(fps=2), WHERE)) == 8
    assert frame_of(load_image(named(path, time=3.0))) == 30
    monkeypatch.setattr(video_module, "READERS", replace(READERS, video_packets=5))
    assert "does not say how long it is" in refused(path)[0]


def make_bad(folder: Path) -> dict[str, Path]:
    whole = film(folder / "whole.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a film\n" * 30)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    Image.new("RGB", (9, 9)).save(folder / "still.jpg")
    Image.new("RGB", (9, 9)).save(folder / "still.gif")
    film(folder / "raw.h264", frames=3, codec="libx264")
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:4,\n{folder / 'whole.mp4'}\n#EXT-X-ENDLIST\n")
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{folder / 'whole.mp4'}'\n")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "expected", "reason"),
    [
        ("missing.mp4", "was not found: correct the path", "video missing"),
        ("empty.mp4", "is empty (0 bytes)", "video damaged"),
        ("text.mp4", "is damaged or no video (Invalid data found", "video damaged"),
        ("cut.mp4", "is damaged or no video (", "video damaged"),
        ("folder.mp4", "is a folder", "video missing"),
        ("pipe.mp4", "is not a regular file", "video missing"),
        ("still.jpg", "is a picture (JPEG): name it under `images`", "not a video"),
        ("still.gif", "is a picture that does not move", "not a video"),
        ("raw.h264", "is in a container that is not read: write it anew as mp4", "video damaged"),
        # Playlists name other files.
        ("list.m3u8", "is damaged or no video", "video damaged"),
        ("list.mp4", "is in a container that is not read", "video damaged"),
    ],
)
def test_what_is_no_video_is_one_sentence(tmp_path, name, expected, reason):
    make_bad(tmp_path)
    sentence, found = refused(tmp_path / name)
    assert f"{name} {expected}" in sentence and found == reason and sentence.count("\n") == 0


def test_a_film_that_breaks_off(tmp_path):
    path = film(tmp_path / "a.mp4", frames=40, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])  # the header still promises four seconds
    assert frame_of(load_image(named(path, time=0.5))) == 5
    with pytest.raises(RowError, match=r"breaks off after \d\.\d of 4\.0 seconds|is damaged") as caught:
        load_image(named(path, time=3.9), where=WHERE)
    assert caught.value.reason == "video damaged"


def test_no_name_is_one_of_ffmpegs_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    film("a.mp4")
    for name in ("concat:a.mp4|a.mp4", "subfile,,start,0,end,9,,:a.mp4", "http://127.0.0.1:9/a.mp4", "data:video/mp4,"):
        assert "was not found" in refused(Path(name))[0]
