"""An audit that could ask nobody never says that all is well."""

from __future__ import annotations

import json
import re

import pytest

from support.scripts import script

audit = script(".ci/audit.py")

WELL = {"name": "pillow", "version": "13.0.0", "vulns": []}
WEAK = {"name": "jinja2", "version": "2.0", "vulns": [{"id": "PYSEC-2019-217"}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "says"),
    [
        ([WELL], 0, "No weakness is known of the 1 packages"),
        ([WELL, WEAK, UNKNOWN], 1, r"Weaknesses are known of jinja2 2\.0 \(PYSEC-2019-217\)"),
        ([WELL, UNKNOWN], 3, "knew nothing of 1 of 2 packages .* not audited: torch"),
        ([UNKNOWN], 3, "knew nothing of 1 of 1 packages"),
        ([], 3, "knew nothing of 0 of 0 packages"),
    ],
)
def test_what_was_found_is_said(packages, code, says):
    found, sentence = audit.judge(json.dumps({"dependencies": packages}), "")
    assert found == code and re.search(says, sentence)


def test_a_service_that_is_not_there_is_said():
    code, sentence = audit.judge("", "Traceback …\nConnectionError: no route to host\n")
    assert code == 3 and sentence.endswith("so nothing was audited: ConnectionError: no route to host")


def test_every_version_that_is_installed_is_pinned_exactly():
    """Only those can be looked up."""
    lines = audit.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert pins and all(line.count("==") == 1 for line in pins)
