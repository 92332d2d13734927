"""A question of a client becomes one of ours: bundles by name, pictures that may be read, bounds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft.base.errors import RowError
from vlm_sft.serving.asked import Asked
from vlm_sft.serving.prepare import Rules, find, prepare
from vlm_sft.serving.refusal import Refusal


@pytest.fixture
def ready(served):
    """Prepares a question about the images of these URLs."""

    def make(*urls, rules=None, most=None, bundle=None, detail=None, **more):
        entries = [{"url": url, "detail": detail, "where": f"messages[0].content[{n}]"} for n, url in enumerate(urls)]
        content = [{"type": "image", "text": None}] * len(urls) + [{"type": "text", "text": "这是什么？"}]
        asked = Asked("tiny", [{"role": "user", "content": content}], entries, most, **more)
        return prepare(bundle or served, asked, rules or Rules(), lambda what: None)

    return make


def test_bundles_are_found_by_name(served) -> None:
    other = replace(served, name="other")
    both = {"tiny": served, "other": other}
    assert find(both, "other") is other and find({"tiny": served}, None) is served
    with pytest.raises(Refusal, match="model is missing: there are tiny, other"):
        find(both, None)
    with pytest.raises(Refusal, match="There is no model 'tinny'; did you mean tiny") as wrong:
        find(both, "tinny")
    assert (wrong.value.status, wrong.value.code) == (404, "model_not_found")


def test_images_come_as_data_urls_and_several(ready, picture) -> None:
    url = picture()["image_url"]["url"]
    one, two = ready(url), ready(url, url)
    assert two.chat.num_images == 2 and len(two.chat.input_ids) > len(one.chat.input_ids)
    assert all(isinstance(image["bytes"], bytes) for image in two.row["images"])


def test_files_are_read_in_folders_that_were_named_alone(ready, tmp_path, shared_photos) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        shutil.copy(shared_photos[0], folder / "a 照片.png")
    (inside / "link.png").symlink_to(outside / "a 照片.png")
    rules = Rules(image_folders=(str(inside),))
    assert ready(f"file://{inside}/a 照片.png", rules=rules).chat.num_images == 1
    assert ready(f"file://{inside}/a%20照片.png", rules=rules).chat.num_images == 1
    for name in (
        f"{outside}/a 照片.png",
        f"{inside}/../out/a 照片.png",
        f"{inside}/link.png",
        "/etc/passwd",
        "/dev/zero",
    ):
        with pytest.raises(RowError, match="lies outside"):
            ready(f"file://{name}", rules=rules)
    with pytest.raises(RowError, match="not found"):
        ready(f"file://{inside}/none.png", rules=rules)
    with pytest.raises(Refusal, match="no file is read"):
        ready(f"file://{inside}/a 照片.png")
    with pytest.raises(Refusal, match="is no URL"):
        ready(str(inside / "a 照片.png"), rules=rules)


def test_urls_are_fetched_where_the_server_was_told_to(ready, shared_photos) -> None:
    asked: list[str] = []

    def fetch(url: str) -> str:
        asked.append(url)
        if "private" in url:
            raise RowError("the image leads to a private address")
        return str(shared_photos[0])

    rules = Rules(fetch=fetch)
    assert ready("https://example.org/a.png", rules=rules).chat.num_images == 1
    with pytest.raises(Refusal, match=r"content.0.: the image leads to a private address"):
        ready("http://private.example/a.png", rules=rules)
    assert len(asked) == 2
    for url in ("ftp://example.org/a.png", "gopher://x"):
        with pytest.raises(Refusal, match="no URL is fetched"):
            ready(url, rules=rules)
    with pytest.raises(Refusal, match="no URL is fetched"):
        ready("https://example.org/a.png")


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,", "data:image/png;base64,????", "data:,abc", "data:text/plain"]
)
def test_data_urls_that_hold_nothing_are_refused(ready, url) -> None:
    with pytest.raises(RowError, match="holds no base64 image"):
        ready(url)


def test_bounds_on_images_pixels_and_tokens(ready, picture, monkeypatch, served, tmp_path) -> None:
    url = picture()["image_url"]["url"]
    with pytest.raises(Refusal, match="show 3 images; at most 2"):
        ready(url, url, url, rules=Rules(images=2))
    monkeypatch.setenv("VLM_SFT_LIMITS", "image_pixels=2000")
    with pytest.raises(Refusal, match="2,400 pixels together"):
        ready(url, url)
    monkeypatch.setenv("VLM_SFT_LIMITS", "")
    with pytest.raises(Refusal, match="2,400 pixels together; at most 2,399 are taken"):
        ready(url, url, rules=Rules(pixels=2399))
    with pytest.raises(Refusal, match="max_tokens is 9; at most 8"):
        ready(url, most=9, rules=Rules(tokens=8))
    assert ready(url, rules=Rules(tokens=8)).most == 8
    monkeypatch.setenv("VLM_SFT_LIMITS", "")
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    assert ready(url, detail="low").row["images"][0]["max_pixels"] == 512 * 512
    with pytest.raises(RowError, match="detail of an image"):
        ready(url, detail="huge")
    assert Path(tmp_path / "x.png").exists()


def test_an_answer_is_as_long_as_asked_as_the_recipe_says_or_as_fits(ready, picture, served) -> None:
    url = picture()["image_url"]["url"]
    assert ready(url).most == 128 and ready(url, most=5).most == 5
    assert ready(url, bundle=replace(served, own={"max_new_tokens": 7})).most == 7
    found = ready(url, most=4000)
    assert found.most + len(found.chat.input_ids) == 512
    long = [{"role": "user", "content": [{"type": "text", "text": "猫" * 600}]}]
    with pytest.raises(Refusal, match="reads at most 512") as refused:
        prepare(served, Asked("tiny", long, []), Rules(), lambda what: None)
    assert refused.value.code == "context_length_exceeded"
    longer = [{"role": "user", "content": [{"type": "text", "text": "猫" * 9000}]}]
    with pytest.raises(Refusal, match="have 9,000 characters, but the language model reads at most 512 tokens"):
        prepare(served, Asked("tiny", longer, []), Rules(), lambda what: None)


def test_how_it_is_drawn_is_said_by_the_client_over_the_recipe(ready, picture, served) -> None:
    url = picture()["image_url"]["url"]
    assert ready(url).draw.warpers is None
    assert ready(url, options={"temperature": 0.0}).draw.warpers is None
    assert ready(url, options={"temperature": 0.5}, seed=4).draw.seed == 4
    drawing = replace(served, own={"do_sample": True, "temperature": 0.3, "top_k": 2})
    assert len(ready(url, bundle=drawing).draw.warpers) == 2
    assert ready(url, bundle=drawing, options={"temperature": 0.0}).draw.warpers is None
    careful = replace(served, own={"do_sample": False, "temperature": 0.3})
    assert ready(url, bundle=careful).draw.warpers is None
    assert [type(each).__name__ for each in ready(url, bundle=careful, options={"top_p": 0.5}).draw.warpers] == [
        "TemperatureLogitsWarper",
        "TopPLogitsWarper",
    ]
    stops = replace(served, own={"stop_strings": ["。"]})
    assert list(ready(url, bundle=stops, stop=["x"]).stop) == ["。", "x"]
