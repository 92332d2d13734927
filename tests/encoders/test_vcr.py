"""VCR's questions as a VLE reads them: words become tokens, things types, boxes patches; one model has both heads."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from support.golden import assert_close
from support.shrink import vcr_row
from support.vle import GOLDEN, boxes, config, save_vle
from vlm_sft.base.errors import RowError, UserError, row_error
from vlm_sft.encoders.encoder import piece_of
from vlm_sft.encoders.vcr import _patches
from vlm_sft.encoders.vle import VLESystem
from vlm_sft.rows.formats import examples_of
from vlm_sft.systems.vle_heads import VLEForVCR
from vlm_sft.vcr.choices import choices_of


@pytest.fixture
def processor(tmp_path):
    settings = config()
    settings.trained_for = "vcr"
    return VLESystem.processor(piece_of(str(save_vle(tmp_path / "it")), None, "it"), settings)


def asked_of(row, task="q2a"):
    (found,) = choices_of(row, (task,), lambda what, mend: row_error("row", what, mend, "wrong"))
    return found


def test_both_heads_say_what_upstream_says():
    model = VLEForVCR(config()).eval()
    wanted = {name for name, _ in model.named_parameters()}
    model.load_state_dict({name: each for name, each in GOLDEN.tensors().items() if name in wanted})
    inputs, outputs = GOLDEN.inputs, GOLDEN.outputs
    ids, mask = (inputs[name].transpose(0, 1) for name in ("vcr_input_ids", "vcr_attention_mask"))
    right = torch.tensor(GOLDEN.config["lists"].get("vcr_labels", GOLDEN.config.get("vcr_labels")))
    for number, task in enumerate(("q2a", "qa2r")):
        given = boxes(ids.shape[-1], 4)
        found = model(ids, torch.full((2,), number), given.patches, given.image_types, given.text_types, labels=right,
                      pixel_values=inputs["pixel_values"], attention_mask=mask)  # fmt: skip
        assert_close(found.logits, outputs[f"vcr_{task}_logits"])
        assert_close(found.loss, outputs[f"vcr_{task}_loss"])
    mixed = model(ids, torch.tensor([0, 1]), given.patches, given.image_types, given.text_types, attention_mask=mask,
                  pixel_values=inputs["pixel_values"])  # fmt: skip
    assert_close(mixed.logits[0], outputs["vcr_q2a_logits"][0])
    assert_close(mixed.logits[1], outputs["vcr_qa2r_logits"][1])


def test_more_things_than_there_are_types_for_are_the_rows_error(processor):
    processor.most_things = 2
    row = {**vcr_row(0, "0.png", "red"), "question": ["how", [0, 1], "dogs"], "answer_choices": [["red"]] * 4}
    assert [len(each) for each in processor.ask(asked_of(row), None, "vcr.jsonl, line 3").things] == [2] * 4
    processor.most_things = 1
    with pytest.raises(
        RowError, match=r"^vcr\.jsonl, line 3: a choice .* name 2 things: the model tells 1 apart; set "
    ) as raised:
        processor.ask(asked_of(row), None, "vcr.jsonl, line 3")
    assert raised.value.reason == "too many things"


def test_words_point_to_things_by_types(processor):
    row = {
        **vcr_row(0, "0.png", "red"),
        "question": ["how", [1], "dogs"],
        "answer_choices": [["a", [0, 1]]] + [["red"]] * 3,
    }
    asked = processor.ask(asked_of(row), None)
    tokenizer = processor.tokenizer
    dog, casey = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("dog", "Casey"))
    cut = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("how", "dogs", "a", "and", "red")]
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    first = [begin, *cut[0], *dog, *cut[1], end, *cut[2], *casey, *cut[3][:1], *dog, end]
    assert asked.ids == [first, *[[begin, *cut[0], *dog, *cut[1], end, *cut[4], end]] * 3]
    kinds = [0, *[0] * len(cut[0]), *[3] * len(dog), *[0] * len(cut[1]), 0, *[0] * len(cut[2]), *[2] * len(casey), 0,
             *[3] * len(dog), 0]  # fmt: skip
    assert asked.types[0] == kinds and set(asked.types[1]) == {0, 2}, "a choice counts the things that it names itself"
    assert [len(each) for each in asked.things] == [2, 1, 1, 1] and asked.right == 3 and not asked.cut


def test_patches_are_those_that_a_box_touches():
    # Upstream's on a picture of 1920 x 797 with 4 x 4 patches: 480 x 199.25 pixels each.
    assert _patches([955 / 1920, 52 / 797, 1551 / 1920, 789 / 797], 4) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]
    assert _patches([785 / 1920, 527 / 797, 841 / 1920, 657 / 797], 4) == [9, 13]
    assert _patches([-0.2, 0.5, 0.1, 1.3], 2) == [2]


def test_what_does_not_fit_loses_words_of_the_longer_side(processor):
    row = {
        **vcr_row(0, "0.png", "red"),
        "question": ["dogs"] * 12,
        "rationale_choices": [["two"] * 20, ["red"], ["red"], ["a"]],
    }
    for task, ends in (("q2a", 3), ("qa2r", 4)):
        asked = processor.ask(asked_of(row, task), 16)
        assert asked.cut and max(map(len, asked.ids)) <= 16
        assert all(ids.count(processor.tokenizer.sep_token_id) == ends - 1 for ids in asked.ids)
    with pytest.raises(UserError, match="7 tokens hold no choice"):
        processor.ask(asked_of(row), 7)
    processor.longest = 512
    whole = processor.ask(asked_of({**row, "question": ["dogs"] * 90}), None)
    assert whole.cut and max(map(len, whole.ids)) == 80, "as in training, and as upstream"
    assert not processor.ask(asked_of(vcr_row(0, "0.png", "red")), None).cut


def test_a_batch_has_four_choices_a_row_and_padding_says_nothing(processor):
    rows = [vcr_row(0, "0.png", "red"), {**vcr_row(1, "1.png", "two dogs"), "question": ["how", "many", "dogs", "?"]}]
    asked = [processor.ask(asked_of(row, task), None) for row, task in zip(rows, ("q2a", "qa2r"), strict=True)]
    both = processor.targets(asked)
    assert both["input_ids"].shape[:2] == (2, 4) and both["tasks"].tolist() == [0, 1]
    torch.manual_seed(0)
    settings = config()
    settings.num_token_types = 80
    model = VLEForVCR(settings).eval()
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    found = model(**both, **processor.image_inputs(pictures)).logits
    for number in range(2):
        alone = model(
            **processor.targets(asked[number : number + 1]), **processor.image_inputs(pictures[number : number + 1])
        )
        torch.testing.assert_close(alone.logits[0], found[number], rtol=0, atol=1e-5)


def test_what_is_no_question_of_vcr_is_one_sentence(processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "哪个?"}]}]
    with pytest.raises(RowError, match="has no choices; give rows of the formats vcr"):
        processor.encode_chat(messages)
    with pytest.raises(UserError, match="measure it with `vlm-sft evaluate`"):
        processor.asker(None)
    (example,) = examples_of({**vcr_row(0, "0.png", "red"), "boxes": None}, "vcr_q2a", where="row 1")
    row = {"messages": example.messages, "images": [{"path": "/nowhere/0.png", "bytes": None}], "id": "1"}
    with pytest.raises(RowError, match=r"0\.json, where its boxes lie, cannot be read"):
        processor.facts(row, None, "row 1")
