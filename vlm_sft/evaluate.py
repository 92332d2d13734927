"""`accelerate launch -m vlm_sft.evaluate BUNDLE --benchmark NAME`: `vlm-sft evaluate` on all processes of a launch."""

from __future__ import annotations

from .base.processes import leave_process_group
from .cli.evaluation import evaluate
from .train import launcher

main = launcher(evaluate, "python -m vlm_sft.evaluate")

if __name__ == "__main__":
    main()
    leave_process_group()
