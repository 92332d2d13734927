"""Which published model answers questions, by its files."""

from __future__ import annotations

from ..systems.vle import VLEConfig
from .encoder import Encoder, piece_of, told
from .mplug import load_mplug
from .vle import load_vle


def load_answerer(
    pretrained: str, tokenizer: str | None = None, key: str = "MODEL", device: str | None = None
) -> Encoder:
    """Loads a VLE or an mPLUG that answers questions.

    Args:
        pretrained: Folder, Hub id or, of an mPLUG, weight file.
        tokenizer: Folder or Hub id of an mPLUG's tokenizer, where it brings none.
        key: What messages call the checkpoint.
        device: Where it runs; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: It cannot be had, or is neither.
    """
    piece = piece_of(pretrained, None, key)
    if told(piece).get("model_type") == VLEConfig.model_type:
        return load_vle(pretrained, "vqa", key=key, device=device)
    return load_mplug(piece, tokenizer, device)
