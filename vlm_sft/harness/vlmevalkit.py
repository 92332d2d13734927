"""Bundles under VLMEvalKit: `python -m vlm_sft.harness BUNDLE --data MMBench_DEV_EN …`.

VLMEvalKit has a table of models and no entry point for more, so this program puts the bundle into that table, under the
name of its folder, and then is VLMEvalKit's own `run.py` with whatever else is on its command line.

VLMEvalKit imports, with every run, packages that single benchmarks need (OpenCV, decord, torchvision of a certain CUDA,
and more). Those that are not installed are left out: what is imported in their place says so where it is used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import ssl
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..base.console import quiet_libraries
from ..base.errors import RowError, UserError
from ..bundle.run_folder import find_manifest
from ..inference.generation import answer_each
from ..inference.questions import frames_of_file
from ..inference.settings import SAMPLING, check_options, open_bundle
from ..rows.messages import Message, Part, image_part, text_part

if TYPE_CHECKING:
    from collections.abc import Iterator

# What its benchmarks and models import at the top of their files, and what most of them do without.
SPARED = ("cv2", "decord", "imageio", "math_verify", "nltk", "pylatexenc", "qwen_vl_utils", "torchvision")
REFUSAL = "Failed to obtain answer"  # VLMEvalKit counts such an answer as none, and asks again with --reuse


class Bundle:
    """A bundle as VLMEvalKit asks a model; it is `vlmeval.vlm.base.BaseModel` besides, see `model_class`.

    Args:
        pretrained: Folder of the bundle, or `name/repository` on the Hub.
        trust_remote_code: See `vlm_sft.load`.
        **options: For transformers' `generate`, over the recipe's `generation`.
    """

    INTERLEAVE = True  # pictures and texts may come in any order

    def __init__(self, pretrained: str, trust_remote_code: bool = False, **options: Any) -> None:
        super().__init__()
        check_options(options)
        self._model, self._processor, self._settings = open_bundle(pretrained, options, trust_remote_code)
        if self._settings.get("do_sample") is False:
            self._settings = {name: value for name, value in self._settings.items() if name not in SAMPLING}

    def generate_inner(self, message: Sequence[Message], dataset: str | None = None) -> str:
        """The answer to parts `{"type": "text" | "image" | "video", "value"}`, of which the last two name files."""
        return self._answer([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Message], dataset: str | None = None) -> str:
        """The answer to a conversation of several turns."""
        return self._answer(message, dataset)

    def _answer(self, turns: Sequence[Message], dataset: str | None) -> str:
        told: list[Message] = []
        images: list[Any] = []
        for turn in turns:
            parts: list[Part] = []
            for part in turn["content"]:
                if part["type"] == "text":
                    parts.append(text_part(part["value"]))
                elif part["type"] == "image":
                    parts.append(image_part())
                    images.append(part["value"])
                elif part["type"] == "video":
                    for said, frame in frames_of_file(part["value"], self._processor):
                        parts += [*([text_part(said)] if said else []), image_part()]
                        images.append(frame)
                else:
                    raise UserError(f"{dataset}: it shows {part['type']!r}, which no bundle reads: choose another.")
            told.append({"role": turn["role"], "content": parts})
        row = {"messages": told, "images": images, "id": dataset or "a question"}
        [found] = answer_each(self._model, self._processor, [row], **self._settings)
        return f"{REFUSAL}: {found}" if isinstance(found, RowError) else str(found)


class Spared(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives, in place of packages that are not installed, modules whose every use is an error that names them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module for these packages and what lies in them; nothing else."""
        if fullname.partition(".")[0] not in SPARED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """A module."""
        return _Missing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


class _Missing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(f"{self.__name__}.{name}")


class _Unusable:
    """A name of a package that is not there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package = self._name.partition(".")[0]
        raise ImportError(f"{self._name} is wanted, and {package} is not installed: this benchmark needs it.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(f"{self._name}.{name}")


@contextmanager
def certificates_checked() -> Iterator[None]:
    """VLMEvalKit switches the check of certificates off for the whole process when it is imported; here it stays on."""
    before = ssl._create_default_https_context
    try:
        yield
    finally:
        ssl._create_default_https_context = before


def model_class() -> type[Bundle]:
    """`Bundle` with what VLMEvalKit's own base class gives it."""
    from vlmeval.vlm.base import BaseModel

    return type("VLMSFT", (Bundle, BaseModel), {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs VLMEvalKit with a bundle; without one, as it is, for instance against a server.

    Args:
        arguments: `BUNDLE` and VLMEvalKit's own, or these alone; default those of the program.

    Raises:
        UserError: The bundle is none, or VLMEvalKit is not installed.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    bundle = rest.pop(0) if rest and not rest[0].startswith("-") else None
    trusted = "--trust-remote-code" in rest
    rest = [each for each in rest if each != "--trust-remote-code"]
    if bundle is None and not rest:
        raise UserError("Name a bundle and data: python -m vlm_sft.harness BUNDLE --data NAME")
    if bundle is not None and {"--model", "--config"} & set(rest):
        raise UserError("The bundle is the model: leave --model and --config out, or the bundle.")
    if bundle is not None and Path(bundle).exists():
        find_manifest(bundle)
    if importlib.util.find_spec("vlmeval") is None:
        raise UserError("VLMEvalKit is not installed here: see docs/evaluation.md for an environment of its own.")
    quiet_libraries()
    import transformers.utils.import_utils as looked_for

    looked_for.is_torchvision_available()  # this is asked before something takes the place of torchvision
    if not any(isinstance(each, Spared) for each in sys.meta_path):
        sys.meta_path.append(Spared())
    with certificates_checked():
        from vlmeval import run
        from vlmeval.config import supported_VLM
    if bundle is not None:
        name = Path(bundle.partition("@")[0]).resolve().name
        supported_VLM[name] = partial(model_class(), bundle, trust_remote_code=trusted)
        rest = ["--model", name, *rest]
    sys.argv = ["vlmeval", *rest]
    run.main()
