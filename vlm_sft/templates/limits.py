"""How much a chat template may do: loop turns, calls, characters, sizes of texts and numbers.

jinja's sandbox keeps a template away from Python, but lets it fill the memory with one expression (`'a' * 10 ** 9`) or
loop for years. Each render has a budget here; what goes over it is a `SecurityError`, as any other attempt to leave the
sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# Far above what the longest conversation needs, far below what hurts.
MAX_TURNS = 100_000
MAX_TEXT = 30_000_000
MAX_NUMBER = 100_000  # as an argument; jinja's `range` has the same limit
MAX_BITS = 10_000
MAX_PRODUCT = 100_000_000  # `replace` and `join` may give as much as two sizes multiplied
WIDE_PERCENT = re.compile(r"%(?:\(\w*\))?[-+ #0]*\d*\.?(?:\d{5}|\*)")  # `'%99999d'`, `'%.99999f'`, `'%*d'`
WIDE_FORMAT = re.compile(r":[^{}]*\d{5}")  # `'{:99999}'`


class _Budget:
    """What one render has used."""

    def __init__(self) -> None:
        self.turns = self.characters = 0

    def turn(self) -> None:
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise SecurityError(f"more than {MAX_TURNS:,} loop turns and calls")

    def text(self, size: int) -> None:
        self.characters += size
        if self.characters > MAX_TEXT:
            raise SecurityError(f"more than {MAX_TEXT:,} characters")


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def budget() -> Iterator[None]:
    """A fresh budget for what is rendered inside."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


class LimitedSandbox(ImmutableSandboxedEnvironment):
    """jinja's immutable sandbox with limits on sizes; templates must be rendered within `budget()`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_printed)
        self.globals.pop("lipsum")  # writes as much text as it is asked for
        for name, function in self.filters.items():
            self.filters[name] = limited(function)
        self.filters |= {"_counted": _counted, "_joined": _joined}

    def limit(self, tree: nodes.Template) -> nodes.Template:
        """Counts the turns of each loop of a parsed template, and the characters that `~` joins."""
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        for parent in [tree, *tree.find_all(nodes.Node)]:
            for name, child in list(parent.iter_fields()):
                if isinstance(child, nodes.Concat):
                    setattr(parent, name, _as_filter(child))
                elif isinstance(child, list):
                    child[:] = [_as_filter(each) if isinstance(each, nodes.Concat) else each for each in child]
        return tree.set_environment(self)  # type: ignore[return-value]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses what would be too large, before it is made."""
        if operator == "%" and isinstance(left, str) and WIDE_PERCENT.search(left):
            raise SecurityError("a text is padded too far")
        if _size_of(operator, left, right) > (MAX_BITS if _are_numbers(left, right) else MAX_TEXT):
            raise SecurityError(f"the result of {operator!r} would be too large")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` stays within jinja's sandbox, and pads no text too far."""
        if (wrapped := super().wrap_str_format(value)) is not None and WIDE_FORMAT.search(value.__self__):
            raise SecurityError("a text is padded too far")
        return wrapped

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Counts calls, and looks at arguments and results."""
        _BUDGET.get().turn()
        check_sizes([getattr(__obj, "__self__", None), *args, *kwargs.values()])
        return checked(super().call(__context, __obj, *args, **kwargs))


def _size_of(operator: str, left: Any, right: Any) -> int:
    """Characters, entries or bits of a result."""
    if _are_numbers(left, right):
        bits = left.bit_length() or 1
        return bits * right if operator == "**" else bits + right.bit_length() if operator == "*" else 0
    if operator == "*":
        text, number = (right, left) if isinstance(left, int) else (left, right)
        return len(text) * number if hasattr(text, "__len__") and isinstance(number, int) else 0
    return sum(len(each) for each in (left, right) if operator == "+" and hasattr(each, "__len__"))


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def check_sizes(values: Iterable[Any]) -> None:
    """Refuses arguments that may make something too large.

    Raises:
        SecurityError: A number is too large, or two sizes multiplied are.
    """
    sizes = [1, 1]
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"the number {value if value.bit_length() < 99 else '…'} is too large to be given")
        if isinstance(value, str | list | tuple | dict):
            sizes.append(len(value))
    largest = sorted(sizes)[-2:]
    if largest[0] * largest[1] > MAX_PRODUCT:
        raise SecurityError("the arguments are too large together")


def checked(result: Any) -> Any:
    """A result as it is, unless it is a text that is too long."""
    if isinstance(result, str) and len(result) > MAX_TEXT:
        raise SecurityError(f"a text of more than {MAX_TEXT:,} characters")
    return result


def limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments and its result; `wraps` keeps jinja's marks on it."""

    @wraps(function)
    def looked_at(*args: Any, **kwargs: Any) -> Any:
        check_sizes([*args, *kwargs.values()])
        if function is do_format and isinstance(args[0], str) and WIDE_PERCENT.search(args[0]):
            raise SecurityError("a text is padded too far")
        return checked(function(*args, **kwargs))

    return looked_at


# With a context, so that jinja does not call them while it compiles.


@jinja2.pass_context
def _counted(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    spent = _BUDGET.get()
    for value in values:
        spent.turn()
        yield value


@jinja2.pass_context
def _joined(context: Any, parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _BUDGET.get().text(sum(map(len, texts)))
    return "".join(texts)


@jinja2.pass_context
def _printed(context: Any, value: Any) -> Any:
    if isinstance(value, str):
        _BUDGET.get().text(len(value))
    return value


def _as_filter(concat: nodes.Concat) -> nodes.Filter:
    parts = nodes.List(concat.nodes, lineno=concat.lineno)
    return nodes.Filter(parts, "_joined", [], [], None, None, lineno=concat.lineno)
