"""Small videos whose frames say by their colour which they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

STEP = 6  # of grey from one frame to the next


def film(
    path: Path | str,
    frames: int = 40,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    **more: Any,
) -> Path:
    """Writes a film: frame k is red by `k * STEP` of 255; the left third is white, so that one sees how it stands.

    Args:
        path: Its ending is the container.
        frames: How many, at most 42.
        rate: A second.
        size: (width, height).
        codec: Of FFmpeg.
        **more: `gop`, frames from a keyframe to the next; `turn`, degrees that players turn it; `sound`, whether it has
            a second sound track; else options of the container.
    """
    gop, turn, sound = more.pop("gop", 12), more.pop("turn", 0), more.pop("sound", False)
    with av.open(str(path), "w", container_options=more) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.bit_rate = 4_000_000
        if turn:
            stream.set_display_rotation(turn)
        heard = container.add_stream("aac", rate=16000) if sound else None
        for number in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(_pixels(number, size), "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if heard is not None:
            silence = np.zeros((1, 16000 * frames // rate), np.float32)
            wave = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            wave.rate = 16000
            for packet in (*heard.encode(wave), *heard.encode()):
                container.mux(packet)
    return Path(path)


def animation(path: Path | str, frames: int = 40, milliseconds: int = 100, size: tuple[int, int] = (64, 48)) -> Path:
    """Writes the same as a GIF, WebP or PNG that moves."""
    first, *rest = [Image.fromarray(_pixels(number, size)) for number in range(frames)]
    more = {"lossless": True} if str(path).endswith(".webp") else {}
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, **more)
    return Path(path)


def _pixels(number: int, size: tuple[int, int]) -> np.ndarray:
    pixels = np.full((size[1], size[0], 3), number * STEP, np.uint8)
    pixels[:, : size[0] // 3] = 255
    return pixels


def frame_of(picture: Image.Image) -> int:
    """Which frame a picture is, by its grey."""
    red, _, _ = picture.convert("RGB").getpixel((picture.width * 2 // 3, picture.height * 2 // 3))
    return round(red / STEP)
