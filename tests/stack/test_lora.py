"""LoRA lands on the language model's linear layers and nowhere else, and what a bundle cannot keep is refused."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from vlm_sft.base.errors import UserError
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
