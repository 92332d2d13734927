"""`python -m vlm_sft.harness BUNDLE --data NAME`: VLMEvalKit asks a bundle."""

from __future__ import annotations

from ..base.errors import exit_on_user_error
from .vlmevalkit import main

if __name__ == "__main__":
    with exit_on_user_error():
        main()
