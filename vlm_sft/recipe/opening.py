"""A recipe as the commands that build its model begin with it."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.console import quiet_libraries
from .left_out import leave_out_bitsandbytes
from .safety import refuse_code, refuse_revisions
from .schema import Recipe, load_recipe


def open_recipe(recipe: str, overrides: Sequence[str] | None, trust_remote_code: bool) -> Recipe:
    """Reads a recipe, and makes the libraries ready for what it asks of them.

    Args:
        recipe: Path, or the name of one that ships.
        overrides: `key.path=value` each.
        trust_remote_code: Lets base pieces run the Python code that they bring, where the recipe asks for it.

    Raises:
        UserError: It is wrong, or would run code that nobody allowed.
    """
    found = load_recipe(recipe, overrides or [])
    if not trust_remote_code:
        refuse_code(found, str(found.path))
    refuse_revisions(found)
    leave_out_bitsandbytes(found)
    quiet_libraries()
    return found
