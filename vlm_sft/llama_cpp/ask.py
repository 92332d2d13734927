"""The process in which llama.cpp answers: its own server, asked once, with the template that the file has.

`python -m vlm_sft.llama_cpp.ask MODEL MMPROJ REQUEST` sends the conversation of a JSON file (OpenAI's, as
`handle_chat_completions` takes it), greedily, and prints `text`, the answer, `prompt`, how many tokens were read,
`ids`, the tokens of the answer, `at`, at which of these it said more, and `top`, what it said there: the most probable
tokens with their log-probabilities. It says nothing at a token that ends within a character.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..base.console import tell
from ..base.errors import UserError, exit_on_user_error
from ..base.names import Json
from ..base.whole_files import read_text

CONTEXT = 4096


def ask(model: str, mmproj: str, request: Json) -> Json:
    """Asks llama.cpp; see above.

    Raises:
        UserError: It refuses the conversation, or cannot load the files.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = model, mmproj
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = CONTEXT, CONTEXT, CONTEXT, 1
    # It tells the tokens of an answer from this verbosity on.
    params.warmup, params.verbosity, params.cache_ram_mib, params.n_gpu_layers = False, 10, 0, 0
    params.mmproj_use_gpu, params.use_jinja = False, True
    # What is compared is the file: by default keys and values are held, and attention is computed, in 16 bits.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        said = xllamacpp.Server(params).handle_chat_completions(
            {**request, "temperature": 0, "logprobs": True, "return_tokens": True, "cache_prompt": False}
        )
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if "error" in said:
        raise UserError(str(said["error"].get("message", said["error"])))
    choice, ids = said["choices"][0], said["__verbose"]["tokens"]
    steps = choice["logprobs"]["content"]
    return {
        "text": choice["message"]["content"],
        "prompt": said["usage"]["prompt_tokens"],
        "ids": ids,
        "at": places(ids, [step["id"] for step in steps]),
        "top": [[(each["id"], each["logprob"]) for each in step["top_logprobs"]] for step in steps],
    }


def places(ids: Sequence[int], said: Sequence[int]) -> list[int]:
    """Where each of `said` stands among `ids`, of which it leaves some out: as far to the right as it can."""
    found, place = [], len(ids)
    for token in reversed(said):
        place = max(number for number in range(place) if ids[number] == token)
        found.append(place)
    return found[::-1]


if __name__ == "__main__":
    with exit_on_user_error():
        tell(json.dumps(ask(sys.argv[1], sys.argv[2], json.loads(read_text(Path(sys.argv[3]))))))
