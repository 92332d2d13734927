"""One budget: what a recipe or the environment says holds in every process, and nothing else may say it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vlm_sft import load_image, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.limits import ENVIRONMENT, Limits, hold, limits

SAY = "from vlm_sft.base.limits import limits; print(limits().row_bytes, limits().beams)"


def test_what_is_held_holds_in_processes_that_are_started_too():
    hold({"row_bytes": 5})
    hold({"beams": 7})
    assert limits() == Limits(row_bytes=5, beams=7)
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "7"]
    hold({"row_bytes": Limits().row_bytes})
    assert os.environ[ENVIRONMENT] == "beams=7"


@pytest.mark.parametrize("text", ["rows=5", "row_bytes", "row_bytes=-5", "row_bytes=0", "row_bytes=5x", "=5", "猫=5"])
def test_a_limit_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(UserError, match=r"VLM_SFT_LIMITS: .* is no limit; write name=number, of image_pixels, "):
        limits()


@pytest.mark.parametrize("name", [each.name for each in fields(Limits)])
def test_each_is_a_key_of_a_recipe_that_a_bundle_cannot_raise(name, recipe_file):
    usual = getattr(Limits(), name)
    path = recipe_file(limits={name: usual + 1})
    load_recipe(path)
    assert limits() == Limits(**{name: usual + 1})
    os.environ[ENVIRONMENT] = ""
    (path.parent / "bundle.json").write_text("{}")
    load_recipe(path)
    assert limits() == Limits()
    load_recipe(path, [f"limits.{name}={usual + 2}"])
    assert limits() == Limits(**{name: usual + 2})


def test_the_docs_name_each_with_its_default():
    docs = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for each in fields(Limits):
        assert f"`{each.name}` ({each.default:,}" in docs


def test_an_image_is_as_large_as_the_recipe_says(recipe_file, photos):
    load_recipe(recipe_file(limits={"image_pixels": 1199}))
    with pytest.raises(UserError, match="has 40 x 30 pixels, more than the 1,199 allowed"):
        load_image(photos[0])
    load_recipe(recipe_file(limits={"image_pixels": 1200}))
    assert load_image(photos[0]).size == (40, 30)
