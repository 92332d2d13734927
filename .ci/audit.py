"""`make audit`: are weaknesses known of the versions in constraints.txt? PyPI's advisories are asked, by pip-audit.

Exit code 0: of every version it was asked, and none is known. 1: some are. 3: it could not be asked of all, so nothing
is said of the others; pip-audit by itself says "No known vulnerabilities found" then.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def main() -> int:
    """Asks, says what was found, and returns the exit code."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    asked = subprocess.run([*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True)
    code, sentence = judge(asked.stdout, asked.stderr)
    print(sentence)
    return code


def judge(found: str, said: str) -> tuple[int, str]:
    """The exit code and the sentence for what pip-audit wrote.

    Args:
        found: Its JSON.
        said: What it wrote to standard error.
    """
    try:
        packages = json.loads(found)["dependencies"]
    except (ValueError, KeyError):
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        return 3, f"The service of known vulnerabilities could not be asked, so nothing was audited: {last}"
    weak = [f"{p['name']} {p['version']} ({weakness['id']})" for p in packages for weakness in p.get("vulns", ())]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if weak:
        return 1, f"Weaknesses are known of {', '.join(weak)}: raise these versions in constraints.txt."
    if unknown or not packages:
        return 3, (
            f"The service of known vulnerabilities knew nothing of {len(unknown)} of {len(packages)} packages (a "
            f"registry that has no advisories?), so these were not audited: {', '.join(unknown)}."
        )
    return 0, f"No weakness is known of the {len(packages)} packages in constraints.txt."


if __name__ == "__main__":
    sys.exit(main())
