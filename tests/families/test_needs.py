"""Families whose own classes need torchvision or timm: tested beside them, in a process of their environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.paths import ROOT
from support.torchvision_families import BESIDE
from vlm_sft.base.errors import UserError
from vlm_sft.families.build_family import check_needs
from vlm_sft.families.table import FAMILIES

PYTHON = ROOT / ".venv-torchvision" / "bin" / "python"
MOST_USED = "mistral3"
WHOLE = ("tests/families", "tests/export/test_forms.py", "tests/batch/test_typed_text.py")


def test_the_families_that_need_a_library_are_those_that_are_tested_beside_it():
    assert {name for name, family in FAMILIES.items() if family.needs} == set(BESIDE)


@pytest.mark.parametrize("said", ["import of torchvision halted", "operator torchvision::nms does not exist"])
def test_without_its_library_a_family_is_refused_in_a_sentence(said, monkeypatch):
    if said.startswith("operator"):  # as one of another build is

        def broken(name: str) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr("importlib.import_module", broken)
    else:
        monkeypatch.setitem(sys.modules, "torchvision", None)
    wanted = rf"a model needs torchvision, which cannot be imported here \({said}.*pip install 'vlm-sft\[timm\]'"
    with pytest.raises(UserError, match=wanted):
        check_needs(FAMILIES["gemma3n"], "a model")


def run_beside(families: str, *arguments: str) -> str:
    """Runs tests in the environment of torchvision, and gives their last line."""
    if not PYTHON.exists():
        pytest.fail("torchvision has no environment here: run `make .venv-torchvision/.setup-done` (`make test` does).")
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    asked = {**os.environ, "VLM_SFT_FAMILIES": families, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_beside_its_library_each_gives_what_transformers_own_classes_give():
    tests = "test_ids_and_pixels or test_the_loss_is_on_the_answers or test_logits_and_loss"
    files = ("tests/families/test_processor.py", "tests/families/test_model.py")
    assert run_beside(" ".join(BESIDE), "-k", tests, *files).startswith(f"{3 * len(BESIDE)} passed")


@pytest.mark.slow
def test_beside_its_library_the_most_used_passes_every_test_of_families():
    """What all pass where `benchmarks/families.py` asks for it."""
    assert " failed" not in run_beside(MOST_USED, "-k", MOST_USED, *WHOLE)
