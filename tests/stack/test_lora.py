"""LoRA lands on the language model's linear layers and nowhere else, and what a bundle cannot keep is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from support.bundles import logits, trained
from support.tiny_pieces import make_tokenizer
from vlm_sft import load
from vlm_sft.base.errors import UserError
from vlm_sft.export.export import export
from vlm_sft.preflight.dry_run import weigh
from vlm_sft.preflight.launch import read_launch
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.stack.lora import lora_config, try_adapter


@pytest.fixture
def recipe(stack_recipe):
    return stack_recipe


def adapted(made):
    """Names of the modules that PEFT adapts for a recipe."""
    stack = build_empty_stack(made)
    model = get_peft_model(stack.model, lora_config(made, stack.model), low_cpu_mem_usage=True)
    names = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    return {n.removeprefix("base_model.model.") for n in names}


def linears(lm, layers=2):
    names = {"llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
             "opt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
             "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}[lm]  # fmt: skip
    place = {"llama": "layers", "opt": "decoder.layers", "gpt2": "h"}[lm]
    return {f"model.language_model.{place}.{i}.{name}" for i in range(layers) for name in names}


@pytest.mark.parametrize("lm", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_adapts_all_linears_of_the_language_model_and_nothing_else(lm, targets, recipe):
    lora = {"r": 2} if targets is None else {"r": 2, "target_modules": targets}
    assert adapted(recipe("clip", lm=lm, lora=lora)) == linears(lm)


def test_a_list_of_targets_is_looked_for_in_the_language_model_alone(recipe):
    """CLIP's tower has a q_proj too; BLIP-2's Q-Former a `query`."""
    found = adapted(recipe("clip", lora={"r": 2, "target_modules": ["q_proj", "mlp.up_proj"]}))
    assert found == {n for n in linears("llama") if n.endswith((".q_proj", ".up_proj"))}
    one = adapted(recipe("clip", lora={"r": 2, "target_modules": ["layers.1.self_attn.v_proj"]}))
    assert one == {"model.language_model.layers.1.self_attn.v_proj"}


def test_a_list_of_targets_goes_with_layers_to_transform(recipe):
    lora = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    assert adapted(recipe("clip", lora=lora)) == {"model.language_model.layers.1.self_attn.q_proj"}


def test_an_expression_is_passed_on_and_may_reach_the_tower(recipe):
    pattern = r".*\.q_proj"
    made = recipe("clip", lora={"r": 2, "target_modules": pattern})
    assert lora_config(made, build_empty_stack(made).model).target_modules == pattern
    found = adapted(made)
    assert sum("vision_tower" in n for n in found) == 3 and sum("language_model" in n for n in found) == 2


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            ["q_proj", "query_key_value"],
            r"'query_key_value' matches no linear layer of the language model \(down_proj, ",
        ),
        (["proj"], "'proj' matches no linear layer"),
        (["lm_head"], "'lm_head' matches no linear layer"),
        (["norm"], "'norm' matches no linear layer"),
        ([], "names no layer; the language model has down_proj, "),
        ("q_proj", "the expression 'q_proj' matches no module of the model; it must match whole names"),
        (r".*visual.*", "matches no module of the model"),
        (r".*(q_proj|lm_head)", "matches lm_head, which cannot be adapted"),
        (r"(", "is no regular expression"),
    ],
)
def test_targets_that_match_nothing_or_the_head(targets, sentence, recipe):
    made = recipe("clip", lora={"r": 2, "target_modules": targets})
    with pytest.raises(UserError, match=rf"^lora\.target_modules.*{sentence}"):
        lora_config(made, build_empty_stack(made).model)


def test_options_of_peft_pass_through(recipe):
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_dora": True, "use_rslora": True,
            "rank_pattern": {"q_proj": 2}, "init_lora_weights": "gaussian"}  # fmt: skip
    made = recipe("clip", lora=lora)
    config = lora_config(made, build_empty_stack(made).model)
    assert {name: getattr(config, name) for name in lora} == lora
    assert config.task_type == "CAUSAL_LM"
    assert lora_config(recipe("clip"), build_empty_stack(made).model) is None


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"bias": "all"}, r"lora\.bias must be none"),
        ({"modules_to_save": ["embed_tokens"]}, r"lora\.modules_to_save cannot be used"),
        ({"init_lora_weights": "pissa"}, "also changes the base weights"),
        ({"rank": 4}, r'unknown key "lora\.rank"'),
    ],
)
def test_options_that_would_be_lost_without_a_word_are_refused(option, sentence, recipe):
    def build(made):
        return lora_config(made, build_empty_stack(made).model)

    with pytest.raises(UserError, match=sentence):
        build(recipe("clip", lora={"r": 2, **option}))


def test_what_peft_refuses_is_said_of_a_model_without_weights(recipe):
    made = recipe("clip", lora={"r": 2, "layers_to_transform": [7]})
    with pytest.raises(UserError, match=r"recipe\.yaml, line \d+: PEFT cannot put `lora` into this model: .*\.$"):
        try_adapter(made, build_empty_stack(made).model)
    for lora in ({"r": 2}, {"r": 4, "init_lora_weights": "orthogonal"}, {"r": 2, "use_dora": True}):
        made = recipe("clip", lora=lora)
        assert try_adapter(made, build_empty_stack(made).model).r == lora["r"]
    assert try_adapter(recipe("clip"), build_empty_stack(made).model) is None


@pytest.mark.parametrize(("lm", "tables"), [("llama", ["language_model.embed_tokens", "lm_head"]), ("gpt2", ["wte"])])
def test_new_words_are_rows_of_the_tables_and_no_others(lm, tables, recipe):
    made = recipe("clip", lm=lm, lora={"r": 2, "add_tokens": ["<defect>", "缺陷"]})
    stack = build_empty_stack(made)
    rows = lora_config(made, stack.model).trainable_token_indices
    assert [name.endswith(end) for name, end in zip(rows, tables, strict=True)] == [True] * len(tables)
    assert all(ids == [word.id for word in stack.processor.words] for ids in rows.values())
    with pytest.raises(UserError, match=r"trainable_token_indices cannot be used.*\(new words: `lora\.add_tokens`\)"):
        lora_config(recipe("clip", lora={"r": 2, "trainable_token_indices": [5]}), stack.model)


@pytest.fixture
def mixture(stack_recipe, tmp_path):
    """A recipe on a Mixtral of four experts a layer, whose weights transformers fuses; keys of `lora` and others."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=300, num_key_value_heads=2, num_local_experts=4, initializer_range=0.3)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    make_tokenizer().save_pretrained(tmp_path / "mixtral")

    def make(lora, **changes):
        made = {"vision": {"feature_layer": -2, "feature_select": "patch"}, "projector": "mlp", **changes}
        return stack_recipe("clip", str(tmp_path / "mixtral"), chat_template="vicuna_v1", lora={"r": 2, **lora}, **made)

    return make


FUSED = ["experts.gate_up_proj", "experts.down_proj"]


def test_experts_are_adapted_where_a_key_names_them_and_not_otherwise(mixture):
    layers = {f"model.language_model.layers.{i}" for i in range(2)}
    attention = {f"{layer}.self_attn.{name}_proj" for layer in layers for name in "qkvo"}
    assert adapted(mixture({})) == attention
    experts = {f"{layer}.mlp.experts{inner}" for layer in layers for inner in ("", ".base_layer")}
    assert adapted(mixture({"target_parameters": FUSED})) == attention | experts
    one = mixture({"target_parameters": ["layers.1.mlp.experts.down_proj"], "target_modules": []})
    assert adapted(one) == {"model.language_model.layers.1.mlp.experts"}


@pytest.mark.parametrize(
    ("lora", "lm", "sentence"),
    [
        (
            {"target_parameters": ["experts.w1"]},
            None,
            r"'experts\.w1' matches no experts .*; it has experts\.down_proj,",
        ),
        ({"target_parameters": ["q_proj.weight"]}, None, "matches no experts of the language model"),
        ({"target_parameters": FUSED}, "llama", "it has none: linear layers are named in `lora.target_modules`"),
        ({"target_parameters": FUSED, "lora_dropout": 0.1}, None, "does not work with lora_dropout != 0"),
        ({"target_parameters": FUSED, "use_dora": True}, None, "does not work with"),
        ({"target_parameters": "experts.down_proj"}, None, "target_parameters"),
    ],
)
def test_experts_that_peft_cannot_adapt_are_refused_in_one_sentence(lora, lm, sentence, mixture, recipe):
    made = recipe("clip", lm=lm, lora={"r": 2, **lora}) if lm else mixture(lora)
    with pytest.raises(UserError, match=sentence) as caught:
        try_adapter(made, build_empty_stack(made).model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [{}, {"quantization": {"load_in_4bit": True}}], ids=["full", "4 bits"])
def test_a_bundle_with_lora_on_experts_reloads_and_is_weighed(bits, mixture, tmp_path):
    made = mixture({"target_parameters": FUSED}, **bits)
    model = trained(made, tmp_path / "bundle")
    moved = [
        name for name, weight in model.named_parameters() if "experts" in name and "lora_B" in name and weight.any()
    ]
    assert len(moved) == 4
    loaded, processor = load(tmp_path / "bundle")
    wanted, without = logits(model, processor), None
    assert torch.equal(logits(loaded, processor), wanted)
    with loaded.disable_adapter():
        without = logits(loaded, processor)
    assert (wanted - without).abs().max() > 1e-3
    low, high = (
        weigh(mixture({"target_parameters": FUSED}, **bits, sft={"bf16": half}), read_launch()).estimate.step.peak
        for half in (True, False)
    )
    assert 0 < low < high


@pytest.mark.parametrize("to", ["bundle-merged", "transformers"])
def test_lora_on_experts_is_merged(to, mixture, tmp_path):
    trained(mixture({"target_parameters": FUSED}), tmp_path / "bundle")
    found = export(tmp_path / "bundle", tmp_path / "out", to)
    assert found["merge_difference"] <= 1e-4 and found["max_difference"] <= 1e-4
    with pytest.raises(UserError, match=r"has LoRA on experts .*; leave --keep-adapter out"):
        export(tmp_path / "bundle", tmp_path / "kept", keep_adapter=True)


@pytest.mark.parametrize("how", ["continue", "merge"])
def test_a_stage_goes_on_from_lora_on_experts(how, mixture, tmp_path):
    lora = {"target_parameters": FUSED}
    first = trained(mixture(lora), tmp_path / "first")
    again = mixture(lora, init_from=str(tmp_path / "first"), lora_from=how)
    second = trained(again, tmp_path / "second", moves=how == "merge")
    loaded, processor = load(tmp_path / "second")
    assert torch.equal(logits(loaded, processor), logits(second, processor))
    assert torch.allclose(logits(second, processor), logits(first, processor), atol=1e-4) == (how == "continue")
