"""A GGUF file as llama.cpp's converter writes one of a LLaMA in transformers' folder."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def write_gguf(
    folder: str, path: Path, kind: str = "Q8_0", *, architecture: str = "llama", extra=None, theta=10_000.0, **settings
):
    """Writes tensors, settings, tokenizer and chat template of a LLaMA; returns the path.

    Args:
        folder: Where `config.json`, `model.safetensors` and `tokenizer.json` are.
        path: The file to write.
        kind: How matrices are written whose rows its blocks divide; others are F16, vectors F32.
        architecture: What the file calls itself.
        extra: More tensors, by llama.cpp's names.
        theta: Base of the positions' frequencies.
        **settings: Settings to write in place of the model's own, with `__` for `.`.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(str(path), architecture)
    values = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention__head_count": heads, "attention__head_count_kv": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"], "rope__dimension_count": config["hidden_size"] // heads,
    }  # fmt: skip
    for name, value in {**values, **settings}.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{name.replace('__', '.')}", value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    _write_tokenizer(writer, json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8")))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = {
        names.get_name(n, (".weight",)): t.float().numpy() for n, t in load_file(f"{folder}/model.safetensors").items()
    }
    for name, tensor in {**tensors, **(extra or {})}.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # llama.cpp turns pairs that lie side by side
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        as_it_is = gguf.GGMLQuantizationType.F32 if tensor.ndim < 2 else gguf.GGMLQuantizationType.F16
        wanted = gguf.GGMLQuantizationType[kind]
        fits = tensor.ndim > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        written = wanted if fits else as_it_is
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), written), raw_dtype=written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {each["content"] for each in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
