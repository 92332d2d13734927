"""Files of every kind with bytes changed by chance are read, or refused in one sentence; in little time and memory."""

from __future__ import annotations

import os
import subprocess
import sys

from support.paths import ROOT

BUDGET = f"template_bytes={2**29},template_seconds=300,page_bytes={2**26},row_bytes={2**24}"


def test_changed_files_are_read_or_refused_in_one_sentence(tmp_path):
    """Of Arrow, parquet, tar, JSON, CSV, YAML, safetensors and GGUF; a crash of the process leaves its file there."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz_driver", str(tmp_path), "11", "1500"],
        env={**os.environ, "PYTHONPATH": paths, "VLM_SFT_LIMITS": BUDGET}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:], sorted(os.listdir(tmp_path)))
    assert "1500 files" in done.stdout
