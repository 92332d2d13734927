"""`python -m vlm_sft`: the command `vlm-sft`."""

from __future__ import annotations

from .cli.main import main

if __name__ == "__main__":
    main()
