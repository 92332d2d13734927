"""The sandbox that chat templates run in: what transformers gives them, and nothing to reach Python with.

Templates come from strangers. The environment is jinja's immutable sandbox with the helpers that transformers offers,
so that one file serves both; everything a template does wrong becomes one sentence with its line. How much memory and
time one takes is bounded by the process that it runs in (`process`).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from ..base.errors import UserError
from ..base.limits import READERS
from ..base.names import Values
from ..base.words import reason_of

MARKS = "generation_marks"  # render variable that carries the two border characters to the extension
HOW_TO_MARK = (
    "wrap what the assistant says in {% generation %} … {% endgeneration %} so that it is known what to train on"
)
_FILE = "<template>"  # what jinja calls a template made from a string, in tracebacks


class RefusedError(UserError):
    """The template itself called `raise_exception`."""


@lru_cache(maxsize=64)
def compile_template(source: str, label: str) -> jinja2.Template:
    """Compiles a chat template.

    Args:
        source: Jinja source.
        label: What to call the template in an error, for example "the chat template own.jinja".

    Raises:
        UserError: It is not jinja (the message names the line), or it has no `{% generation %}` markers.
    """
    if len(source) > READERS.template_characters:
        raise UserError(
            f"{label} has more than {READERS.template_characters:,} characters; do not use templates like it."
        )
    environment = _environment()
    try:
        tree = environment.parse(source)
        compiled = environment.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{label}, line {error.lineno}: {reason_of(error)}; mend the jinja there.") from error
    except (RecursionError, MemoryError, SyntaxError) as error:
        # Python's own compiler raises these: brackets in brackets in ….
        raise UserError(f"{label} is nested too deeply; do not use templates like it.") from error
    if not any(attribute.name == "_mark" for attribute in tree.find_all(nodes.ExtensionAttribute)):
        raise UserError(f"{label} has no generation markers; {HOW_TO_MARK}.")
    return compiled


def run_template(compiled: jinja2.Template, label: str, **variables: Any) -> str:
    """Renders a compiled template.

    Args:
        compiled: From `compile_template`.
        label: What to call the template in an error.
        **variables: What the template sees; `MARKS` must hold the two characters that border a generation block.

    Raises:
        RefusedError: The template called `raise_exception`.
        UserError: It failed, or tried to leave the sandbox; the message names the line.
    """
    try:
        return compiled.render(**variables)
    except Exception as error:  # a template can be made to raise anything, and the fault is the template's
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE]
        where = f"{label}, line {lines[-1]}" if lines else label
        if isinstance(error, RefusedError):
            raise RefusedError(f"{where}: {reason_of(error)}.") from error
        if isinstance(error, SecurityError):
            sentence = f"{where} tried to leave its sandbox ({reason_of(error)}); do not use templates like it."
            raise UserError(sentence) from error
        sentence = f"{where} fails with {type(error).__name__}: {reason_of(error)}; mend the jinja there."
        raise UserError(sentence) from error


@lru_cache(maxsize=64)
def _prompt(source: str) -> jinja2.Template:
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return ImmutableSandboxedEnvironment(**options).from_string(source)


def check_prompt(source: str, where: str) -> None:
    """Looks whether the prompt of a benchmark can be read.

    Raises:
        UserError: It is no jinja.
    """
    try:
        _prompt(source)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
        raise UserError(f"{where}: the prompt is no jinja: {reason_of(error)}.") from error


def fill_prompt(source: str, where: str, values: Values) -> str:
    """The prompt of a benchmark with the columns of a row in it; a name that is not among them is an error.

    Raises:
        UserError: It fails.
    """
    try:
        return _prompt(source).render(**values).strip()
    except Exception as error:  # a prompt can be made to raise anything, and the fault is the prompt's
        raise UserError(f"{where}: the prompt of the benchmark fails there: {reason_of(error)}.") from error


@lru_cache(maxsize=64)  # asked for every row; parsing takes longer than rendering
def variables_of(source: str) -> frozenset[str]:
    """Names that a template's code (not its comments) expects from outside."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(source)))


@lru_cache(maxsize=64)
def words_of(source: str) -> frozenset[str]:
    """Names of attributes and texts that a template's code (not its comments) has: what it may look up in a message."""
    tree = _environment().parse(source)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(attributes | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: prints its body between the two border characters of this render.

    transformers counts the characters printed so far instead, which goes wrong inside macros and `set` blocks.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        begin, end = context.resolve(MARKS)
        return f"{begin}{caller()}{end}"


class _Undefined(jinja2.Undefined):
    """May be tested, as templates do with `tools`, but not printed: `{{ eos_tokn }}` would train without an end."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: object, attribute: str) -> jinja2.Undefined:
        """Refuses at once, where jinja waits for the value to be used."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not safe")


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, as in transformers, so that nothing reaches Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise RefusedError(message)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    """What transformers gives a chat template, so that one file serves both."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, undefined=_Undefined, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals.pop("lipsum")  # its texts are drawn by chance
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **more: json.dumps(
        value, ensure_ascii=ensure_ascii, **more
    )
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda layout: datetime.now().strftime(layout),
        namespace=_Namespace,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the class would bring its attributes into the sandbox
    )
    return environment
