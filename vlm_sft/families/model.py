"""Existing VLMs of transformers, as the trainer needs them: the same loss and the same care for every gradient.

The class that is made is a subclass of the model's own and has its name, its parameters' names and its `generate`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..base.errors import UserError
from ..base.names import Inputs, Options
from ..model.freeze import PART_NAMES, is_quantised_weight, part_modules, part_of, unwrapped
from ..model.losses import Head, VLMOutput, add_balance, mean_loss, router_flag
from ..model.positions import ExactRotations, packed_positions, row_numbers, shared_mask
from ..model.sharding import is_sharded, others_wait_for

# What of the image path's output goes to the language model; Fuyu's has only a last hidden state.
IMAGE_OUTPUTS = ("pooler_output", "deepstack_features", "visual_indicator_features")


class FamilyModel(ExactRotations, PreTrainedModel):
    """What is put over the class of an existing VLM.

    Attributes:
        plain_head: See `Family.plain_head`.
        one_by_one: See `Family.one_by_one`.
        followers: Ends of the names of buffers that are kept in the type of the weights of their part.
        blank: What the image path is run on, with weight zero, where a batch has no image: a blank image's inputs.
    """

    blank: dict[str, torch.Tensor]
    followers: tuple[str, ...] = ("running_mean", "running_var")  # of norms over a batch, in towers of timm
    plain_head: bool = False
    one_by_one: bool = False
    _parts: dict[str, str] | None = None  # what `_part` found, by the first names of parameters
    # Some models say False of their own loss; transformers would give ours no token count then, and a step would be the
    # mean of its micro-batches' means.
    accepts_loss_kwargs = True

    def supervised_forward(
        self,
        labels: torch.Tensor,
        loss_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_positions: torch.Tensor | None = None,
        image_token_count: int | None = None,
        row_lengths: torch.Tensor | None = None,
        row_heads: torch.Tensor | None = None,
        **inputs: Any,
    ) -> VLMOutput:
        """Scores only the positions with a label, a chunk at a time; see `VLMForConditionalGeneration.forward`.

        Args:
            labels: (B, S), -100 where nothing is learned; position s is scored by the output at s - 1.
            loss_weights: (B, S) factors on the loss of each label; default 1.
            num_items_in_batch: What the summed loss is divided by; default the number of labels here.
            label_positions: `supervised_positions` of the labels, where the batch brings them.
            image_token_count: Left unused: these models compare image tokens and features by themselves.
            row_lengths: (B, R) in place of a mask, where rows are packed; see `positions.packed_positions`.
            row_heads: (B, R) likewise, where rows share the prefix that has their image.
            **inputs: What the model's own forward takes.
        """
        mask = inputs.get("attention_mask")
        if row_lengths is not None:
            inputs |= self.kept_apart(inputs, row_lengths, row_heads)
        found = self.base_output(**inputs, **router_flag(self.base_model, self.training))
        hidden = found.last_hidden_state
        head = Head(self.get_output_embeddings(), self.config.get_text_config(), self.plain_head)
        loss, losses, hits = mean_loss(head, hidden, labels, loss_weights, num_items_in_batch, label_positions)
        output = VLMOutput(loss=loss, token_losses=losses, token_hits=hits)
        given = {"row_lengths": row_lengths}
        add_balance(output, self.base_model, found, mask, given, losses, num_items_in_batch)
        return output

    def kept_apart(
        self, inputs: dict[str, torch.Tensor], row_lengths: torch.Tensor, row_heads: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What the model is given so that no packed row sees another: positions, of which these models make their mask.

        (B, S), anew with each row; (4, B, S) where a place in a picture is a position too (M-RoPE): the first says
        which tokens are of a row, the other three are what the model's own class gives each row when it stands alone.
        Rows behind a shared prefix need a mask that is ready.
        """
        ids = inputs["input_ids"]
        plain = packed_positions(row_lengths, ids.shape[1], row_heads)
        found = {} if row_heads is None else {"attention_mask": self._shared_mask(inputs, row_lengths, row_heads)}
        if not hasattr(self.base_model, "get_rope_index"):
            return {**found, "position_ids": plain}
        return {**found, "position_ids": self._rotary_places(inputs, row_lengths, row_heads, plain)}

    def _shared_mask(
        self, inputs: dict[str, torch.Tensor], row_lengths: torch.Tensor, row_heads: torch.Tensor
    ) -> torch.Tensor:
        """See `positions.shared_mask`; tokens of an image see each other where `token_type_ids` mark them (Gemma 3)."""
        table, blocks = self.get_input_embeddings().weight, None
        if (types := inputs.get("token_type_ids")) is not None:
            starts = (types == 1) & (F.pad(types, (1, 0))[:, :-1] != 1)
            blocks = torch.where(types == 1, starts.cumsum(1), -1)
        embeds = torch.empty(*inputs["input_ids"].shape, 1, dtype=table.dtype, device=table.device)
        return shared_mask(self.config.get_text_config(), embeds, row_lengths, row_heads, blocks)

    def _rotary_places(
        self,
        inputs: dict[str, torch.Tensor],
        row_lengths: torch.Tensor,
        row_heads: torch.Tensor | None,
        plain: torch.Tensor,
    ) -> torch.Tensor:
        """(4, B, S), see `kept_apart`; what goes on from a shared prefix is text, which counts on from its end."""
        ids = inputs["input_ids"]
        # Rows that share a prefix are one sequence to the model's own class, in which text counts on from row to row.
        if row_heads is not None:
            row_lengths = torch.zeros_like(row_lengths).scatter_add(1, row_heads, row_lengths)
        too_far = packed_positions(row_lengths, ids.shape[1]) - plain
        apart = row_lengths[row_lengths > 0].tolist()
        real = row_numbers(row_lengths, ids.shape[1]) < row_lengths.shape[1]
        types = inputs["mm_token_type_ids"]
        alone, kinds = (pad_sequence(each[real].split(apart), batch_first=True) for each in (ids, types))
        mask = pad_sequence([torch.ones_like(alone[0, :length]) for length in apart], batch_first=True)
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        found, _ = self.base_model.get_rope_index(alone, mm_token_type_ids=kinds, attention_mask=mask, **grids)
        places = plain.repeat(4, 1, 1)
        places[1:, real] = found[:, mask.bool()].to(plain) - too_far[real]
        return places

    def complete(self, inputs: Inputs) -> Inputs:
        """What the model's own forward takes, with what it needs for a batch of text alone."""
        return inputs

    def generation_inputs(self, batch: dict[str, torch.Tensor], beams: int) -> dict[str, torch.Tensor]:
        """What `generate` takes for a batch of prompts: as the model's own class does, ids and images.

        Raises:
            UserError: Beams and images come together: transformers repeats the images of a batch one by one for the
                beams, not row by row.
        """
        if beams > 1 and batch.get("pixel_values") is not None:
            raise UserError(
                "num_beams must be 1 with images in an existing model: transformers mixes up images and beams."
            )
        return batch

    def base_output(self, **inputs: Any) -> Any:
        """What the model makes without its head; its `last_hidden_state`, (B, S, D), is what the head reads."""
        path = [p for name, p in self.named_parameters() if part_of(name) != "language_model"]
        if self.one_by_one and is_sharded(path):
            raise UserError(
                "The weights of this model cannot be split among processes: its own class calls its projector for each "
                "image by itself, and a process with more images would wait for ever; use DDP, or DeepSpeed's stage 2."
            )
        if inputs.get("pixel_values") is not None or not others_wait_for(path, self.training):
            return self.base_model(**inputs)
        # Where and when the image features would come in: processes that share weights must ask for the same ones in
        # the same order, on the way back too, which a frozen language model has only behind what is trained.
        hook = self.get_submodule(self._part("language_model")).register_forward_pre_hook(
            self._add_idle, with_kwargs=True
        )
        try:
            return self.base_model(**inputs)
        finally:
            hook.remove()

    def _add_idle(self, module: nn.Module, args: tuple[Any, ...], kwargs: Options) -> Any:
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds + self.idle_image_path().to(embeds.dtype)}

    def image_path(self) -> tuple[nn.Module, str]:
        """A module and the name of its method that makes features of what the processor makes of images."""
        return self.base_model, "get_image_features"

    def idle_image_path(self) -> torch.Tensor:
        """Zero, as a function of every parameter of the image path."""
        output = self.base_model.get_image_features(**self._blank_inputs())
        features = [output.get(name) for name in IMAGE_OUTPUTS if output.get(name) is not None]
        zero = torch.zeros((), device=self.device)
        return sum((tensor.float().sum() for tensor in _tensors(features or output.last_hidden_state)), zero) * 0.0

    def _blank_inputs(self) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.blank.items()}

    def train(self, mode: bool = True) -> FamilyModel:
        """Training mode for what is trained; a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        if name := self._part("vision_tower"):
            tower = self.get_submodule(name)
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def enable_input_require_grads(self) -> None:
        """As transformers has it for checkpoints with LoRA, but not within a tower of which nothing is trained.

        Towers that name their embeddings (CLIP, Qwen2.5-VL) would keep all that they compute, for gradients that nobody
        asks for, and go back through all of it.
        """
        super().enable_input_require_grads()
        if not (name := self._part("vision_tower")):
            return
        tower, made = self.get_submodule(name), {hook.id for hook in self._require_grads_hooks}

        def as_trained(module: nn.Module, args: object, output: torch.Tensor) -> None:
            if output.is_leaf and not any(p.requires_grad for p in tower.parameters()):
                output.requires_grad_(False)

        for module in tower.modules():
            if made & set(module._forward_hooks):
                self._require_grads_hooks.append(module.register_forward_hook(as_trained))

    def _part(self, part: str) -> str:
        """Name of the module of a part, "" for none.

        The trainer asks in every micro-batch; looking for it among all modules takes longer than all the rest. The name
        is kept, not the module, which may be replaced.
        """
        if self._parts is None:
            self._parts = {found: name for found, (name, _) in part_modules(self).items()}
        return self._parts.get(part, "")


def set_dtypes(model: FamilyModel, trained: Collection[str], dtype: torch.dtype) -> None:
    """Keeps parts that are trained whole in fp32 and the others in a type, and casts what enters a part to its type.

    Outside autocast nothing else would let parts of different types follow each other.
    """
    cast_parts(model, trained, dtype)
    for name, module in model.named_modules():
        if PART_NAMES.get(unwrapped(name)) in ("vision_tower", "projector"):
            # Of a list of projectors (Qwen3-VL), each is called by itself.
            for each in module if isinstance(module, nn.ModuleList) else [module]:
                each.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def cast_parts(model: FamilyModel, trained: Collection[str], dtype: torch.dtype) -> None:
    """Puts parts that are trained whole into fp32 and the others into a type; quantised weights stay."""
    for name, parameter in model.named_parameters():
        if is_quantised_weight(parameter):
            continue
        parameter.data = parameter.data.to(torch.float32 if part_of(name) in trained else dtype)
    for name, buffer in model.named_buffers():
        if name.endswith(model.followers):
            buffer.data = buffer.data.to(torch.float32 if part_of(name) in trained else dtype)


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Options) -> tuple[Any, Options]:
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def cast(value: object) -> Any:
        if isinstance(value, list):  # the features of several layers
            return [cast(each) for each in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


def _tensors(output: object) -> list[torch.Tensor]:
    """Every tensor that needs a gradient in what a model returns."""
    if isinstance(output, torch.Tensor):
        return [output] if output.requires_grad else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]
