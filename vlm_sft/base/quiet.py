"""Silences what libraries say that a user of ours can do nothing about; called by the commands, never on import."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Leaves out notes and deprecations of the libraries and their progress bars; errors stay.

    To be called before the first heavy import: bitsandbytes speaks while it is imported.
    """
    # It says that a faster 4-bit kernel exists elsewhere, also where nothing is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Data-loader workers are forked after the rows were tokenised, and each would warn of that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What is deprecated is how the libraries call each other; a recipe's own keys are checked when it is read.
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*was renamed")
    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true but no accelerator")

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
