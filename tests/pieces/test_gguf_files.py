"""A GGUF file is a language model like any other, and one that is broken or strange ends in one sentence."""

from __future__ import annotations

import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from support.bundles import LLAVA, logits, trained
from support.gguf_writer import TEMPLATE, write_gguf
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.limits import limits
from vlm_sft.export.export import export
from vlm_sft.pieces.checkpoints import Checkpoint
from vlm_sft.pieces.gguf_files import GgufFile
from vlm_sft.stack.build_stack import build_stack

TEXTS = ["What is this? a red 3", "左上角是红色的3", "<s>USER: x</s> ", "  two  spaces"]


@pytest.fixture(scope="module")
def llm(pieces, tmp_path_factory):
    """A tiny LLaMA as a GGUF file of 8 bits."""
    return write_gguf(pieces["llama"], tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def recipe(bundle_recipe):
    def make(file, **changes):
        return bundle_recipe(tower="clip", resampler=None, lm=str(file), projector={"type": "mlp"}, **changes)

    return make


def test_weights_config_tokenizer_and_template_are_those_that_transformers_reads(llm, recipe):
    said: list[str] = []
    stack = build_stack(recipe(llm), said.append)
    theirs = AutoModelForCausalLM.from_pretrained(llm.parent, gguf_file=llm.name, dtype=torch.float32).eval()
    ours = stack.model.model.language_model
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == {
        name.removeprefix("model."): tuple(t.shape) for name, t in theirs.state_dict().items() if "lm_head" not in name
    }
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[f"model.{name}"]), name
    tokenizer = AutoTokenizer.from_pretrained(llm.parent, gguf_file=llm.name)
    for text in TEXTS:
        assert stack.processor.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    (sentence,) = [each for each in said if "GGUF" in each]
    assert str(llm) in sentence and "Q8_0" in sentence and "dequantised" in sentence


def test_weights_are_the_folders_up_to_the_rounding_of_the_file(pieces, recipe, tmp_path):
    file = write_gguf(pieces["llama"], tmp_path / "full.gguf", "F32")
    full, folder = (build_stack(recipe(lm)).model.model.language_model.state_dict() for lm in (file, "llama"))
    for name, tensor in folder.items():
        exact = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.F16).astype(np.float32)
        assert torch.equal(full[name], tensor) or torch.equal(full[name], torch.from_numpy(exact)), name


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_positions_of_llama_3_come_back_out_of_their_factors(factor, pieces, recipe, tmp_path):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500_000.0}  # fmt: skip
    config = AutoConfig.from_pretrained(pieces["llama"])
    config.rope_parameters = dict(rope)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = 1 / 500_000.0 ** (torch.arange(0, 8, 2) / 8)
    factors = {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    file = write_gguf(pieces["llama"], tmp_path / "llama3.gguf", extra=factors, theta=500_000.0)
    text = build_stack(recipe(file)).model.config.text_config
    assert text.rope_parameters.pop("rope_type") == rope.pop("rope_type")
    assert {name: text.rope_parameters[name] for name in rope} == pytest.approx(rope)


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["projector", "LoRA"])
def test_a_bundle_names_the_file_and_its_fingerprint_and_gives_the_same_logits(lora, llm, recipe, tmp_path):
    file = shutil.copy(llm, tmp_path / "tiny.gguf")
    model = trained(recipe(file, **({"lora": lora} if lora else {})), tmp_path / "bundle")
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(model, processor))
    write_gguf(recipe("llama").stack.language_model.pretrained, tmp_path / "tiny.gguf", "Q4_0")
    with pytest.raises(UserError, match=r"trained on the language_model of .*tiny\.gguf.*fingerprint"):
        load(tmp_path / "bundle")


@pytest.mark.slow
def test_an_export_needs_the_file_no_more(llm, bundle_recipe, tmp_path):
    file = shutil.copy(llm, tmp_path / "tiny.gguf")
    trained(bundle_recipe(**{**LLAVA, "lm": str(file)}), tmp_path / "bundle")
    found = export(tmp_path / "bundle", tmp_path / "native", "transformers")
    assert found["max_difference"] <= 1e-5
    file.unlink()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "native").config.text_config.model_type == "llama"


def test_a_gguf_file_is_quantised_anew_where_the_recipe_says_so(llm, recipe):
    stack = build_stack(recipe(llm, quantization={"load_in_4bit": True}, lora={"r": 2}))
    kinds = {type(module).__name__ for module in stack.model.model.language_model.modules()}
    assert "Linear4bit" in kinds and type(stack.model.lm_head).__name__ == "Linear"


def test_files_that_differ_in_one_block_have_other_fingerprints(llm, pieces, tmp_path):
    other = write_gguf(pieces["llama"], tmp_path / "other.gguf", "Q4_0")
    copy = tmp_path / "copy"  # as Ollama keeps them: told by its first bytes
    shutil.copy(llm, copy)
    assert Checkpoint(str(llm)).fingerprint() == Checkpoint(str(copy)).fingerprint()
    assert Checkpoint(str(llm)).fingerprint() != Checkpoint(str(other)).fingerprint()
    assert Checkpoint(str(llm)).size == llm.stat().st_size


EMBEDDING, TOKENS, TYPES = b"token_embd.weight", b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"


def put(form: str, value: int, place: int, name: bytes = b""):
    """Writes a number so many bytes after a name; its last mention, because tensors follow their settings."""

    def change(raw: bytes) -> bytes:
        start = place + (raw.rindex(name) + len(name) if name else 0)
        return raw[:start] + struct.pack(form, value) + raw[start + struct.calcsize(form) :]

    return change


def cut(at: int, name: bytes = b""):
    return lambda raw: raw[: at + (raw.rindex(name) + len(name) if name else 0)]


def gguf_list(kind: int, count: int, each: bytes) -> bytes:
    """A file with one list, of which everything is there that it announces."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<IIQ", 9, kind, count) + each * count


BROKEN = {
    **{f"cut at {at}": cut(at) for at in (0, 3, 4, 10, 24, 100, -1, -5000)},
    "cut in its tokens": cut(50, TOKENS),
    "cut in its tensors": cut(8, EMBEDDING),
    "other magic": lambda raw: b"GGML" + raw[4:],
    "version 1": put("<I", 1, 4),
    "other order of bytes": put(">I", 3, 4),
    "more tensors": put("<Q", 2**60, 8),
    "more entries": put("<Q", 2**60, 16),
    "endless key": put("<Q", 2**63, 24),
    "endless list of texts": put("<Q", 2**60, 8, TOKENS),
    "list of more than any model has": lambda raw: gguf_list(8, limits().vocabulary + 1, bytes(8)),
    "token of more than any has": lambda raw: gguf_list(8, 1, struct.pack("<Q", 20_001) + b"x" * 20_001),
    "list of more numbers than any model has": lambda raw: gguf_list(0, limits().vocabulary + 1, b"\0"),
    "more entries than any model has": lambda raw: gguf_list(0, 1, b"\0")[:16] + struct.pack("<Q", 10**6),
    "endless list of numbers": put("<Q", 2**60, 8, TYPES),
    "list of lists": put("<I", 9, 4, TOKENS),
    "value of no kind": put("<I", 77, 0, TOKENS),
    "tensor of many axes": put("<I", 2**31, 0, EMBEDDING),
    "endless tensor": put("<Q", 2**62, 4, EMBEDDING),
    "row that no block divides": put("<Q", 33, 4, EMBEDDING),
    "tensor of no kind": put("<I", 999, 20, EMBEDDING),
    "tensor elsewhere": put("<Q", 2**62, 24, EMBEDDING),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_ends_in_one_sentence(case, llm, recipe, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(BROKEN[case](llm.read_bytes()))
    with pytest.raises(UserError) as refused:
        build_stack(recipe(tmp_path / "broken.gguf"))
    sentence = str(refused.value)
    assert sentence.startswith("stack.language_model.pretrained: ") and "\n" not in sentence, sentence
    assert "no whole GGUF file" in sentence and sentence.endswith("fetch it again."), sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "clip"}, "architecture clip is not supported"),
        ({"architecture": "二"}, "not supported"),
        ({"block_count": 3}, "lacks"),
        ({"embedding_length": 64}, "shape"),
        ({"block_count": 10**6}, "1,000,000"),
        ({"vocab_size": 10**9}, "1,000,000,000"),
        ({"attention__head_count": 0}, "stack.language_model"),
        ({"extra": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}}, "rope_freqs.weight"),
        ({"rope__scaling__type": "yarn"}, "scales its positions .yarn"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "blk.0.attn_sinks.weight"),
    ],
)
def test_a_strange_file_ends_in_one_sentence(changes, said, pieces, recipe, tmp_path):
    file = write_gguf(pieces["llama"], tmp_path / "strange.gguf", **changes)
    with pytest.raises(UserError, match=said) as refused:
        build_stack(recipe(file))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["tower", "resampler", "projector"])
def test_only_a_language_model_is_read_from_a_gguf_file(part, llm, bundle_recipe):
    parts = {"tower": "clip", "resampler": "blip2", part: str(llm)}
    if part == "projector":
        parts = {"tower": "clip", "resampler": None, "projector": {"type": "mlp", "pretrained": str(llm)}}
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        build_stack(bundle_recipe(**parts))


def test_nothing_beside_the_file_is_read(llm, recipe, tmp_path):
    file = tmp_path / "tiny.gguf"
    shutil.copy(llm, file)
    plain = build_stack(recipe(file))
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "adapter_config.json",
        "chat_template.jinja",
    ):
        (tmp_path / name).write_text('{"model_type": "opt", "auto_map": {"AutoTokenizer": ["x.X", "x.X"]}}')
    again = build_stack(load_recipe(tmp_path / "recipe.yaml"))
    assert again.pieces == plain.pieces
    assert again.processor.tokenizer.get_vocab() == plain.processor.tokenizer.get_vocab()


def test_tensors_are_read_by_rows(llm):
    with GgufFile(str(llm), "x") as file:
        whole = file.get_tensor("token_embd.weight")
        assert whole.shape == (300, 32) and torch.equal(file.get_slice("token_embd.weight")[:1], whole[:1])
        assert file.get_tensor("output_norm.weight").shape == (32,)
