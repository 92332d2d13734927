"""The demo's world and its tiny pretrained pieces: honest splits, right answers, and pieces that load and see."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.paths import ROOT

FOLDER = ROOT / "examples" / "digitscenes"
sys.path.insert(0, str(FOLDER))

import digitscenes as world  # noqa: E402
import pretrain_eye  # noqa: E402
import pretrain_llm  # noqa: E402
import scene_text  # noqa: E402

SIZES = (40, 80, 80)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digitscenes")
    assert world.write_dataset(out, SIZES, seed=3)
    return out


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sheet_holds_every_sprite_of_the_source() -> None:
    images, labels = world.load_sprites()
    with Image.open(FOLDER / "sprites.png") as sheet:
        assert (sheet.size, sheet.mode) == ((61 * 8, 30 * 8), "L")
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 1
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (images.sum((1, 2)) > 5).all(), "an unused, empty tile of the sheet was read as a sprite"


def test_sheet_equals_scikit_learn() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = world.load_sprites()
    order = np.argsort(digits.target, kind="stable")
    assert np.array_equal(images * 16, digits.images[order]) and np.array_equal(labels, digits.target[order])


def test_splits_are_disjoint_and_stratified() -> None:
    _, labels = world.load_sprites()
    splits = world.split_sprites(labels)
    together = np.concatenate(list(splits.values()))
    assert len(together) == len(set(together.tolist())) == 1797
    for split, share in zip(world.SPLITS, (0.7, 0.15, 0.15), strict=True):
        assert np.abs(np.bincount(labels[splits[split]]) / np.bincount(labels) - share).max() < 0.03


def test_scenes_use_only_the_sprites_they_may() -> None:
    _, labels = world.load_sprites()
    pool = world.split_sprites(labels)["test"]
    scenes = world.sample_scenes(np.random.default_rng(0), 400, labels, pool)
    filled = scenes.sprites != world.EMPTY
    assert set(scenes.sprites[filled].tolist()) <= set(pool.tolist())
    assert np.array_equal(labels[scenes.sprites[filled]], scenes.digits[filled])
    assert Counter(filled.sum(1).tolist()) == {1: 100, 2: 100, 3: 100, 4: 100}


def test_captions_read_as_the_readme_shows() -> None:
    scene = world.Scene((3, -1, -1, 7), (world.COLOURS["en"].index("red"), -1, -1, world.COLOURS["en"].index("blue")))
    assert world.caption(scene, "en") == "a red 3 at the top left and a blue 7 at the bottom right"
    assert world.caption(scene, "zh") == "左上角是红色的3，右下角是蓝色的7"


def things(caption: str) -> dict[int, tuple[str, int]]:
    """Read a caption back: cell -> (English colour, digit)."""
    found = {}
    for colour, digit, place in re.findall(r"a (\w+) (\d) at the (\w+ \w+)", caption):
        found[world.PLACES["en"].index(place)] = (colour, int(digit))
    for place, colour, digit in re.findall(r"(..角)是(..)的(\d)", caption):
        found[world.PLACES["zh"].index(place)] = (world.COLOURS["en"][world.COLOURS["zh"].index(colour)], int(digit))
    return found


def seen(row: Row) -> dict[int, tuple[str, int]]:
    """What a row of scenes_<split>.jsonl says: cell -> (English colour, digit)."""
    return {c: (row["colours"][c], row["digits"][c]) for c in range(4) if row["digits"][c] is not None}


@pytest.mark.parametrize("split", world.SPLITS)
def test_captions_agree_with_the_scene_in_both_languages(data: Path, split: str) -> None:
    scenes = {row["image"]: seen(row) for row in read(data / f"scenes_{split}.jsonl")}
    rows = read(data / f"captions_{split}.jsonl")
    assert len(rows) == 2 * len(scenes)
    for row in rows:
        assert things(row["caption"]) == scenes[row["image"]]
        assert (data / row["image"]).is_file() and Path(row["image"]).stem == row["id"][:-3]
    english, chinese = (read(data / f"captions_{split}_{language}.jsonl") for language in world.LANGUAGES)
    assert all(row["caption"].isascii() for row in english) and not any(row["caption"].isascii() for row in chinese)
    assert [row for pair in zip(english, chinese, strict=True) for row in pair] == rows


def right_answer(question: str, scene: dict[int, tuple[str, int]]) -> str:
    """Answer a question from the scene by reading the question's words, independently of how it was made."""
    language = "en" if question.isascii() else "zh"
    cells = [cell for cell, place in enumerate(world.PLACES[language]) if place in question]
    asked_digit = re.search(r"\d", question)
    if asked_digit:
        present = int(asked_digit[0]) in [digit for _, digit in scene.values()]
        return {"en": ("no", "yes"), "zh": ("没有", "有")}[language][present]
    if not cells:
        return {"en": ("one", "two", "three", "four"), "zh": ("一个", "两个", "三个", "四个")}[language][len(scene) - 1]
    colour, digit = scene[cells[0]]
    if "colour" in question or "颜色" in question:
        return colour if language == "en" else world.COLOURS["zh"][world.COLOURS["en"].index(colour)]
    return str(digit)


@pytest.mark.parametrize("split", world.SPLITS)
def test_answers_agree_with_the_scene(data: Path, split: str) -> None:
    scenes = {row["image"]: seen(row) for row in read(data / f"scenes_{split}.jsonl")}
    rows = read(data / f"questions_{split}.jsonl")
    assert len(rows) == 4 * len(scenes)
    for row in rows:
        assert row["answer"] == right_answer(row["question"], scenes[row["image"]]), row
    by_kind = [row for kind in world.KINDS for row in read(data / f"questions_{split}_{kind}.jsonl")]
    assert sorted(row["id"] for row in by_kind) == sorted(row["id"] for row in rows)


def test_no_answer_is_a_good_guess(data: Path) -> None:
    answers = Counter(row["answer"] for row in read(data / "questions_test_exists.jsonl"))
    assert answers["yes"] + answers["有"] == answers["no"] + answers["没有"] == SIZES[2] / 2
    counts = Counter(row["answer"] for row in read(data / "questions_test_count.jsonl"))
    assert sum(counts.values()) == SIZES[2] and max(counts.values()) <= 20
    languages = Counter(row["question"].isascii() for row in read(data / "questions_test.jsonl"))
    assert languages[True] == languages[False]


def test_files_are_the_same_for_a_seed_and_written_once(data: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert world.write_dataset(tmp_path, SIZES, seed=3)
    assert digest(tmp_path) == digest(data)
    assert not world.write_dataset(tmp_path, SIZES, seed=3), "already there: nothing to do"
    assert world.write_dataset(tmp_path, SIZES, seed=4)
    assert digest(tmp_path) != digest(data)


def test_texts_for_pretraining_agree_with_their_scene() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = scene_text.random_scene(rng)
        inventory = {c: (world.COLOURS["en"][scene.colours[c]], scene.digits[c]) for c in scene.filled}
        question, reply = scene_text.turn(scene, rng)
        described = any(question in prompts for prompts in scene_text.PROMPTS.values())
        assert (things(reply) == inventory) if described else (reply == right_answer(question, inventory))
    scene = world.Scene((3, -1, -1, 7), (0, -1, -1, 3))
    assert scene_text.notation(scene, "en") == "3red#none#none7blue"
    assert scene_text.notation(scene, "zh") == "3红空空空空7蓝"


def test_pieces_are_small_enough_to_ship() -> None:
    files = [path for piece in ("eye", "llm") for path in (FOLDER / piece).iterdir()]
    assert sum(path.stat().st_size for path in files) + (FOLDER / "sprites.png").stat().st_size <= 6_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]


@pytest.mark.slow
def test_pretraining_runs_and_writes_the_files_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each piece; the real run is ten minutes a piece."""
    monkeypatch.setattr(pretrain_eye, "AUGMENTED", 1)  # warping is most of the start-up
    eye, heads = pretrain_eye.train(seed=0, steps=2, batch=4)
    pretrain_eye.save(eye, tmp_path / "eye")
    assert set(pretrain_eye.score_validation(eye, heads, scenes=4)) == {"digits", "colours", "scenes"}
    model, tokenizer = pretrain_llm.train(seed=0, steps=3, batch=4)
    pretrain_llm.save(model, tokenizer, tmp_path / "llm")
    for piece in ("eye", "llm"):
        made = {path.name: path for path in (tmp_path / piece).iterdir()}
        assert set(made) == {path.name for path in (FOLDER / piece).iterdir()}
        new, shipped = (load_file(folder / piece / "model.safetensors") for folder in (tmp_path, FOLDER))
        assert {name: tensor.shape for name, tensor in new.items()} == {
            n: tensor.shape for n, tensor in shipped.items()
        }
    assert (tmp_path / "llm" / "tokenizer.json").read_bytes() == (FOLDER / "llm" / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def features() -> dict[str, tuple[torch.Tensor, torch.Tensor, world.Scenes]]:
    """Query and patch features of training and validation scenes, by the pieces loaded as any user would."""
    from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = Blip2Config.from_pretrained(FOLDER / "eye")
    tensors = {name: tensor.float() for name, tensor in load_file(FOLDER / "eye" / "model.safetensors").items()}
    queries = tensors.pop("query_tokens")
    assert queries.shape == (1, config.num_query_tokens, config.qformer_config.hidden_size)
    tower, resampler = Blip2VisionModel(config.vision_config), Blip2QFormerModel(config.qformer_config)
    parts = {"vision_model": tower, "qformer": resampler}
    for name, part in parts.items():
        part.load_state_dict({key.partition(".")[2]: tensors.pop(key) for key in list(tensors) if key.startswith(name)})
        part.eval()
    assert not tensors
    processor = BlipImageProcessorPil.from_pretrained(FOLDER / "eye")
    sprites, labels = world.load_sprites()
    out = {}
    for split, n in (("train", 500), ("validation", 150)):
        rng = np.random.default_rng(0)
        scenes = world.sample_scenes(rng, n, labels, world.split_sprites(labels)[split])
        images = [Image.fromarray(image) for image in world.render(scenes, world.enlarge(sprites), rng)]
        with torch.inference_mode():
            patches = tower(processor(images, return_tensors="pt").pixel_values).last_hidden_state
            seen_by = resampler(query_embeds=queries.expand(n, -1, -1), encoder_hidden_states=patches)
        out[split] = (seen_by.last_hidden_state, patches[:, 1:], scenes)
    return out


@pytest.mark.parametrize(("first_query", "field", "classes"), [(0, "digits", 11), (1, "colours", 8)])
def test_eye_tells_digits_and_colours_it_never_saw(features: Any, first_query: int, field: str, classes: int) -> None:
    """The heads are not shipped, so a linear probe is fitted on training scenes: one for all four cells."""

    def examples(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        queries, _, scenes = features[split]
        values = torch.from_numpy(getattr(scenes, field)).flatten()
        inputs = queries[:, first_query::2].flatten(0, 1)
        return torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1), values

    inputs, values = examples("train")
    wanted = torch.nn.functional.one_hot(values % classes, classes).float()  # EMPTY (-1) is the last class
    probe = torch.linalg.solve(inputs.T @ inputs + 1e-1 * torch.eye(129), inputs.T @ wanted)
    inputs, values = examples("validation")
    right = (inputs @ probe).argmax(1) == values % classes
    assert right[values != world.EMPTY].float().mean() >= 0.93


@pytest.fixture(scope="module")
def llm() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER / "llm", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(FOLDER / "llm")


@pytest.mark.parametrize("text", ["Ünïcode café 42\n", "你好，世界！有几个数字？", "emoji 😀 and  spaces", "<image>"])
def test_tokenizer_keeps_any_text(llm: tuple[Any, Any], text: str) -> None:
    _, tokenizer = llm
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_splits_digits_and_has_no_image_token(llm: tuple[Any, Any]) -> None:
    model, tokenizer = llm
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.tokenize("1797") == ["1", "7", "9", "7"]
    assert "<image>" not in tokenizer.get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    assert len(tokenizer("3red#none7blue#none", add_special_tokens=False).input_ids) == 8


def test_llm_answers_about_a_described_scene(llm: tuple[Any, Any]) -> None:
    model, tokenizer = llm
    rng = random.Random(1)
    prompts, replies = [], []
    for number in range(40):
        scene = scene_text.random_scene(rng)
        question, reply = scene_text.turn(scene, rng)
        texts = ("<s><human>:", scene_text.notation(scene, world.LANGUAGES[number % 2]), f"{question}\n<bot>:")
        prompts.append([(text, 0.0) for text in texts])
        replies.append(reply)
    texts = pretrain_llm.complete(model, tokenizer, prompts)
    right = sum(text == reply for text, reply in zip(texts, replies, strict=True))
    assert right >= 38, f"{right} of 40"
