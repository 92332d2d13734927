"""The bundles of a server: each by its name, those on one base with that base in memory once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from ..base.errors import UserError
from ..base.names import Options
from ..batch.processor import VLMProcessor
from ..bundle.hub import find_bundle
from ..bundle.load import differs_in, load_beside, recipe_of
from ..bundle.manifest import read_manifest
from ..bundle.save import parameters_of
from ..inference.settings import SAMPLING, open_bundle
from ..rows.videos import Sampling

# Settings of beams, which only the end decides between: nothing of such an answer could be shown before, nor joined.
BEAMS = {"num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty", "constraints"}
OF_ONE_ANSWER = {"max_new_tokens", "max_length", "stop_strings", "do_sample", *SAMPLING, *BEAMS}
# Settings with which going on from what is written is the same as never having stopped.
FORGETFUL = OF_ONE_ANSWER | {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens", "use_cache"),
    *(
        "transformers_version",
        "_from_model_config",
        "cache_implementation",
        "num_return_sequences",
    ),
}


class Base:
    """A model in memory.

    Attributes:
        folders: Of its bundles.
        now: Which of them it is at the moment.
        parameters: Those that its bundles have each for itself, by name, LoRA left out; none where there is one bundle.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.folders: list[Path] = []
        self.now: Served | None = None
        self.parameters: dict[str, torch.nn.Parameter] = {}


@dataclass(eq=False)
class Served:
    """A bundle that is asked by its name.

    Attributes:
        name: What clients call it.
        base: Its model, maybe with others.
        processor: Its own.
        own: Settings of `generate` that its recipe says.
        adapter: Name of its LoRA in the model; None where it has none.
        tensors: What it has in place of the others' parameters; none where it is alone.
        reader: A copy of the processor for reading questions while others are answered: a tokenizer that two threads
            ask may fail.
        answers: How its model answers where nothing is said.
        began: When it was loaded, in seconds of Unix.
    """

    name: str
    base: Base
    processor: VLMProcessor
    own: Options
    adapter: str | None
    answers: GenerationConfig
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    reader: VLMProcessor = field(init=False)
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.reader = copy.deepcopy(self.processor)

    @property
    def model(self) -> PreTrainedModel:
        """The model, which is this bundle after `activate`."""
        return self.base.model

    @property
    def settings(self) -> Options:
        """Settings of a batch of answers: what each says for itself is left out, and there is one beam."""
        kept = {name: value for name, value in self.own.items() if name not in OF_ONE_ANSWER}
        return {**kept, "do_sample": False, "num_beams": 1}

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer, by the recipe."""
        given = self.own.get("stop_strings") or []
        return [given] if isinstance(given, str) else list(given)

    @property
    def goes_on(self) -> bool:
        """Whether an answer may be stopped and written on from its text; see `pool`."""
        if self.processor.answer_start is not None:  # an encoder has read the question, and nothing behind it
            return False
        return not (set(self.own) | set(self.answers.to_diff_dict())) - FORGETFUL

    def activate(self) -> None:
        """Makes the model this bundle; called between batches alone."""
        if self.base.now is self:
            return
        model = self.base.model
        if isinstance(model, PeftModel):
            layers = model.base_model
            layers.disable_adapter_layers() if self.adapter is None else layers.enable_adapter_layers()
            if self.adapter is not None:
                model.set_adapter(self.adapter)
                model.requires_grad_(False)
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        core.generation_config = self.answers
        for name, parameter in self.base.parameters.items():
            parameter.data = self.tensors[name]
        self.base.now = self


def load_bundles(
    given: Sequence[str],
    options: Options,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Served]:
    """Bundles by their names: the last part of a folder or repository, or all of what was given where two end alike.

    Args:
        given: Folders, or repositories of the Hub.
        options: For transformers' `generate`, over the recipes' `generation`.
        trust_remote_code: See `vlm_sft.load`.
        say: Is told which stand on one base, and why one does not.

    Raises:
        UserError: One is given twice, or as `vlm_sft.load`.
    """
    names = names_of(given)
    folders = {name: find_bundle(each) for name, each in zip(names, given, strict=True)}
    # A model that has LoRA can leave it out, but not the other way round.
    order = sorted(names, key=lambda name: not read_manifest(folders[name])["adapter"])
    found: dict[str, Served] = {}
    bases: list[Base] = []
    for name in order:
        folder, why = folders[name], []
        for base in bases:
            if (differs := differs_in(base.folders[0], folder)) is None:
                found[name] = _join(name, folder, base, options)
                say(f"{name} stands on the base of {base.folders[0].name}, which is in memory once.")
                break
            why.append(differs)
        else:
            if why:
                say(f"{name} is a model of its own in memory: it differs from the others in {why[0]}.")
            model, processor, own = open_bundle(folders[name].as_posix(), options, trust_remote_code)
            core = model.get_base_model() if isinstance(model, PeftModel) else model
            adapter = "default" if read_manifest(folder)["adapter"] else None
            bases.append(Base(model))
            bases[-1].folders.append(folder)
            found[name] = Served(name, bases[-1], processor, own, adapter, core.generation_config)
            bases[-1].now = found[name]
    return {name: found[name] for name in names}


def names_of(given: Sequence[str]) -> list[str]:
    """What clients call bundles that were given so.

    Raises:
        UserError: Two are the same.
    """
    short = [Path(each.partition("@")[0]).resolve().name if Path(each).exists() else _last(each) for each in given]
    names = [name if short.count(name) == 1 else each.rstrip("/") for name, each in zip(short, given, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is given twice: name each bundle once.")
    return names


def _last(repository: str) -> str:
    return repository.partition("@")[0].rstrip("/").rpartition("/")[2]


def _join(name: str, folder: Path, base: Base, options: Options) -> Served:
    """A further bundle of a base."""
    manifest = read_manifest(folder)
    recipe = recipe_of(folder, manifest)
    first = base.now
    assert first is not None
    first.activate()
    adapter = f"adapter_{len(base.folders)}" if manifest["adapter"] else None
    tensors, processor, answers = load_beside(folder, base.model, adapter or "")
    processor.video = Sampling(**recipe.data.video.model_dump())
    if not base.parameters:
        base.parameters = parameters_of(base.model, {*manifest.get("held", ()), *manifest["trained"]})
        first.tensors = {name: parameter.data for name, parameter in base.parameters.items()}
    base.model.requires_grad_(False).eval()
    base.folders.append(folder)
    own = {**recipe.generation, **options}
    return Served(name, base, processor, own, adapter, answers, tensors)
