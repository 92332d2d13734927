"""`accelerate launch -m vlm_sft.cache RECIPE [key.path=value …]`: `vlm-sft cache build` on all processes of a launch.

A door and no part of the room: it stands here for its name, and leads up to the command.
"""

from __future__ import annotations

import typer

from ..base.errors import exit_on_user_error
from ..base.processes import leave_process_group, let_threads_sleep
from ..cli.cache import build


def main(argv: list[str] | None = None) -> None:
    """The command for a launcher.

    Raises:
        SystemExit: It did not end well; with code 2 for what the user can mend.
    """
    let_threads_sleep()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(build)
    with exit_on_user_error():
        try:
            app(argv, prog_name="python -m vlm_sft.cache")
        except SystemExit as ended:
            if ended.code:
                raise
        leave_process_group()


if __name__ == "__main__":
    main()
