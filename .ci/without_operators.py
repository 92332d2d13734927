"""`python .ci/without_operators.py`: lets this environment's torchvision be imported beside a torch for CPUs alone.

PyPI's torchvision is compiled for a torch with CUDA. Beside another its operators cannot be loaded, which it takes well
but for two, of which it says what they give before it looks whether they are there. Image processors need none of them.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HEAD = """\
import torchvision.extension

if not torchvision.extension._has_ops():
    import torch

    missing = torch.library.Library("torchvision", "FRAGMENT")
    missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""


def main() -> None:
    """Declares the two, as torchvision's own code in C++ does, at the head of the module that speaks of them."""
    module = Path(sysconfig.get_path("purelib")) / "torchvision" / "_meta_registrations.py"
    found = module.read_text(encoding="utf-8")
    if not found.startswith(HEAD):
        module.write_text(HEAD + found, encoding="utf-8")


if __name__ == "__main__":
    main()
