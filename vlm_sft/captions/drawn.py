"""How several captions of a picture are drawn, and what rules it out."""

from __future__ import annotations

from ..base.errors import UserError
from ..base.names import Options
from ..inference.settings import SAMPLING

NUCLEUS = {"do_sample": True, "top_p": 0.9}
"""Where nobody says how (BLIP, arXiv:2201.12086, section 3.2)."""


def is_drawn(options: Options, count: int) -> bool:
    """Whether captions are drawn by chance, of settings as `settings.tidy` gives them."""
    if count > 1 or options.get("do_sample"):
        return True
    return options.get("do_sample") is None and any(name in options for name in SAMPLING)


def check_count(options: Options, count: int) -> None:
    """Looks whether several captions can be drawn as it is asked for.

    Raises:
        UserError: They would all be the same.
    """
    same = [name for name, value in (("do_sample", False), ("temperature", 0)) if options.get(name, "") == value]
    same += ["num_beams"] if (options.get("num_beams") or 1) > 1 else []
    if count > 1 and same:
        raise UserError(
            f"--captions {count} are drawn by chance, which --set {same[0]}={options[same[0]]} rules out: leave it "
            f"out, or ask for one caption."
        )
