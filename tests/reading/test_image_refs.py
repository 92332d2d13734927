"""What a row writes for an image: paths, bytes, data URIs, sizes, and the sentence for anything else."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support.source_files import refused, write
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.data.dataset import load_source
from vlm_sft.data.image_files import check_images
from vlm_sft.reading.image_refs import Folders, resolve_image, size_asked, sizes_of
from vlm_sft.reading.images import image_size, load_image
from vlm_sft.reading.locations import folders_of_hub
from vlm_sft.recipe.sections import Source


def image_of(tmp_path: Path, image, **options) -> dict:
    path = write(tmp_path / "one.jsonl", [{"image": image, "caption": "x"}])
    return load_source(Source(path=path, format="caption", **options))[0]["images"][0]


def test_where_relative_paths_start(tmp_path, monkeypatch):
    (tmp_path / "照片").mkdir()
    assert image_of(tmp_path, "a/../1.png")["path"] == f"{tmp_path}/1.png"
    assert image_of(tmp_path, "/abs/1.png", image_folders=["/"])["path"] == "/abs/1.png"
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
    assert "or set `allow_urls: true` for the source in a recipe" in refused(
        Source(path=str(tmp_path / "one.jsonl"), format="caption")
    )


# ------------------------------------------------------------------------------------------------- base64 and file://


def encoded_picture(kind: str, size=(64, 64)) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode(), buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO"])
def test_bare_base64_is_the_picture(kind):
    text, data = encoded_picture(kind)
    broken_lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for written in (text, broken_lines, text.rstrip("="), text.replace("+", "-").replace("/", "_")):
        assert resolve_image(written, "/图", "row 1") == {"path": None, "bytes": data}
        assert resolve_image({"path": written, "bytes": None}, "/图", "row 1")["bytes"] == data


def test_what_is_neither_path_nor_picture_is_never_a_long_path_in_a_message():
    strokes = base64.b64encode(b"%PDF-1.7 " + bytes(range(255, 200, -1)) * 40).decode()
    half_uri, quoted = f"image/png;base64,{strokes[:3000]}", f'"{encoded_picture("PNG", (20, 20))[0]}"'
    assert max(map(len, strokes.split("/"))) < 255 < 2900 < len(strokes), "each part could be a file's name"
    texts = (base64.b64encode(b"no picture" * 300).decode(), "a" * 3000, "图" * 200, "/".join("ab" * 3000), strokes)
    for text in (*texts, half_uri, quoted, strokes[:1000], f"b'{strokes}'", "\n".join(strokes)):
        with pytest.raises(RowError) as error:
            resolve_image(text, "/图", "row 1")
        assert f"has {len(text):,} letters, which is no path and no base64 of an image" in str(error.value)
        assert len(str(error.value)) < 250
    assert resolve_image("a" * 100 + ".png", "/图", "row 1")["path"] == "/图/" + "a" * 100 + ".png"


def test_a_long_path_is_one_where_the_file_is_there(tmp_path):
    name = "/".join(["很长的文件夹" * 8] * 9) + "/1.png"
    assert len(name) > 400
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"x")
    assert resolve_image(name, str(tmp_path), "row 1")["path"] == str(tmp_path / name)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///图/猫.png", "/图/猫.png"),
        ("file://localhost/a.png", "/a.png"),
        ("file://a.png", "/home/a.png"),
        ("file:///a%20b.png", "/a b.png"),
    ],
)
def test_file_uris_are_paths(uri, path):
    assert resolve_image(uri, "/home", "row 1", within=Folders(["/"])) == {"path": path, "bytes": None}


def test_a_file_that_is_called_with_percents_is_found(tmp_path):
    (tmp_path / "a%20b.png").write_bytes(b"x")
    assert resolve_image(f"file://{tmp_path}/a%20b.png", str(tmp_path), "row 1")["path"] == f"{tmp_path}/a%20b.png"


# -- where images may lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        "/etc/a.png",
        "../a.png",
        "a/../../a.png",
        "file:///etc/a.png",
        "~/a.png",
        "链/a.png",
        "链.png",
    ],
)
def test_rows_name_no_picture_outside_the_folders_of_their_source(named, tmp_path):
    """Also by a link in a folder of pictures that somebody packed."""
    home = tmp_path / "数据"
    home.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (home / "链").symlink_to(tmp_path / "elsewhere")
    (home / "链.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    with pytest.raises(RowError, match=r"lies outside .*数据: move it there, or name its folder") as error:
        image_of(home, named)
    assert error.value.reason == "image outside"
    assert image_of(home, named, image_folders=["/"])["path"].endswith(".png")
    embedded = {"path": named, "bytes": b"x"}
    assert resolve_image(embedded, None, "行 1") == embedded, "a name beside the bytes is never opened"


def test_the_folders_of_a_source_are_its_files_its_images_and_those_it_names(tmp_path):
    for name in ("photos", "more", "rows"):
        (tmp_path / name).mkdir()
    more = {"images": str(tmp_path / "photos"), "image_folders": [str(tmp_path / "more")]}
    for image in ("1.png", f"{tmp_path}/rows/1.png", f"{tmp_path}/more/a/1.png", "../more/1.png"):
        assert image_of(tmp_path / "rows", image, **more)["path"].startswith(str(tmp_path))
    with pytest.raises(RowError, match=r"lies outside .*photos and .*rows and .*more: "):
        image_of(tmp_path / "rows", "../2.png", **more)
    with pytest.raises(RowError, match="lies outside"):  # a name that only begins like a folder's
        image_of(tmp_path / "rows", f"{tmp_path}/more2/1.png", **more)
    with pytest.raises(UserError, match="takes its images from nowhere, which is no folder"):
        image_of(tmp_path / "rows", "1.png", image_folders=["nowhere"])


def test_pictures_of_a_repository_in_the_hubs_cache_are_links_to_its_blobs(tmp_path):
    blobs, shots = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "c0"
    for folder in (blobs, shots / "图"):
        folder.mkdir(parents=True)
    (blobs / "f00").write_bytes(b"x")
    (shots / "图" / "1.png").symlink_to(blobs / "f00")
    (shots / "图" / "2.png").symlink_to("/etc/hostname")
    assert image_of(shots, "图/1.png")["path"].endswith("1.png")
    assert image_of(tmp_path, "1.png", images=str(shots / "图"))["path"].endswith("1.png")
    with pytest.raises(RowError, match="lies outside"):
        image_of(shots, "图/2.png")


def test_rows_of_the_hub_lie_in_the_hubs_cache():
    within = Folders(folders_of_hub("owner/名"))
    assert within.hold(str(Path(constants.HF_HUB_CACHE) / "datasets--owner--名" / "snapshots" / "0" / "a.png"))
    assert not within.hold(str(Path(constants.HF_HUB_CACHE) / "models--owner--名" / "a.png"))
    assert not within.hold("/etc/passwd")


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"path": "a"}, {}),
        ({"max_pixels": 9.0, "min_pixels": None}, {"max_pixels": 9}),
        ({"detail": "low"}, {"max_pixels": 262144}),
        ({"detail": "low", "max_pixels": 100}, {"max_pixels": 100}),
        ({"detail": "auto"}, {}),
        ({"resized_height": 28}, {"resized_height": 28}),
    ],
)
def test_sizes_that_are_asked_for(entry, found):
    assert sizes_of(entry, "行 1") == found
    assert resolve_image({**entry, "path": "/猫.png"}, "/", "行 1") == {"path": "/猫.png", "bytes": None, **found}
    assert resolve_image({**entry, "bytes": b"x"}, None, "行 1") == {"path": entry.get("path"), "bytes": b"x", **found}


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"max_pixels": 0}, "行 1: max_pixels of an image is 0: write a whole number of pixels from 1 on."),
        ({"min_pixels": "9"}, "min_pixels of an image is 9"),
        ({"resized_width": True}, "resized_width of an image is True"),
        ({"resized_height": float("nan")}, "resized_height of an image is nan"),
        ({"max_pixels": 1, "min_pixels": 2}, "min_pixels above its max_pixels"),
        ({"detail": "ultra"}, 'detail of an image is "ultra": it must be one of auto, high, original, low.'),
    ],
)
def test_sizes_that_cannot_be(entry, sentence):
    with pytest.raises(RowError) as error:
        sizes_of(entry, "行 1")
    assert sentence in str(error.value)


SIDE = st.integers(1, 5000)


@given(SIDE, SIDE, st.integers(1, 10**6), st.integers(1, 10**6))
def test_bounds_hold_and_shapes_are_kept(width, height, one, other):
    least, most = sorted((one, other))
    asked = size_asked((width, height), {"min_pixels": least, "max_pixels": most})
    assert min(asked) >= 1
    assert asked[0] * asked[1] <= most or width * height < least
    if least <= width * height <= most:
        assert asked == (width, height)
    assert (asked[0] >= asked[1]) == (width >= height) or abs(asked[0] - asked[1]) <= 1


def test_a_size_that_is_named_goes_before_the_bounds():
    assert size_asked((100, 50), {"resized_width": 30, "resized_height": 40, "max_pixels": 9}) == (30, 40)
    assert size_asked((100, 50), {"resized_width": 30}) == (30, 15)
    assert size_asked((100, 50), {"resized_height": 30}) == (60, 30)
    assert size_asked((3, 1), {"resized_width": 1}) == (1, 1)


@pytest.mark.parametrize(
    "more", [{"max_pixels": 800}, {"min_pixels": 20_000}, {"resized_width": 30, "resized_height": 7}]
)
def test_pictures_come_in_that_size_and_are_measured_so(tmp_path, more):
    path = tmp_path / "图.png"
    Image.new("RGB", (100, 50), (9, 99, 200)).save(path)
    entry = {"path": str(path), "bytes": None, **more}
    loaded = load_image(entry)
    assert loaded.size == image_size(entry) == size_asked((100, 50), more) != (100, 50)
    assert loaded.getpixel((0, 0)) == (9, 99, 200)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    entry = {"path": str(tmp_path / "a.png"), "bytes": None, "resized_width": 10**6, "resized_height": 10**6}
    with pytest.raises(
        RowError, match=r"row 7: an image of 100 x 50 pixels is to become 1,000,000 x 1,000,000"
    ) as error:
        load_image(entry, where="row 7")
    assert error.value.reason == "image too large"
