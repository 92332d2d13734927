"""`vlm-sft doctor`: what a bug report needs of this machine, and what is missing for a recipe; nothing that is private.

No token, no user name, no host name and no path stands in it: all of it may be pasted anywhere.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement

from ..base.errors import UserError, without_tokens
from ..base.names import Json
from ..base.words import counted, one_line
from .machine import GIB, Machine, this_machine

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

# Of the environment, what changes how a run goes; values are shown where they are words or numbers.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "RANK", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE",
    "HF_HUB_DISABLE_XET", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "VLM_SFT_LIMITS",
    "VLM_SFT_LANG", "LANG", "LC_ALL", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED",
)  # fmt: skip
# These are only said to be set: they may be secret.
SET = ("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY")
_PLAIN = re.compile(r"[\w.,:=@+-]*", re.ASCII)
LITTLE_DISK = 20 * GIB
WIDTH = 67  # characters beside the first column, in a window of 80
_WRAP: Json = {"break_long_words": False, "break_on_hyphens": False}


class Finding(NamedTuple):
    """What is not as it should be.

    Attributes:
        what: One sentence: what, and how to mend it.
        stops: Whether a run would end by it.
    """

    what: str
    stops: bool = True


class Report(NamedTuple):
    """What was found.

    Attributes:
        versions: Program → version, "" for what is not installed.
        machine: The machine.
        system: Name of the system and its Python.
        cuda: What torch says of CUDA.
        environment: Variable → value, or `set`.
        hub: Whether the Hub answered; None where nobody asked.
        findings: What is missing.
    """

    versions: dict[str, str]
    machine: Machine
    system: str
    cuda: str
    environment: dict[str, str]
    hub: bool | None
    findings: list[Finding]

    def as_dict(self) -> Json:
        """Ready for JSON."""
        return {
            "system": self.system, "versions": self.versions, "cuda": self.cuda, "cores": self.machine.cores,
            "gpus": [{"name": name, "gib": round(size / GIB, 1)} for name, size in self.machine.gpus],
            "memory_gib": round(self.machine.ram / GIB, 1), "disk_free_gib": round(self.machine.disk / GIB, 1),
            "environment": self.environment, "hub": self.hub,
            "findings": [finding._asdict() for finding in self.findings],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The same for a person; in English, because whoever reads the report may not know another language."""
        yield f"system       {self.system}"
        yield f"machine      {self.machine.in_english()}"
        yield f"CUDA         {self.cuda}"
        there = [f"{name} {version}" for name, version in self.versions.items() if version]
        for number, line in enumerate(_folded(there)):
            yield f"{'' if number else 'versions':<13}{line}"
        if missing := [name for name, version in self.versions.items() if not version]:
            for number, line in enumerate(_folded(missing)):
                yield f"{'' if number else 'not there':<13}{line}"
        for number, line in enumerate(_folded([f"{name}={value}" for name, value in self.environment.items()])):
            yield f"{'' if number else 'environment':<13}{line}"
        if self.hub is not None:
            yield f"Hub          {'answers' if self.hub else 'does not answer'}"
        for finding in self.findings:
            for number, line in enumerate(textwrap.wrap(finding.what, WIDTH, **_WRAP)):
                yield f"{'' if number else 'missing' if finding.stops else 'note':<13}{line}"
        if not self.findings:
            yield "             Nothing is missing."

    def summary(self) -> str:
        """One line at the end."""
        stops = sum(finding.stops for finding in self.findings)
        return f"{counted(stops, 'thing')} missing." if stops else "Ready."


def examine(recipe: str | None = None, overrides: list[str] | None = None, *, ask_hub: bool = False) -> Report:
    """Looks at versions, machine and environment, and at what a recipe needs.

    Args:
        recipe: Path, or name of one that ships.
        overrides: `key.path=value` each.
        ask_hub: Asks whether the Hub answers; nothing else goes over the network.
    """
    versions = dict(_versions())
    machine = this_machine(Path.cwd())
    findings = list(_wrong_versions())
    hub = None
    if ask_hub:
        from ..base.hub import look_for_hub

        hub = look_for_hub()
        if not hub:
            findings.append(Finding("The Hub does not answer: check the network, or name local folders.", False))
    if machine.disk < LITTLE_DISK:
        free = f"{machine.disk / GIB:.1f} GiB"
        findings.append(Finding(f"Only {free} are free on the disk; models and checkpoints take tens of GiB.", False))
    if recipe is not None:
        findings += _for_recipe(recipe, overrides or [], machine)
    return Report(versions, machine, _system(), _cuda(), dict(_environment()), hub, findings)


def _folded(words: list[str]) -> list[str]:
    """Words on lines that a narrow window holds."""
    together = ", ".join(word.replace(" ", "\0") for word in words)
    return [line.replace("\0", " ") for line in textwrap.wrap(together, WIDTH, **_WRAP)]


def _system() -> str:
    container = ", in a container" if Path("/.dockerenv").exists() or os.environ.get("KUBERNETES_SERVICE_HOST") else ""
    libc = " ".join(filter(None, platform.libc_ver()))
    return (
        f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}{', ' if libc else ''}{libc}, "
        f"Python {platform.python_version()}{container}"
    )


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        return f"not used ({built})"
    return f"{torch.version.cuda}, capability {'.'.join(map(str, torch.cuda.get_device_capability(0)))}"


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """What this package asks for, each with the extra that it belongs to, or ""."""
    for text in importlib.metadata.requires("vlm-sft") or ():
        wanted = Requirement(text)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", str(wanted.marker or ""))
        yield wanted, extra[1] if extra else ""


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _versions() -> Iterator[tuple[str, str]]:
    yield "vlm-sft", _installed("vlm-sft")
    seen = set()
    for wanted, extra in _requirements():
        if wanted.name not in seen and extra in ("", "serve", "deepspeed", "smolvlm", "eval"):
            seen.add(wanted.name)
            yield wanted.name, _installed(wanted.name)
    for name in ("torchvision", "flash-attn", "vllm"):
        if name not in seen:
            yield name, _installed(name)


def _wrong_versions() -> Iterator[Finding]:
    """What every command needs and is missing, or of another version than is known to work."""
    for wanted, extra in _requirements():
        if extra:
            continue
        found = _installed(wanted.name)
        if not found:
            yield Finding(f"{wanted.name} is not installed: pip install '{wanted.name}{wanted.specifier}'.")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield Finding(f"{wanted.name} is {found}, and {wanted.specifier} is known to work: install that.", False)


def _environment() -> Iterator[tuple[str, str]]:
    for name in VARIABLES:
        if value := os.environ.get(name):
            yield name, value if _PLAIN.fullmatch(value) and without_tokens(value) == value else "set"
    yield from ((name, "set") for name in SET if os.environ.get(name))


def _for_recipe(given: str, overrides: list[str], machine: Machine) -> Iterator[Finding]:
    """What a run of a recipe would miss; its own sentence where the recipe itself is wrong."""
    from ..pieces.checkpoints import WEIGHTS
    from ..recipe.libraries import validate_libraries
    from ..recipe.safety import pieces_in
    from ..recipe.schema import load_recipe

    try:
        recipe = load_recipe(given, overrides)
        validate_libraries(recipe)
    except UserError as error:
        yield Finding(_private(str(error)))
        return
    yield from _libraries_for(recipe, machine)
    for part, piece in pieces_in(recipe).items():
        name = piece.pretrained
        if name is None:
            continue
        if (place := Path(name).expanduser()).exists():
            if place.is_dir() and not any(path.suffix in WEIGHTS for path in place.iterdir()):
                yield Finding(f"{part}: its folder holds no weights: correct `pretrained`, or fetch it whole.")
            continue
        if _looks_local(name):
            yield Finding(f"{part}: its folder or file is not there: correct `pretrained`.")
        elif not _cached(name):
            what = f"{part}: {name} is not on this machine yet"
            offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "True")
            mend = "unset HF_HUB_OFFLINE, or name a local folder" if offline else "it is downloaded when a run begins"
            yield Finding(f"{what}: {mend}.", offline)
    for side in ("train", "eval", "test"):
        for source in getattr(recipe.data, side):
            paths = {"path": source.path, "images": source.images, "annotations": source.annotations}
            for key, path in paths.items():
                local = path is not None and (key != "path" or _looks_local(path))
                if path is not None and local and not glob.has_magic(path) and not Path(path).expanduser().exists():
                    yield Finding(f"data.{side}: what {source.name!r} names is not there: correct `{key}`.")


def _libraries_for(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    if recipe.quantization and not importlib.util.find_spec("bitsandbytes"):
        yield Finding("quantization needs bitsandbytes: pip install bitsandbytes.")
    piece = recipe.encoder or recipe.text_piece
    attention = getattr(piece, "attn_implementation", None)
    if attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        yield Finding("attn_implementation: flash_attention_2 needs flash-attn: install it, or write sdpa.")
    report = recipe.sft.get("report_to")
    for name in [report] if isinstance(report, str) else report or []:
        if name in ("wandb", "trackio", "mlflow", "swanlab") and not importlib.util.find_spec(name):
            yield Finding(f"sft.report_to names {name}, which is not installed: pip install {name}.")
    if recipe.sft.get("bf16") and not machine.gpus:
        yield Finding("sft.bf16 needs a GPU, and there is none here: set sft.bf16=false to try it on the CPU.")
    if recipe.sft.get("deepspeed") and not importlib.util.find_spec("deepspeed"):
        yield Finding("sft.deepspeed needs deepspeed: pip install 'vlm-sft[deepspeed]'.")
    if "smolvlm" in (piece.pretrained or "").lower() and not importlib.util.find_spec("num2words"):
        yield Finding("SmolVLM's own processor needs num2words: pip install num2words.")


def _looks_local(name: str) -> bool:
    """Whether a name is a path, and no id on the Hub."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1 or bool(Path(name).suffix[1:].isalpha())


def _cached(name: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def _private(text: str) -> str:
    """A sentence without paths, which name people and projects; the last part of each stays."""
    return re.sub(r"(?<![\w.])(?:~|/)[^\s:;,'\"()]*/([^\s/:;,'\"()]+)", r"…/\1", without_tokens(one_line(text)))
