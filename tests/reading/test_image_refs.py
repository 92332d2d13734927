"""What a row writes for an image: paths, bytes, data URIs, and the sentence for anything else."""

from __future__ import annotations

import base64
from pathlib import Path

import datasets
import pytest
from PIL import Image

from support.source_files import refused, write
from vlm_sft.data.dataset import load_source
from vlm_sft.data.image_files import check_images
from vlm_sft.reading.images import load_image
from vlm_sft.recipe.sections import Source


def image_of(tmp_path: Path, image, **options) -> dict:
    path = write(tmp_path / "one.jsonl", [{"image": image, "caption": "x"}])
    return load_source(Source(path=path, format="caption", **options))[0]["images"][0]


def test_where_relative_paths_start(tmp_path, monkeypatch):
    (tmp_path / "照片").mkdir()
    assert image_of(tmp_path, "a/../1.png")["path"] == f"{tmp_path}/1.png"
    assert image_of(tmp_path, "/abs/1.png")["path"] == "/abs/1.png"
    assert image_of(tmp_path, "1.png", images=str(tmp_path / "照片"))["path"] == f"{tmp_path}/照片/1.png"
    monkeypatch.chdir(tmp_path)
    assert image_of(Path(), "1.png", images="照片")["path"] == f"{tmp_path}/照片/1.png"
    assert image_of(Path(), "1.png")["path"] == f"{tmp_path}/1.png"
    message = refused(Source(path=str(tmp_path / "one.jsonl"), format="caption", images="没有"))
    assert "takes its images from 没有, which is no folder" in message


def test_embedded_images_are_never_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b"not an image", "path": "a.png"}], "text": ["猫"]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.to_parquet(str(tmp_path / "p.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    for path in ("p.parquet", "saved"):
        rows = load_source(Source(path=str(tmp_path / path), format="caption"))
        assert rows[0]["images"] == [{"path": "a.png", "bytes": b"not an image"}]


def test_a_data_uri_is_an_embedded_image(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    image = image_of(tmp_path, "data:image/png;base64," + base64.b64encode(data).decode())
    assert image == {"path": None, "bytes": data}
    assert load_image(image).size == (2, 2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/1.png", "line 1: the image https://example.com/1.png is a URL and no URL is fetched"),
        ({"url": "x"}, "line 1: an image is neither a path nor bytes"),
        (3, "line 1: an image is neither a path nor bytes"),
        ([["a"]], "line 1: an image is neither a path nor bytes"),
        ("nul\0.png", "is blank or no text"),
        (" ", "is blank or no text"),
        ("data:image/png;base64,@@", "holds no base64 image"),
        ("data:image/png,abc", "holds no base64 image"),
    ],
)
def test_images_refused(tmp_path, image, message):
    path = write(tmp_path / "one.jsonl", [{"image": image, "caption": "x"}])
    assert message in refused(Source(path=path, format="caption"))


def test_hub_rows_have_no_folder(monkeypatch, tmp_path):
    hub = datasets.Dataset.from_dict({"image": ["1.png"], "text": ["猫"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub)
    source = Source(path="owner/pictures", format="caption")
    assert "rows of the Hub lie in no folder" in refused(source)
    rows = load_source(source.model_copy(update={"images": str(tmp_path)}))
    assert rows[0]["images"][0]["path"] == f"{tmp_path}/1.png"
    assert rows[0]["id"] == "pictures/1"


def test_a_url_stays_one_where_the_source_allows_it(tmp_path):
    url = "https://example.com/猫.png"
    image = image_of(tmp_path, url, allow_urls=True)
    assert image == {"path": url, "bytes": None}
    check_images(load_source(Source(path=str(tmp_path / "one.jsonl"), format="caption", allow_urls=True)))
    assert "or set the source's `allow_urls: true`" in refused(
        Source(path=str(tmp_path / "one.jsonl"), format="caption")
    )
