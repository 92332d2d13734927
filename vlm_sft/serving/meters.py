"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Numbers by size, as Prometheus has them: how many were at most each of some bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def see(self, value: float) -> None:
        """Counts a number."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """Its lines of text."""
        total, lines = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Meters:
    """The counts of a server; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._left = 0
        self._seconds, self._first = Histogram(SECONDS), Histogram(SECONDS)
        self._batches = Histogram(SIZES)

    def answered(self, model: str, status: int, seconds: float) -> None:
        """A request has its answer; `model` is "" where it named none that there is."""
        with self._lock:
            self._answered[model, status] += 1
            self._seconds.see(seconds)

    def tokens(self, model: str, prompt: int, written: int) -> None:
        """So many were read and written for a request."""
        with self._lock:
            self._tokens[model, "prompt"] += prompt
            self._tokens[model, "written"] += written

    def first(self, seconds: float) -> None:
        """The first piece of an answer has come."""
        with self._lock:
            self._first.see(seconds)

    def gone(self) -> None:
        """A client has left before its answer was whole."""
        with self._lock:
            self._left += 1

    def batch(self, size: int) -> None:
        """A batch begins."""
        with self._lock:
            self._batches.see(size)

    def text(self, written: int, waiting: int) -> str:
        """All of it.

        Args:
            written: Answers that are written at the moment.
            waiting: Questions that wait.
        """
        with self._lock:
            answered, tokens = sorted(self._answered.items()), sorted(self._tokens.items())
            told = {
                "requests_total": ("counter", "Requests by status.", [
                    f'vlm_sft_requests_total{{model="{_label(model)}",status="{status}"}} {count}'
                    for (model, status), count in answered]),
                "tokens_total": ("counter", "Tokens that were read (prompt) and written.", [
                    f'vlm_sft_tokens_total{{model="{_label(model)}",kind="{kind}"}} {count}'
                    for (model, kind), count in tokens]),
                "clients_gone_total": ("counter", "Clients that left before their answer was whole.",
                                       [f"vlm_sft_clients_gone_total {self._left}"]),
                "answers_written": ("gauge", "Answers that are written now.", [f"vlm_sft_answers_written {written}"]),
                "questions_waiting": ("gauge", "Questions that wait.", [f"vlm_sft_questions_waiting {waiting}"]),
                "request_seconds": ("histogram", "From a request to the end of its answer.",
                                    self._seconds.lines("vlm_sft_request_seconds")),
                "first_piece_seconds": ("histogram", "From a request to the first piece of its answer.",
                                        self._first.lines("vlm_sft_first_piece_seconds")),
                "batch_size": ("histogram", "Answers in a batch.", self._batches.lines("vlm_sft_batch_size")),
            }  # fmt: skip
        lines = []
        for name, (kind, help_, values) in told.items():
            lines += [f"# HELP vlm_sft_{name} {help_}", f"# TYPE vlm_sft_{name} {kind}", *values]
        return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
