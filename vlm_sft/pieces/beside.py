"""What lies beside the weights of a checkpoint and is obeyed too: its settings for generating."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..base.errors import UserError
from ..recipe.library_names import GENERATION, UNSAID
from ..recipe.passed_on import flaw

# Of a `generation_config.json`: what transformers writes there itself, and what runs code or compiles.
_WRITTEN = ("_from_model_config", "transformers_version", "_original_object_hash", "_commit_hash")
_NEUTRAL = (*UNSAID, 0, 1)


def keep_plain_generation(model: PreTrainedModel, where: str) -> None:
    """Leaves of a checkpoint's `generation_config.json` what a recipe may say; the rest is not handed on.

    Published files hold settings of their models' own code, which is not run here.

    Raises:
        UserError: A setting asks transformers for code, or has a value that it cannot have.
    """
    config = getattr(model, "generation_config", None)
    for name, value in list(vars(config).items()) if config is not None else []:
        if name in _WRITTEN or value is None:
            continue
        if name not in GENERATION.names:
            delattr(config, name)
        elif name in GENERATION.never and (value in _NEUTRAL or "code" not in GENERATION.never[name]):
            setattr(config, name, None)
        elif sentence := flaw(GENERATION, name, value):
            raise UserError(f"{where}: its generation_config.json is refused: {sentence}")
