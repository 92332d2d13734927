"""Questions to a person, each with an answer that holds where nobody says anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..base.console import tell
from ..base.errors import UserError
from ..base.words import closest
from ..spoken.language import in_words


class Asker:
    """Asks what a flag has not said already.

    Args:
        ask: Whether anybody is there to answer; else what is proposed is taken.
    """

    def __init__(self, ask: bool) -> None:
        self.asks = ask

    def choose(self, question: str, choices: Mapping[str, str], default: str, given: str | None, flag: str) -> str:
        """One of several.

        Args:
            question: What is asked.
            choices: What may be answered → what it means.
            default: What is proposed.
            given: What the flag says.
            flag: Its name, for messages.

        Raises:
            UserError: The flag says none of them, or nobody answers.
        """
        if given is not None:
            if given not in choices:
                raise UserError(f"{flag} {given} cannot be had here; choose one of: {', '.join(choices)}.")
            return given
        if not self.asks or len(choices) == 1:
            return default
        names = list(choices)
        tell(f"\n{question}")
        for number, name in enumerate(names, start=1):
            tell(f"  {number}  {choices[name]}")
        while True:
            said = self._read(str(names.index(default) + 1))
            if said.isdecimal() and 1 <= int(said) <= len(names):
                return names[int(said) - 1]
            if said in names:
                return said
            tell(_no_choice(said, names))

    def text(self, question: str, default: str, given: str | None, proposals: Sequence[tuple[str, str]] = ()) -> str:
        """Any text; `proposals` (each with what it means) may be chosen by their numbers."""
        if given is not None or not self.asks:
            return default if given is None else given
        tell(f"\n{question}")
        width = max((len(name) for name, _ in proposals), default=0)
        for number, (name, meaning) in enumerate(proposals, start=1):
            tell(f"  {number}  {name:<{width}}  {meaning}".rstrip())
        said = self._read(default)
        return proposals[int(said) - 1][0] if said.isdecimal() and 1 <= int(said) <= len(proposals) else said

    def number(self, question: str, default: float, given: float | None) -> float:
        """A number above zero."""
        if given is not None or not self.asks:
            return default if given is None else given
        tell(f"\n{question}")
        while True:
            said = self._read(f"{default:g}").rstrip("hH时小").strip()
            try:
                value = float(said)
            except ValueError:
                value = 0.0
            if 0 < value < float("inf"):
                return value
            tell(in_words(f"{said!r} is no number of hours above zero, such as 8 or 0.5.",
                          f"“{said}”不是大于零的小时数，例如 8 或 0.5。"))  # fmt: skip

    def _read(self, default: str) -> str:
        """A line of the person's, or what is proposed for an empty one."""
        tell(in_words(f"Answer [{default}]: ", f"回答 [{default}]："), end="")
        try:
            return input().strip() or default
        except EOFError:
            tell()
            raise UserError("Nobody answered: give --yes to take what is proposed, or the answers as flags.") from None
        except UnicodeDecodeError:
            return ""


def _no_choice(said: str, names: Sequence[str]) -> str:
    hint = closest(said, names)
    return in_words(
        f"{said!r} is none of these; type a number from 1 to {len(names)}{f', or {hint}' if hint else ''}.",
        f"“{said}”不在其中；请输入 1 到 {len(names)} 的数字{f'，或 {hint}' if hint else ''}。",
    )
