"""mPLUG's VQA models against values of their own code."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel

from support.golden import assert_close
from support.mplug import GOLDENS, model
from vlm_sft.systems.mplug_vqa import MPlugForVQA


@pytest.fixture(scope="module", params=["base", "large"])
def both(request):
    """A model and its golden."""
    return model(request.param), GOLDENS[request.param]


def asked(golden):
    inputs = golden.inputs
    return {
        "pixel_values": inputs["image"],
        "input_ids": inputs["question_ids"],
        "attention_mask": inputs["question_mask"],
    }


def answered(golden):
    inputs = golden.inputs
    return {"answer_ids": inputs["answer_ids"], "answer_mask": inputs["answer_mask"], "answers": inputs["k"]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_the_decoder_reads_is_upstreams(both, attention):
    made, golden = both
    made.set_attn_implementation(attention)
    assert_close(made.get_image_features(golden.inputs["image"]), golden.outputs["image_embeds"])
    states, mask = made.read(**asked(golden))
    repeated = states.repeat_interleave(golden.inputs["k"], dim=0), mask.repeat_interleave(golden.inputs["k"], dim=0)
    assert torch.equal(repeated[1], golden.outputs["decoder_state_mask"])
    real = repeated[1].bool()
    assert_close(repeated[0][real], golden.outputs["decoder_states"][real])


def test_answers_are_scored_as_upstream_scores_them(both):
    made, golden = both
    found = made(**asked(golden), **answered(golden), weights=golden.inputs["weights"])
    real = golden.inputs["answer_mask"].bool()
    assert_close(found.logits[real], golden.outputs["decoder_logits"][real])
    assert_close(found.answer_losses, golden.outputs["answer_loss"])
    assert_close(found.loss, golden.outputs["loss"])


def test_candidates_are_ranked_as_upstream_ranks_them(both):
    made, golden = both
    ids, mask, top = golden.inputs["candidate_ids"], golden.inputs["candidate_mask"], int(golden.inputs["rank_k"])
    chosen, shares = made.rank(*made.read(**asked(golden)), ids, mask, top)
    assert torch.equal(chosen, golden.outputs["rank_ids"])
    assert_close(shares, golden.outputs["rank_probs"])
    assert made.rank(*made.read(**asked(golden)), ids, mask, 99)[0].shape == (3, len(ids))


def test_padding_of_a_question_changes_nothing(both):
    made, golden = both
    length = int(golden.inputs["question_mask"][1].sum())
    alone = {name: each[1:2, :length] if name != "pixel_values" else each[1:2] for name, each in asked(golden).items()}
    image = golden.outputs["image_embeds"].shape[1]
    wanted = made.read(**asked(golden))[0][1:2, : image + length]
    assert_close(made.read(**alone)[0], wanted)


def test_greedy_writing_follows_the_scores(both):
    made, golden = both
    states, mask = made.read(**asked(golden))
    written = made.write(states, mask, 2, 3, max_new_tokens=4, do_sample=False, num_beams=1)
    logits, _ = made.score(states, mask, written, torch.ones_like(written))
    for row, said in zip(written.tolist(), logits.argmax(-1).tolist(), strict=True):
        end = row.index(3) if 3 in row else len(row) - 1
        assert row[1 : end + 1] == said[:end]


def test_beams_are_at_least_as_likely_as_greed(both):
    made, golden = both
    states, mask = made.read(**asked(golden))
    greedy, beams = (
        made.write(states, mask, 2, 79, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=number)
        for number in (1, 5)
    )  # fmt: skip
    losses = [made.score(states, mask, ids, torch.ones_like(ids))[1] for ids in (greedy, beams)]
    assert (losses[1] <= losses[0] + 1e-5).all()


def test_it_learns_its_answers(both):
    made, golden = copy.deepcopy(both[0]).train(), both[1]
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = made(**asked(golden), **answered(golden), weights=golden.inputs["weights"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] * 0.9


def test_transformers_saves_and_loads_it(both, tmp_path):
    made, golden = both
    made.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, MPlugForVQA)
    assert_close(
        again(**asked(golden), **answered(golden), weights=golden.inputs["weights"]).loss, golden.outputs["loss"]
    )
