"""The files that rows name: those that are not there, and those of training rows that are held out for evaluation."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pytest

from support.source_files import captions
from vlm_sft.base.errors import UserError
from vlm_sft.data.dataset import ROW_FEATURES, load_mixture, load_source
from vlm_sft.data.image_files import Leak, check_images, shared_images


def row(name, *images):
    return {"id": name, "images": [{"path": i, "bytes": None} if isinstance(i, str) else {"path": None, "bytes": i}
                                   for i in images]}  # fmt: skip


def test_same_bytes_under_another_name_and_embedded(tmp_path):
    for name, data in {"a": b"one", "b": b"one", "c": b"two", "d": b"three"}.items():
        (tmp_path / name).write_bytes(data)
    path = {name: str(tmp_path / name) for name in "abcd"}
    train = [row("t/0", path["a"]), row("t/1", path["c"]), row("t/2", b"three"), row("t/3", path["a"])]
    held_out = [row("e/0", path["b"]), row("e/1", path["d"])]
    assert shared_images(train, held_out) == [Leak("t/0", "e/0"), Leak("t/2", "e/1")]


def test_the_same_path_is_the_same_image(photos):
    assert shared_images([row("t", photos[0])], [row("e", photos[0])]) == [Leak("t", "e")]


def test_equal_sizes_are_not_enough(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    assert shared_images([row("t", str(tmp_path / "a"))], [row("e", b"two")]) == []


def test_missing_files_and_addresses_are_passed_over(tmp_path):
    away = [row("t", str(tmp_path / "none"), "https://example.org/a.png")]
    assert shared_images(away, away) == []


def test_check_images(tmp_path):
    source = captions(tmp_path, "c", 600)
    for i in range(600):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    rows = load_source(source)
    check_images(rows)
    check_images(load_mixture([source, captions(tmp_path, "d", 5)], "sqrt"))
    for i in (555, 7):
        (tmp_path / f"{i}.png").unlink()
    (tmp_path / "9.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        check_images(rows)
    message = f"3 of 600 images cannot be used; the first is {tmp_path}/7.png (c/8), which does not exist"
    assert message in str(error.value)
    (tmp_path / "7.png").mkdir()
    with pytest.raises(UserError, match="which is not a file"):
        check_images(rows)


def test_check_images_leaves_embedded_ones_alone():
    table = pa.Table.from_pylist(
        [{"messages": [], "images": [{"path": "gone.png", "bytes": b"x"}], "source": "a", "id": "a/1"}],
        schema=ROW_FEATURES.arrow_schema,
    )
    check_images(datasets.Dataset(table))
