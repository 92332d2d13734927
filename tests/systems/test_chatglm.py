"""ChatGLM by itself: as transformers takes a language model, and against values of its own code."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from support.golden import Golden, assert_close
from vlm_sft.base.errors import UserError
from vlm_sft.model.positions import kept_apart, own_positions, row_numbers
from vlm_sft.pieces.part_configs import find_language_model
from vlm_sft.recipe.sections import LanguageModel
from vlm_sft.systems.chatglm import ChatGLMForCausalLM, ChatGLMModel
from vlm_sft.systems.chatglm_layers import ChatGLMConfig

GOLDEN = Golden("visualglm")
CONFIG = ChatGLMConfig(**GOLDEN.config["lm"])


@pytest.fixture(scope="module")
def model():
    model = ChatGLMForCausalLM(copy.deepcopy(CONFIG)).eval().requires_grad_(False)
    weights = {n: t for n, t in GOLDEN.tensors().items() if not n.startswith("image_") and "inv_freq" not in n}
    model.load_state_dict(weights)
    return model


def upstreams(positions):
    """Our (2, B, S) → upstream's (B, 2, S)."""
    return torch.stack([positions[0] - positions[1], positions[1]], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_texts_padded_and_not(model, attention):
    inputs, wanted = GOLDEN.inputs, GOLDEN.outputs
    model.set_attn_implementation(attention)
    assert_close(model(input_ids=inputs["text_input_ids"]).logits, wanted["text_logits"])
    ids, mask = inputs["left_input_ids"], inputs["left_attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert_close(logits[mask.bool()], wanted["left_logits"][mask.bool()])
    assert logits.isfinite().all()
    model.set_attn_implementation("sdpa")


def test_positions(model):
    inputs, wanted = GOLDEN.inputs, GOLDEN.outputs
    of = model.transformer.positions_of
    assert torch.equal(upstreams(of(inputs["input_ids"])), wanted["position_ids"])
    assert torch.equal(upstreams(of(inputs["prompt_input_ids"])), wanted["prompt_position_ids"])
    assert torch.equal(upstreams(of(inputs["text_input_ids"])), wanted["text_position_ids"])
    left = of(inputs["left_input_ids"], inputs["left_attention_mask"])
    assert torch.equal(upstreams(left), inputs["left_position_ids"])


def test_positions_of_odd_prompts(model):
    """Without `<sop>`, without a place to fill, with one in its midst, with a second `<sop>` behind the first."""
    mask, gmask, sop = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.bos_token_id
    rows = {
        (7, 8, 9): ([0, 1, 2], [0, 0, 0]),
        (7, 8, sop, 9): ([0, 1, 1, 1], [0, 0, 1, 2]),
        (7, gmask, 8, 9, sop, 5, 6): ([0, 1, 2, 3, 1, 1, 1], [0, 0, 0, 0, 1, 2, 3]),
        (7, mask, 8, sop, 5): ([0, 1, 2, 1, 1], [0, 0, 0, 1, 2]),
        (7, gmask, sop, 5, sop, 6): ([0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]),
    }
    for ids, (places, blocks) in rows.items():
        found = upstreams(model.transformer.positions_of(torch.tensor([ids])))
        assert found.tolist() == [[places, blocks]]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation_equals_whole_forwards(model, options):
    ids, mask = GOLDEN.inputs["left_input_ids"], GOLDEN.inputs["left_attention_mask"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3, **options}
    found = model.generate(input_ids=ids, attention_mask=mask, **settings)
    wanted = ids
    for _ in range(6):
        grown = torch.nn.functional.pad(mask, (0, wanted.shape[1] - mask.shape[1]), value=1)
        wanted = torch.cat([wanted, model(input_ids=wanted, attention_mask=grown).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, wanted)
    embeds = model.transformer.word_embeddings(ids)
    placed = {"position_ids": model.transformer.positions_of(ids, mask), "inputs_embeds": embeds}
    assert torch.equal(model.generate(**placed, attention_mask=mask, **settings), wanted[:, ids.shape[1] :])
    beams = model.generate(input_ids=ids, attention_mask=mask, **settings, num_beams=3)
    assert torch.equal(
        beams, model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **{**settings, "use_cache": False})
    )


def test_logits_with_a_cache_are_those_without(model):
    ids = GOLDEN.inputs["text_input_ids"]
    positions = model.transformer.positions_of(ids)
    begun = model(input_ids=ids[:, :6], position_ids=positions[..., :6], use_cache=True)
    later = model(input_ids=ids[:, 6:], position_ids=positions[..., 6:], past_key_values=begun.past_key_values)
    assert_close(torch.cat([begun.logits, later.logits], dim=1), GOLDEN.outputs["text_logits"])


def test_a_prompt_is_read_in_both_directions_and_an_answer_in_one(model):
    ids = GOLDEN.inputs["text_input_ids"][:1].clone()
    end = int((ids == CONFIG.bos_token_id).nonzero()[0, 1])
    changed = ids.clone()
    changed[0, end - 2] = 60  # the last word of the question
    moved = (model(input_ids=ids).logits != model(input_ids=changed).logits).any(-1)[0]
    assert moved.all()
    changed = ids.clone()
    changed[0, -1] = 60  # the last of the answer
    moved = (model(input_ids=ids).logits != model(input_ids=changed).logits).any(-1)[0]
    assert moved.tolist() == [False] * (ids.shape[1] - 1) + [True]


def test_packed_rows_do_not_see_each_other(model):
    left, pad = GOLDEN.inputs["left_input_ids"], CONFIG.pad_token_id
    rows = [*(row[row != pad] for row in left), *GOLDEN.inputs["text_input_ids"]]
    ids = torch.nn.functional.pad(torch.cat(rows), (0, 3), value=pad)[None]
    lengths = torch.tensor([[len(row) for row in rows]])
    positions = own_positions(model.transformer, ids, None, lengths)
    numbers = row_numbers(lengths, ids.shape[1])[0]
    embeds = model.transformer.word_embeddings(ids)
    mask, positions = kept_apart(model, embeds, lengths, positions)
    packed = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[0]
    for number, row in enumerate(rows):
        assert_close(packed[numbers == number], model(input_ids=row[None]).logits[0])


def test_it_learns_with_checkpointing_as_without():
    torch.manual_seed(0)
    model = ChatGLMForCausalLM(copy.deepcopy(CONFIG)).train()
    batch = {"input_ids": GOLDEN.inputs["text_input_ids"], "labels": GOLDEN.inputs["text_input_ids"]}
    model(**batch).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain[name])


def test_it_is_saved_and_found_by_transformers_own_words(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "chatglm"
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is ChatGLMForCausalLM and not found["missing_keys"] and not found["unexpected_keys"]
    ids = GOLDEN.inputs["text_input_ids"]
    assert torch.equal(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert isinstance(AutoModel.from_pretrained(tmp_path), ChatGLMModel)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.intermediate_size) == (CONFIG.num_layers, CONFIG.inner_hidden_size)


def test_what_forward_lacks_is_said(model):
    embeds = model.transformer.word_embeddings(GOLDEN.inputs["text_input_ids"])
    with pytest.raises(ValueError, match="positions depend on where the prompt ends: give position_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize(
    "later", [{"padded_vocab_size": 65024, "ffn_hidden_size": 13696}, {"position_encoding_2d": False}]
)
def test_later_generations_of_the_same_model_type_are_refused_in_a_sentence(later, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "hidden_size": 4096, **later}))
    with pytest.raises(
        UserError, match=r"stack\.language_model\.pretrained: .*only the first ChatGLM .* is known here"
    ):
        find_language_model(LanguageModel(pretrained=str(tmp_path)))
