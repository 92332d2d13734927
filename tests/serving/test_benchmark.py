"""`benchmarks/serving.py`: what it measures, and that it notices an answer that is another one than alone."""

from __future__ import annotations

import runpy

import pytest

from support.paths import ROOT


def test_answers_are_compared_and_timed(start) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "serving.py"))
    port = start(batch_size=4).port
    bodies = benchmark["make_bodies"](12, 5, 28)
    alone = [benchmark["ask"](port, body) for body in bodies]
    assert all(0 < each["first"] <= each["seconds"] and each["tokens"] > 0 for each in alone)
    texts = [each["text"] for each in alone]
    found = benchmark["load"](port, bodies, 6, texts)
    assert (
        0 < found["p50"] <= found["p95"] <= found["p99"] and found["tokens_a_second"] > found["requests_a_second"] > 0
    )
    assert benchmark["table"]({4: found}).count("\n") == 2
    with pytest.raises(SystemExit, match="1 answers are not those of their questions alone, 12 have come"):
        benchmark["load"](port, bodies, 6, [*texts[:-1], "another"])
