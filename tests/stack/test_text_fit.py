"""A language model that cannot do what a stack asks of it is refused in one sentence, before its weights are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BigBirdConfig,
    BioGptConfig,
    CamembertConfig,
    CodeGenConfig,
    ElectraConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    ReformerConfig,
    RemBertConfig,
    RobertaConfig,
    RwkvConfig,
    XGLMConfig,
)

from vlm_sft.base.console import make_console
from vlm_sft.base.errors import UserError
from vlm_sft.preflight.dry_run import dry_run
from vlm_sft.preflight.launch import read_launch
from vlm_sft.preflight.preflight import preflight
from vlm_sft.stack.fit import check_language_model, check_texts, count_positions
from vlm_sft.stack.kinds import compose
from vlm_sft.train import train

TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TABLES = [
    (GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=12), 12),
    (OPTConfig(**TINY, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=12), 12),
    (BioGptConfig(**TINY, intermediate_size=16, max_position_embeddings=12), 12),
    (RobertaConfig(**TINY, intermediate_size=16, max_position_embeddings=14, is_decoder=True), 12),
    (GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=12), 12),
    (CodeGenConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=4, rotary_dim=4, n_positions=12), 12),
    (LlamaConfig(**TINY, intermediate_size=16, max_position_embeddings=12), None),
    (XGLMConfig(vocab_size=64, d_model=16, num_layers=1, attention_heads=2, ffn_dim=16, max_position_embeddings=12),
     None),
]  # fmt: skip


@pytest.mark.parametrize(("config", "rows"), TABLES, ids=[config.model_type for config, _ in TABLES])
def test_the_table_of_positions_has_as_many_rows_as_a_forward_takes_tokens(config, rows):
    assert count_positions(config) == rows
    model = AutoModelForCausalLM.from_config(config).eval()
    longest = torch.full((1, rows or 40), 5)
    with torch.inference_mode():
        assert model(longest).logits.isfinite().all()
        if rows is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, rows + 1), 5))


WAYS = {
    "train": train,
    "preflight": lambda recipe: preflight(
        recipe, read_launch(None), make_console(), output=Path(recipe.sft["output_dir"]).parent / "page.html"
    ),
    "dry run": lambda recipe: dry_run(recipe, read_launch(None), make_console()),
}


@pytest.fixture
def without_weights(more_pieces, tmp_path, monkeypatch):
    """Copies of the pieces whose weight files cannot be read."""

    def copy(name: str) -> str:
        folder = tmp_path / name
        shutil.copytree(more_pieces[name], folder)
        (folder / "model.safetensors").write_bytes(b"no weights")
        return str(folder)

    return copy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "rows"), [("opt", 512), ("gpt2", 1024)])
@pytest.mark.parametrize("asked", [4096, None])
def test_rows_longer_than_the_table_of_positions_are_refused_before_weights(
    way, name, rows, asked, stack_recipe, without_weights, tmp_path
):
    sft = {"max_length": asked, "output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": "none"}
    recipe = stack_recipe(without_weights("clip"), without_weights(name), sft=sft)
    with pytest.raises(UserError, match=rf"a table of {rows} positions.*set sft\.max_length={rows}") as error:
        WAYS[way](recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_an_end_of_answers_that_the_tokenizer_cuts_is_refused_before_weights(
    way, stack_recipe, without_weights, tmp_path
):
    sft = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": "none"}
    recipe = stack_recipe(without_weights("clip"), without_weights("llama"), chat_template="chatml", sft=sft)
    with pytest.raises(
        UserError, match=r"answers end with '<\|im_end\|>', which the tokenizer .* cuts into \d+ tokens"
    ):
        WAYS[way](recipe)


ENDS = {"ziya": True, "plain": True, "minigpt4": True, "vicuna_v1": True, "llava_llama_2": True, "gemma3": False,
        "internvl": False, "smolvlm": False}  # fmt: skip


@pytest.mark.parametrize(("template", "fits"), ENDS.items())
def test_templates_that_end_in_plain_text_or_in_a_token_of_the_tokenizer_are_taken(template, fits, stack_recipe):
    composed = compose(stack_recipe("clip", "llama", chat_template=template))
    if fits:
        check_texts(composed.config, composed.processor, 512)
    else:
        with pytest.raises(UserError, match="chat_template: its answers end with"):
            check_texts(composed.config, composed.processor, 512)


def test_a_tokenizer_that_has_the_end_token_is_taken_and_one_that_calls_it_unknown_is_not(stack_recipe, more_pieces):
    composed = compose(stack_recipe("clip", "llama", chat_template="chatml"))
    composed.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    check_texts(composed.config, composed.processor, 512)

    class Unknowing(type(composed.processor.tokenizer)):
        def __call__(self, text, **kwargs):
            return {"input_ids": [self.unk_token_id]}

    tokenizer = AutoTokenizer.from_pretrained(more_pieces["llama"])
    tokenizer.__class__ = Unknowing
    composed.processor.tokenizer = tokenizer
    with pytest.raises(UserError, match=r"'<\|im_end\|>', which the tokenizer of this language model does not know"):
        check_texts(composed.config, composed.processor, 512)


REFUSED = {
    "mamba": (MambaConfig(vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=1), "a cache of keys"),
    "rwkv": (RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1), "a cache of keys"),
    "bart": (BartConfig(vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1), "embeddings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_language_model_that_does_not_attend_to_embeddings_is_refused(name, stack_recipe, more_pieces, tmp_path):
    config, lacks = REFUSED[name]
    folder = tmp_path / name
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(more_pieces["llama"], file), folder / file)
    with pytest.raises(UserError, match=rf"language_model.*a '{name}' language model reads no {lacks}"):
        compose(stack_recipe("clip", str(folder)))


BERTS = [BertConfig, BigBirdConfig, ElectraConfig, RemBertConfig, RobertaConfig, CamembertConfig]


@pytest.mark.parametrize("kind", BERTS, ids=[kind.model_type for kind in BERTS])
def test_a_model_whose_tokens_see_those_that_follow_is_refused_unless_it_is_a_decoder(kind):
    sizes = {**TINY, "hidden_size": 32, "intermediate_size": 16}
    with pytest.raises(UserError, match=rf'^stack\.lm: .*{kind.model_type}.* copy its answer; set "is_decoder": true'):
        check_language_model(kind(**sizes), "stack.lm")
    check_language_model(kind(**sizes, is_decoder=True), "stack.lm")
    torch.manual_seed(0)
    ids, blind = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    model = AutoModelForCausalLM.from_config(kind(**sizes, is_decoder=True)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits[:, :3], model(blind).logits[:, :3])


def test_a_configuration_that_makes_no_model_is_one_sentence():
    with pytest.raises(UserError, match=r"transformers makes no 'reformer' model of this config.json: If you"):
        check_language_model(ReformerConfig(), "stack.lm")


def test_the_usual_language_models_are_taken():
    for config, _ in TABLES:
        check_language_model(config, "stack.language_model.pretrained")
