"""DigitScenes: a small world of pictures, captions and questions in English and Chinese, made from real digits.

A scene is a 64x64 RGB image of one to four handwritten digits, each in its own cell of a 2x2 grid and in one of seven
colours. `python examples/digitscenes/digitscenes.py --out data/digitscenes` draws the scenes of three splits, whose
digits come from disjoint sets of handwriting samples, and writes for each split

- `images/<split>/*.png`,
- `captions_<split>.jsonl`, `captions_<split>_en.jsonl`, `captions_<split>_zh.jsonl`: rows {"id", "image", "caption"},
- `questions_<split>.jsonl`, and `questions_<split>_<kind>.jsonl` for each kind of question: rows
  {"id", "image", "question", "answer"},
- `scenes_<split>.jsonl`: what is in each scene, cell by cell (null: empty).

Image paths are relative to the folder of the file that names them. Nothing here needs more than numpy and Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
IMAGE_SIZE = 64
CELL = IMAGE_SIZE // 2
DIGIT = 24  # pixels a digit is wide and high: the 8x8 sprite, three times enlarged
JITTER = 2  # a digit lies up to so many pixels off the middle of its cell
EMPTY = -1
LANGUAGES = ("en", "zh")
KINDS = ("digit", "colour", "count", "exists")
SPLITS = ("train", "validation", "test")
PLACES = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上角", "右上角", "左下角", "右下角"),
}
COLOURS = {
    "en": ("red", "yellow", "green", "blue", "purple", "pink", "white"),
    "zh": ("红色", "黄色", "绿色", "蓝色", "紫色", "粉色", "白色"),
}
RGB = np.array(
    [(225, 30, 30), (235, 215, 30), (30, 190, 50), (40, 80, 245), (140, 40, 190), (255, 150, 190), (245, 245, 245)],
    np.float32,
)
COUNTS = {"en": ("one", "two", "three", "four"), "zh": ("一个", "两个", "三个", "四个")}
YES_NO = {"en": ("yes", "no"), "zh": ("有", "没有")}
QUESTIONS = {
    "digit": {
        "en": ("What digit is at the {place}?", "Which digit is at the {place}?"),
        "zh": ("{place}是什么数字？", "{place}的数字是几？"),
    },
    "colour": {
        "en": ("What colour is the digit at the {place}?", "Which colour does the digit at the {place} have?"),
        "zh": ("{place}的数字是什么颜色？", "{place}的数字是哪种颜色？"),
    },
    "count": {
        "en": ("How many digits are there?", "How many digits does the image show?"),
        "zh": ("图中有几个数字？", "一共有几个数字？"),
    },
    "exists": {
        "en": ("Is there {article} {digit}?", "Does the image show {article} {digit}?"),
        "zh": ("图中有{digit}吗？", "图中有没有{digit}？"),
    },
}


class Scene(NamedTuple):
    """What is to be seen, cell by cell from the top left to the bottom right; EMPTY (-1) marks an empty cell."""

    digits: tuple[int, ...]
    colours: tuple[int, ...]  # indices into COLOURS

    @property
    def filled(self) -> list[int]:
        """The cells that hold a digit, in reading order."""
        return [cell for cell, digit in enumerate(self.digits) if digit != EMPTY]


@dataclass(frozen=True)
class Scenes:
    """Many scenes as arrays of shape (n, 4): the digit, the colour and the sprite of each cell, or EMPTY."""

    digits: np.ndarray
    colours: np.ndarray
    sprites: np.ndarray

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, row: int) -> Scene:
        return Scene(tuple(self.digits[row].tolist()), tuple(self.colours[row].tolist()))


def load_sprites() -> tuple[np.ndarray, np.ndarray]:
    """Read the sprite sheet.

    Returns:
        Ink 0..1 of shape (1797, 8, 8), float32, and the labels of shape (1797,), sorted.
    """
    index = json.loads((HERE / "sprites.json").read_text(encoding="utf-8"))
    tile, columns, band = index["tile"], index["columns"], index["rows_per_label"]
    with Image.open(HERE / "sprites.png") as file:
        sheet = np.asarray(file, np.float32) / (16 * index["grey_step"])
    tiles = sheet.reshape(10, band, tile, columns, tile).swapaxes(2, 3).reshape(10, band * columns, tile, tile)
    images = np.concatenate([tiles[label, :count] for label, count in enumerate(index["counts"])])
    return images, np.repeat(np.arange(10), index["counts"])


def split_sprites(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Divide the sprites 70/15/15 by their place within their label, so that every label is split alike.

    Returns:
        For each of SPLITS the indices of its sprites; no sprite is in two splits.
    """
    place = np.concatenate([np.arange(count) for count in np.bincount(labels)]) % 20
    parts = (place < 14, (place >= 14) & (place < 17), place >= 17)
    return {split: np.flatnonzero(part) for split, part in zip(SPLITS, parts, strict=True)}


def enlarge(sprites: np.ndarray, size: int = DIGIT) -> np.ndarray:
    """Enlarge sprites (n, 8, 8) bilinearly to (n, size, size)."""
    resized = [Image.fromarray(sprite).resize((size, size), Image.Resampling.BILINEAR) for sprite in sprites]
    return np.stack([np.asarray(image) for image in resized])


def sample_scenes(rng: np.random.Generator, n: int, labels: np.ndarray, pool: np.ndarray) -> Scenes:
    """Draw n scenes: as many of one as of two, three and four digits, all else uniform and independent.

    Args:
        rng: source of randomness.
        n: number of scenes.
        labels: the label of every sprite, sorted.
        pool: indices of the sprites that may be used.
    """
    by_label = [pool[labels[pool] == label] for label in range(10)]
    counts = rng.permutation(np.arange(n) % 4) + 1
    filled = rng.random((n, 4)).argsort(axis=1).argsort(axis=1) < counts[:, None]
    digits = np.where(filled, rng.integers(0, 10, (n, 4)), EMPTY)
    colours = np.where(filled, rng.integers(0, len(RGB), (n, 4)), EMPTY)
    sprites = np.full((n, 4), EMPTY)
    for label, choices in enumerate(by_label):
        here = digits == label
        sprites[here] = rng.choice(choices, here.sum())
    return Scenes(digits, colours, sprites)


def render(scenes: Scenes, ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint scenes.

    Args:
        scenes: n scenes, whose `sprites` index into `ink`.
        ink: enlarged sprites, 0..1, shape (m, DIGIT, DIGIT).
        rng: draws where in its cell a digit lies, its shade and the background.

    Returns:
        Images of shape (n, 64, 64, 3), uint8.
    """
    n = len(scenes)
    sprites = scenes.sprites.reshape(-1)
    cells = np.zeros((n * 4, CELL, CELL), np.float32)
    margin = (CELL - DIGIT) // 2
    shifts = rng.integers(margin - JITTER, margin + JITTER + 1, (n * 4, 2))
    for top in range(margin - JITTER, margin + JITTER + 1):
        for left in range(margin - JITTER, margin + JITTER + 1):
            here = (shifts[:, 0] == top) & (shifts[:, 1] == left) & (sprites != EMPTY)
            cells[here, top : top + DIGIT, left : left + DIGIT] = ink[sprites[here]]
    background = rng.uniform(0, 40, (n, 1, 1, 1, 1)).astype(np.float32)
    shade = rng.uniform(-10, 10, (n, 4, 1, 1, 3)).astype(np.float32)
    colours = RGB[scenes.colours][:, :, None, None, :] + shade
    images = background + cells.reshape(n, 4, CELL, CELL, 1) * (colours - background)
    grid = images.reshape(n, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, IMAGE_SIZE, IMAGE_SIZE, 3)
    return grid.clip(0, 255).astype(np.uint8)


def caption(scene: Scene, language: str) -> str:
    """Say in reading order what is where: the one right caption in `language` ("en" or "zh")."""
    if language == "zh":
        places, colours = PLACES["zh"], COLOURS["zh"]
        return "，".join(f"{places[c]}是{colours[scene.colours[c]]}的{scene.digits[c]}" for c in scene.filled)
    phrases = [f"a {COLOURS['en'][scene.colours[c]]} {scene.digits[c]} at the {PLACES['en'][c]}" for c in scene.filled]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def answer(scene: Scene, kind: str, language: str, about: int = 0) -> str:
    """Answer a question: `about` is the cell (kinds "digit" and "colour") or the digit (kind "exists")."""
    if kind == "digit":
        return str(scene.digits[about])
    if kind == "colour":
        return COLOURS[language][scene.colours[about]]
    if kind == "count":
        return COUNTS[language][len(scene.filled) - 1]
    return YES_NO[language][0 if about in scene.digits else 1]


def word_question(kind: str, language: str, form: int, about: int = 0) -> str:
    """Put a question into words: `form` picks one of its phrasings, `about` is as in `answer`."""
    article = "an" if about == 8 else "a"
    return QUESTIONS[kind][language][form].format(place=PLACES[language][about % 4], digit=about, article=article)


def ask(scene: Scene, kind: str, language: str, rng: np.random.Generator, yes: bool = True) -> tuple[str, str]:
    """Draw a question of `kind` about a scene; `yes` says which answer a question of kind "exists" shall have.

    Returns:
        The question and its answer.
    """
    form, about = int(rng.integers(2)), 0
    if kind in ("digit", "colour"):
        about = int(rng.choice(scene.filled))
    elif kind == "exists":
        present = sorted(set(scene.digits) - {EMPTY})
        about = int(rng.choice(present if yes else sorted(set(range(10)) - set(present))))
    return word_question(kind, language, form, about), answer(scene, kind, language, about)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, in UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def split_rows(scenes: Scenes, split: str, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Make the rows of every file of a split, by the file's name without its ending.

    Every scene has a caption in each language and one question of each kind; the languages of the questions take turns,
    and so do "yes" and "no".
    """
    files: dict[str, list[dict[str, Any]]] = {f"scenes_{split}": [], f"captions_{split}": [], f"questions_{split}": []}
    files |= {f"captions_{split}_{language}": [] for language in LANGUAGES}
    files |= {f"questions_{split}_{kind}": [] for kind in KINDS}
    for number in range(len(scenes)):
        scene, stem = scenes[number], f"{split}-{number:05d}"
        image = f"images/{split}/{stem}.png"
        digits = [None if digit == EMPTY else digit for digit in scene.digits]
        colours = [None if colour == EMPTY else COLOURS["en"][colour] for colour in scene.colours]
        files[f"scenes_{split}"].append({"id": stem, "image": image, "digits": digits, "colours": colours})
        for language in LANGUAGES:
            row = {"id": f"{stem}-{language}", "image": image, "caption": caption(scene, language)}
            files[f"captions_{split}"].append(row)
            files[f"captions_{split}_{language}"].append(row)
        for place, kind in enumerate(KINDS):
            question, reply = ask(scene, kind, LANGUAGES[(number + place) % 2], rng, yes=number // 2 % 2 == 0)
            row = {"id": f"{stem}-{kind}", "image": image, "question": question, "answer": reply}
            files[f"questions_{split}"].append(row)
            files[f"questions_{split}_{kind}"].append(row)
    return files


def write_dataset(out: Path, sizes: Sequence[int], seed: int = 0) -> bool:
    """Draw and write the three splits; do nothing when `out` already holds exactly them.

    Args:
        out: folder to write to; files of the same names are replaced.
        sizes: number of scenes of each of SPLITS.
        seed: the same seed and sizes give the same files, byte for byte.

    Returns:
        Whether anything was written.
    """
    code = hashlib.sha256(Path(__file__).read_bytes() + (HERE / "sprites.png").read_bytes()).hexdigest()
    manifest = {"seed": seed, "scenes": dict(zip(SPLITS, sizes, strict=True)), "made_by": code}
    manifest_path = out / "manifest.json"
    if manifest_path.exists() and json.loads(manifest_path.read_text(encoding="utf-8")) == manifest:
        return False
    sprites, labels = load_sprites()
    pools, ink = split_sprites(labels), enlarge(sprites)
    for number, (split, size) in enumerate(manifest["scenes"].items()):
        rng = np.random.default_rng([seed, number])
        scenes = sample_scenes(rng, size, labels, pools[split])
        images = render(scenes, ink, rng)
        files = split_rows(scenes, split, rng)
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        for row, image in zip(files[f"scenes_{split}"], images, strict=True):
            Image.fromarray(image).save(out / row["image"], compress_level=1)
        for name, rows in files.items():
            write_jsonl(out / f"{name}.jsonl", rows)
    manifest_path.write_text(json.dumps(manifest) + "\n", encoding="utf-8")  # last: its presence means complete
    return True


def main() -> None:
    """Write the data set from the command line."""
    parser = argparse.ArgumentParser(description="Write the DigitScenes data set.")
    parser.add_argument("--out", type=Path, default=Path("data/digitscenes"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, nargs=3, default=(8000, 400, 400), metavar=SPLITS)
    args = parser.parse_args()
    written = write_dataset(args.out, args.scenes, args.seed)
    print(f"{args.out}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    main()
