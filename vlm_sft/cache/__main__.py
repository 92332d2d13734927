"""`accelerate launch -m vlm_sft.cache RECIPE [key.path=value …]`: `vlm-sft cache build` on all processes of a launch.

A door and no part of the room: it stands here for its name, and leads up to the command.
"""

from __future__ import annotations

from ..cli.cache import main

if __name__ == "__main__":
    main()
