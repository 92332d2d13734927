"""The process in which llama.cpp's converter reads a language model's folder and writes a GGUF file.

`python -m vlm_sft.llama_cpp.convert FOLDER OUT TYPE NAME` writes the language model and prints `{}`; with `--mmproj`
behind it, what an existing VLM has before its language model.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..base.console import tell
from ..base.errors import UserError, exit_on_user_error, one_line
from ..base.whole_files import read_text
from .packages import converter

# How the converter knows a byte-level BPE's cut into words is a table of published tokenizers. One that is not in it
# (trained here, say) is known by the rule itself: in a tokenizer.json, the expression that it splits by → llama.cpp's
# name of the same rule. "" is that of GPT-2, which `ByteLevel` has built in.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = _WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+") + _REST.replace(r"\p{L}", r"\p{L}\p{M}")
RULES = {
    "": "gpt-2",
    _MARKS: "qwen35",
    _WORDS + "{1,3}" + _REST: "llama-bpe",
    _WORDS + _REST: "qwen2",
    "digits": "smollm",
}


def rule_of(folder: Path) -> str | None:
    """llama.cpp's name of the rule by which a tokenizer cuts a text into words, by its `tokenizer.json`."""
    found = json.loads(read_text(folder / "tokenizer.json")).get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return RULES[""]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return RULES["digits"]
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return RULES.get(steps[0].get("pattern", {}).get("Regex"))
    return None


def load() -> Any:
    """The converter's script, with the rules above where it knows no name for a tokenizer."""
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "gguf"]:
        del sys.modules[loaded]  # the converter has its own beside it, which knows more
    root = converter()
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    script, base = importlib.import_module("convert_hf_to_gguf"), importlib.import_module("conversion.base")
    known = base.TextModel.get_vocab_base_pre

    def name(self: Any, tokenizer: PreTrainedTokenizerBase) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if (rule := rule_of(self.dir_model)) is None:
                raise UserError("llama.cpp has no name for the rule by which this tokenizer cuts words") from None
            return rule

    base.TextModel.get_vocab_base_pre = name
    base.ModelBase.no_mtp = True  # transformers' classes have no heads that guess further tokens
    return script


def main(folder: str, out: str, kind: str, name: str, *more: str) -> None:
    """Writes the file; see above."""
    script = load()
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind, "--model-name", name, *more]
    try:
        script.main()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(one_line(error) or type(error).__name__) from None
    tell("{}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
