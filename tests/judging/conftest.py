"""A judge's server over real HTTP, of which nothing waits long."""

from __future__ import annotations

import pytest

from support.chat_server import ChatServerDouble
from vlm_sft.judging import server as module


@pytest.fixture
def double():
    with ChatServerDouble(lambda prompt: f"8 7\n{prompt}") as server:
        yield server


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Nothing waits longer than it must."""
    monkeypatch.setattr(module.random, "uniform", lambda low, high: 0.01)
