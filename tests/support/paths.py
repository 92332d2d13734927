"""Where the checkout and the references lie."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(os.environ.get("VLM_SFT_GOLDENS", ROOT / "tests" / "goldens"))

SCORERS = ROOT / "tests" / "goldens" / "scorers"  # of our own making, so other goldens have none
"""Answers with what the scorers of benchmarks make of them."""


def accelerate_config(name: str) -> Path:
    """The file of an accelerate config that ships: `cpu`, `cpu_2`, `ddp`, …"""
    return ROOT / "accelerate_configs" / f"{name}.yaml"
