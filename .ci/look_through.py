"""`python .ci/look_through.py PYTHON`: makes this environment see the packages of another one behind its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    """Writes a `.pth` file, whose folder is read as the other environment reads it: editable installs are found too."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    other = subprocess.run([sys.argv[1], "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    line = f"import site; site.addsitedir({str(Path(other).resolve())!r})\n"
    (Path(sysconfig.get_path("purelib")) / "behind.pth").write_text(line, encoding="utf-8")


if __name__ == "__main__":
    main()
