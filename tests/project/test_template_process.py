"""`benchmarks/template_process.py`, small: a template that does not ship takes little longer than one that does."""

from __future__ import annotations

import runpy

import pytest

from support.paths import ROOT


@pytest.mark.slow
def test_a_strangers_template_takes_little_longer():
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "template_process.py"))
    found = benchmark["main"](["--rows", "1024", "--rounds", "4"])
    assert found["times_as_long"] < 1.5
