"""What a bundle becomes: of a composed stack a class that computes the same, of an existing VLM its own class again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel

from ..base.errors import UserError
from ..base.names import PROCESSOR_CONFIG, TEMPLATE
from ..base.whole_files import read_text, write_json
from ..batch.processor import VLMProcessor
from ..families.kind import VLM
from ..families.model import FamilyModel
from ..families.processor import FamilyProcessor
from ..families.table import family_name
from ..model.modeling import VLMForConditionalGeneration
from ..pieces.checkpoints import Checkpoint, fetch_file
from ..pieces.piece import specs_of
from ..recipe.safety import read_json
from ..recipe.schema import Recipe
from ..rows.messages import Message
from ..stack.kinds import kind_of
from .check import QUESTION
from .native_model import LLAVA_FORMS, NO_FORM, native_form, native_generation, native_model, to_causal_lm
from .native_processor import family_template, native_processor, question_template
from .vllm import check_stack, named_tensors, without_images

VIDEOS = "video_preprocessor_config.json"


class Form(ABC):
    """How bundles of one kind are written for others.

    Args:
        model: The model of the bundle without PEFT's wrapper; its adapters may be in it.
        processor: Its processor.
        recipe: The bundle's recipe.

    Attributes:
        name: Model type of what is written.
        probe: The conversation that bundle and export are compared on; one that ends with the user is a prompt.
        missing: Why it cannot be exported though there is a class, or "".

    Raises:
        UserError: There is no native class that computes the same.
    """

    name: str
    probe: list[Message]
    missing = ""

    def __init__(self, model: VLM, processor: VLMProcessor, recipe: Recipe) -> None:
        self.model, self.processor, self.recipe = model, processor, recipe

    @abstractmethod
    def check_vllm(self) -> None:
        """Raises a UserError where vLLM has no class for it, or reads its prompts otherwise."""

    @abstractmethod
    def write_processor(self, out: Path) -> None:
        """Writes the processor of transformers that makes the same tokens and pixels."""

    @abstractmethod
    def native(self) -> PreTrainedModel:
        """The model as its native class, adapters merged; the weights are shared, so the bundle's model is used up."""

    def adapter_names(self) -> dict[str, str]:
        """Beginnings of names in PEFT's files → the same in the native class, where they differ."""
        return {}

    def head_stands_alone(self) -> bool:
        """Whether PEFT takes the native class's head for one of its own, though that of the bundle's model is tied."""
        return False

    def save(self, native: PreTrainedModel, out: Path, to: str) -> None:
        """Writes the weights and configurations of what `native` gave, under the names that the target reads."""
        native.save_pretrained(out)

    def finish(self, out: Path, to: str) -> None:
        """Writes what the target reads otherwise than transformers, after the comparison."""
        return


class StackForm(Form):
    """A composed stack, as the class that computes the same."""

    model: VLMForConditionalGeneration

    def __init__(self, model: VLMForConditionalGeneration, processor: VLMProcessor, recipe: Recipe) -> None:
        super().__init__(model, processor, recipe)
        self.name = native_form(model)
        # InstructBLIP's processor knows no conversations. A decoder's logits are of an answer.
        by_decoder = processor.answer_start is not None
        self.probe = QUESTION[: 1 + by_decoder] if self.name == "instructblip" else QUESTION

    def check_vllm(self) -> None:
        check_stack(self.name, self.model, self.processor)

    def write_processor(self, out: Path) -> None:
        native_processor(self.model, self.processor).save_pretrained(out)
        self.processor.image_processor.save_pretrained(out)  # what earlier releases of transformers read
        if self.name == "instructblip":  # its class has no place for a template; one is given with each question
            (out / TEMPLATE).write_text(question_template(self.processor), encoding="utf-8")

    def native(self) -> PreTrainedModel:
        return native_model(self.model, self.processor, self.recipe.generation)

    def adapter_names(self) -> dict[str, str]:
        if self.name in LLAVA_FORMS:
            return {}
        inner, head = self.model.model.language_model, self.model.lm_head
        names = {id(module): name for name, module in to_causal_lm(self.model).named_modules()}
        prefix = f"{names[id(inner)]}." if id(inner) in names else ""  # an encoder–decoder's class is its own
        return {
            "base_model.model.lm_head": f"base_model.model.language_model.{names[id(head)]}",
            "base_model.model.model.language_model.": f"base_model.model.language_model.{prefix}",
            "base_model.model.model.vision_tower.": "base_model.model.vision_model.",
            "base_model.model.model.resampler.": "base_model.model.",
        }

    def head_stands_alone(self) -> bool:
        # BLIP's classes have the head inside another model, and LLaVA's unties what it cannot find.
        return self.name not in LLAVA_FORMS or not hasattr(self.model.model.language_model, "embed_tokens")

    def save(self, native: PreTrainedModel, out: Path, to: str) -> None:
        if to != "vllm":
            super().save(native, out, to)
            return
        native.config.save_pretrained(out)
        native.generation_config.save_pretrained(out)
        save_torch_state_dict(named_tensors(native), out, max_shard_size="5GB", metadata={"format": "pt"})

    def finish(self, out: Path, to: str) -> None:
        if to == "vllm" and self.name == "blip-2":
            path = out / TEMPLATE
            path.write_text(without_images(read_text(path)), encoding="utf-8")


class FamilyForm(Form):
    """An existing VLM, as the class that it is."""

    model: FamilyModel
    processor: FamilyProcessor

    def __init__(self, model: FamilyModel, processor: FamilyProcessor, recipe: Recipe) -> None:
        super().__init__(model, processor, recipe)
        assert recipe.model is not None
        self.spec = recipe.model
        self.name, self.missing = family_name(model.config), processor.family.no_export
        self.probe = QUESTION[:1] if processor.family.prompt else QUESTION

    def check_vllm(self) -> None:
        if not self.processor.family.vllm:
            raise UserError(f"vLLM has no class for {type(self.model).__name__}; use --to transformers.")

    def write_processor(self, out: Path) -> None:
        native, spec = self.processor.native, self.spec
        native.chat_template, self.processor.tokenizer.chat_template = family_template(self.processor), None
        native.save_pretrained(out)
        self.processor.image_processor.save_pretrained(out)  # what earlier releases of transformers read
        # The settings of the base's processor of videos, where it has any, go along unread.
        for name, key in ((PROCESSOR_CONFIG, "video_processor"), (VIDEOS, None)):
            path = fetch_file(spec.pretrained, name, spec.revision, "model.pretrained", required=False)
            found = read_json(Path(path)) if path else {}
            if videos := found.get(key) if key else found:
                write_json(out / VIDEOS, videos)
                break

    def native(self) -> PreTrainedModel:
        self.model.generation_config = native_generation(self.model, self.processor, self.recipe.generation)
        return self.model.eval()

    def save(self, native: PreTrainedModel, out: Path, to: str) -> None:
        super().save(native, out, to)  # transformers gives the tensors the names that they had in the base
        spec = self.spec
        published = Checkpoint(spec.pretrained, spec.revision, "model.pretrained").files
        if to == "vllm" and (other := sorted(set(Checkpoint(str(out), None, "--out").files) - set(published))):
            raise UserError(
                f"The export {str(out)!r} was written, but {spec.pretrained!r} has no tensor named like {other[0]!r}, "
                f"so vLLM may not find it; use --to transformers, and report this."
            )


# By the piece that LoRA goes into (`Kind.base`).
FORMS: dict[str, type[Form]] = {"language_model": StackForm, "model": FamilyForm}


def form_of(model: VLM, processor: VLMProcessor, recipe: Recipe) -> Form:
    """The form for a bundle's model (without PEFT's wrapper), its processor and its recipe.

    Raises:
        UserError: It has none.
    """
    if (base := kind_of(specs_of(recipe)).base) not in FORMS:
        raise UserError("An encoder is not exported: transformers has no class for it; its bundle is what is loaded.")
    form = FORMS[base](model, processor, recipe)
    if form.missing:
        raise UserError(NO_FORM.format(form.missing))
    return form
