"""A piece: what a recipe says of a part, and what stands at the place it names, looked up once."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import extract_commit_hash

from ..base.errors import UserError
from ..base.limits import bounded
from ..base.names import CONFIG, PARTS, WHOLES, Json
from ..base.whole_files import read_text
from ..base.words import one_line
from ..recipe.safety import check_config, check_length, is_deep, most_bytes
from .beside import check_config_names
from .checkpoints import Checkpoint, fetch_file, unreachable
from .expected import laid_out, unpacked
from .gguf_files import is_gguf
from .layouts import Origin

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


class Spec(Protocol):
    """What every section of a recipe that names a checkpoint says."""

    @property
    def pretrained(self) -> str | None:
        """Hub id, folder or file; a rule of the recipe sees to it that there is one."""

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit on the Hub."""


SpecT = TypeVar("SpecT", bound=Spec, covariant=True)

# Model types of checkpoints in a layout of `layouts`: transformers has no classes for them, the tensors tell the sizes.
FOREIGN = ("mplug-owl", "qwen", "chatglm")


class Piece(Generic[SpecT]):
    """A part and its checkpoint. `compose` makes it; what loads, fingerprints and writes down a part is handed it.

    Nothing is looked for before it is asked for, and nothing twice: on the Hub each look would be a request.

    Args:
        part: Name of the part, or `model` for an existing VLM, or `encoder`.
        spec: What the recipe says of it.

    Attributes:
        pretrained: Hub id, folder or file.
        key: The recipe's key, for messages.
        where: The key and the checkpoint, as messages begin.
        config: Configuration of the part, as the recipe wants it.
        num_query_tokens: Of a resampler.
        renamed: Of a language model inside a larger checkpoint: pattern of a tensor's name there → its name in the
            part. None where the checkpoint is the part's own.
        origins: Our name of each tensor → where it is in the checkpoint, once they were looked for; None where
            transformers found them.
    """

    config: PreTrainedConfig
    num_query_tokens = 0
    renamed: dict[str, str] | None = None
    origins: dict[str, Origin] | None = None

    def __init__(self, part: str, spec: SpecT) -> None:
        assert spec.pretrained is not None, "a rule of the recipe: a resampler is pretrained"
        self.part, self.spec, self.pretrained = part, spec, spec.pretrained
        self.section = section_of(part)
        self.key = f"{self.section}.pretrained"
        self.where = f"{self.key}: {self.pretrained!r}"

    @cached_property
    def is_gguf(self) -> bool:
        """Whether it is a language model in a GGUF file."""
        return self.part == "language_model" and is_gguf(self.pretrained)

    @cached_property
    def place(self) -> str:
        """Where its small files are: Hub id, folder or file; of a GGUF file the folder that it is unpacked to."""
        return unpacked(self.pretrained, self.key) if self.is_gguf else self.pretrained

    @cached_property
    def _config_file(self) -> str | None:
        return fetch_file(self.place, CONFIG, self.spec.revision, self.key, required=False)

    @cached_property
    def revision(self) -> str | None:
        """The commit that `config.json` is of: the Hub is not asked again whether a file at a commit is the newest.

        On this machine, and where there is no `config.json`, what the recipe says.
        """
        if Path(self.pretrained).exists():
            return self.spec.revision
        return extract_commit_hash(self._config_file, None) or self.spec.revision

    @cached_property
    def raw(self) -> Json:
        """`config.json` as it stands; empty where there is none, or none that can be read.

        Raises:
            UserError: Its numbers are beyond reason (some classes fill the memory while they read them), or it names
            something else to read.
        """
        if self._config_file is None:
            return {}
        check_length(self._config_file, most_bytes(CONFIG))
        try:
            raw = json.loads(bounded(read_text(self._config_file)))
        except (ValueError, RecursionError):
            return {}
        if not isinstance(raw, dict):
            return {}
        if is_deep(raw):
            raise UserError(f"{self.where}: its config.json is nested too deeply; it is refused.")
        check_config(raw, self.where)
        if not self.trusts_code:
            check_config_names(raw, self.where)
        return raw

    @property
    def is_foreign(self) -> bool:
        """Whether the checkpoint is not of transformers: a bare weight file, or a folder of a type in `FOREIGN`."""
        return Path(self.pretrained).is_file() or self.raw.get("model_type") in FOREIGN

    @cached_property
    def whole(self) -> PreTrainedConfig:
        """The configuration of the checkpoint, which may be that of a larger model.

        Raises:
            UserError: There is none, or it cannot be had.
        """
        if Path(self.place).exists() and not (Path(self.place) / CONFIG).is_file():
            raise unreachable(self.pretrained, self.key)
        _ = self.raw  # its numbers are looked at before a class reads them
        place = self.place
        try:
            if self.trusts_code:
                return AutoConfig.from_pretrained(place, revision=self.revision, trust_remote_code=True)
            place = laid_out(self.place, self.revision, self.key, (CONFIG,))
            config = AutoConfig.from_pretrained(place)
            config.name_or_path = self.pretrained
            return config
        except OSError as error:
            raise unreachable(self.pretrained, self.key) from error
        except UserError:
            raise
        except Exception as error:  # a value of a wrong type makes a class raise anything
            said = one_line(error).replace(place, self.pretrained)
            raise UserError(
                f"{self.key}: transformers cannot read the config.json of {self.pretrained!r}: {said}"
            ) from error

    @property
    def trusts_code(self) -> bool:
        """Whether Python code that the checkpoint brings along may run; that of an existing VLM never may."""
        return getattr(self.spec, "trust_remote_code", False)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its tensors, listed; with the further files that the recipe names."""
        more = getattr(self.spec, "more", None) or ()
        return Checkpoint(self.pretrained, self.revision, self.key, more=more)


def specs_of(recipe: Recipe) -> dict[str, Spec]:
    """Part → what a recipe says of its piece; a projector has none.

    An existing VLM is one piece, `model`, and an encoder too, `encoder`.
    """
    parts = {part: getattr(recipe.stack, part, None) for part in PARTS if part != "projector"}
    wholes = {name: getattr(recipe, name) for name in WHOLES}
    return {name: spec for name, spec in {**parts, **wholes}.items() if spec is not None}


def section_of(part: str) -> str:
    """The key of a recipe that says what a piece is."""
    return part if part in WHOLES else f"stack.{part}"
