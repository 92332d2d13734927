"""Whatever stands in a JSON file of a bundle, of a base or of a data set, a person reads one sentence."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.bundles import trained
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.card import write_card
from vlm_sft.data.source import source_rows
from vlm_sft.recipe.sections import Source
from vlm_sft.stack.kinds import compose

ODD = [None, True, 0, -1, 1.5, float("nan"), 10**400, "", "猫\ud800", "../..", [], [[]], {}, {"a": {"b": [1]}}, [None]]
ODD += ["a" * 5000, [1, "a", None], {"": None}, 3, "1", [1, 2], {"type": "猫"}, {"height": 1, "width": "x"}, "float16"]
ODD += [
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 3},
    {"rope_type": "yarn", "factor": "x"},
]
DEEP = 20_000
RAW = [b"", b"\xff\xfe{}", b"[", b"null", b'{"a": 1, "a": 2}', b"[" * DEEP, b"NaN", b"1e999", b'"\\ud800"']
RAW += [b'{"a":' * DEEP + b"1" + b"}" * DEEP, "{'猫': 1}".encode("gb18030")]
TRIES = 24


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*at, key))


def odd(text: bytes, chance: random.Random) -> bytes:
    """A JSON text with one value of another type, or no JSON at all."""
    if chance.random() < 0.2:
        return chance.choice(RAW)
    value = json.loads(text)
    *above, last = ((), *chance.choice(list(places(value))[1:]))
    here = value
    for key in above[1:]:
        here = here[key]
    if isinstance(here, dict) and chance.random() < 0.2:
        del here[last]
    else:
        here[last] = chance.choice(ODD)
    return json.dumps(value).encode()


def try_out(file: Path, chance: random.Random, use: Callable[[], object]) -> None:
    """Uses a file with odd things in it: it works, or one sentence says why not."""
    whole = file.read_bytes()
    try:
        file.write_bytes(changed := odd(whole, chance))
        with suppress(UserError):
            use()
    except Exception as error:
        raise AssertionError(f"{file.name}: {changed[:2000]!r} gives {type(error).__name__}: {error}") from error
    finally:
        file.write_bytes(whole)


def test_odd_files_of_a_bundle(bundle_recipe, tmp_path):
    bundle, chance = tmp_path / "bundle", random.Random(11)
    trained(bundle_recipe(lora={"r": 2}), bundle)
    (bundle / "eval.json").write_text(json.dumps({"answer_accuracy_by_kind": {"猫": 0.5}, "split": "test"}))
    (bundle / "metrics.json").write_text(json.dumps([{"step": 1, "eval_loss": 2.0}]))
    for name in ("bundle.json", "adapter_config.json", "config.json", "processor_config.json", "tokenizer_config.json"):
        for _ in range(TRIES // 3):
            try_out(bundle / name, chance, lambda: load(bundle))
    for name in ("bundle.json", "eval.json", "metrics.json"):
        for _ in range(TRIES):
            try_out(bundle / name, chance, lambda: write_card(bundle))


@pytest.mark.parametrize(("part", "name"), [("clip", "config.json"), ("clip", "preprocessor_config.json"),
                                            ("llama", "config.json"), ("llama", "tokenizer_config.json")])  # fmt: skip
def test_odd_files_of_a_base(part, name, pieces, bundle_recipe, tmp_path):
    folders = {key: str(shutil.copytree(folder, tmp_path / key)) for key, folder in pieces.items()}
    changes = [
        f"stack.vision_tower.pretrained={folders['clip']}",
        f"stack.language_model.pretrained={folders['llama']}",
    ]
    path = bundle_recipe("clip", None).path
    chance = random.Random(5)
    for _ in range(TRIES):
        try_out(Path(folders[part]) / name, chance, lambda: compose(load_recipe(path, changes)))


def test_odd_rows_in_tar_shards_and_data_files(tmp_path):
    chance = random.Random(3)
    row = {"id": "a", "image": "a.png", "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]},
                                                     {"role": "assistant", "content": "好"}]}  # fmt: skip
    for kind in ("messages", "llava", "caption", "vqa", "cauldron"):
        for _ in range(4 * TRIES):
            text = odd(json.dumps(row).encode(), chance)
            with tarfile.open(tmp_path / "a.tar", "w") as archive:
                member = tarfile.TarInfo("a.json")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
            (tmp_path / "a.json").write_bytes(text)
            for name in ("a.tar", "a.json"):
                with suppress(UserError):
                    list(source_rows(Source(path=str(tmp_path / name), format=kind)))
