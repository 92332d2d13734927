"""Each check: what it finds, at which level, and that it is silent where nothing is wrong."""

from __future__ import annotations

import pytest

from support.conversations import make_row, turn
from vlm_sft.batch.tokenizer_coverage import Coverage
from vlm_sft.data.image_files import Leak
from vlm_sft.data.ledger import Ledger, SourceLedger
from vlm_sft.data.look_alikes import Compared, LookAlike, LookAlikes, Place
from vlm_sft.preflight.checks import CHECKS, ERROR, NOTE, WARNING, Evidence, boxes_taken, check
from vlm_sft.preflight.freeze_proof import Proof
from vlm_sft.rows.messages import box_part
from vlm_sft.templates.template import load_template

ZIYA = load_template("ziya")
PROJECTOR, TOWER = "model.projector.linear.weight", "model.vision_tower.layers.2.weight"


def seen(photos, *answers, **changes) -> Evidence:
    rows = [make_row(turn(f"question {n}", answer, images=1), photos, n) for n, answer in enumerate(answers)]
    return Evidence(rows=rows, template=ZIYA, ends_with="</s>", **changes)


def said(evidence) -> list[tuple[str, str]]:
    return [(finding.level, finding.sentence) for finding in check(evidence)]


def ledger(max_rejected, read, **reasons) -> dict[str, Ledger]:
    source = SourceLedger(read=read, measured=read)
    for reason, count in reasons.items():
        for number in range(count):
            source.reject(reason, f"row {number} is wrong.")
    return {"train": Ledger(max_rejected, {"captions": source})}


def test_good_rows_are_no_finding(photos):
    proof = Proof(steps=2, losses=[2.0, 1.5], moved=[PROJECTOR], frozen=9)
    good = seen(photos, "a cat", "一只猫。", "two", proof=proof, ledgers=ledger(0, 3), memory=(2**30, 2**34))
    assert check(good) == []
    assert check(Evidence()) == []


def test_rejected_rows(photos):
    (found,) = said(seen(photos, ledgers=ledger(0.1, 10, missing=2)))
    assert found[0] == ERROR and found[1].startswith('train: 2 of 10 rows of the source "captions" cannot be used')
    assert said(seen(photos, ledgers=ledger(0.5, 10, missing=2))) == [
        (WARNING, "train: 2 rows will be left out; the reasons stand below.")
    ]
    assert said(Evidence(failed="No row is left.")) == [(ERROR, "No row is left.")]


def test_shortened_rows(photos):
    ledgers = ledger(0, 10)
    ledgers["train"].sources["captions"].truncated, ledgers["train"].sources["captions"].turns_lost = 1, 3
    assert said(seen(photos, ledgers=ledgers)) == [(WARNING, "train: 1 row loses 3 turns to fit max_length.")]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("two dogs USER: and cats?", "1 answer holds the role marker 'USER:', which the model would learn to say."),
        ("one</s> two", "1 answer holds '</s>', where generation stops with this chat template."),
        ("…!", "1 answer has no letter and no digit."),
    ],
)
def test_odd_answers(answer, sentence, photos):
    finding = next(each for each in check(seen(photos, "a cat", answer)) if each.sentence == sentence)
    assert finding.level == WARNING and list(finding.where) == ["s/1"]


def test_one_answer_for_all_or_many(photos):
    assert said(seen(photos, *["yes"] * 20)) == [(ERROR, "All 20 answers that were looked at are the same: 'yes'.")]
    many = ["yes"] * 10 + [f"answer {n}" for n in range(10)]
    assert said(seen(photos, *many)) == [(WARNING, "50% of the answers are the same: 'yes'.")]
    assert said(seen(photos, *["yes"] * 19)) == [], "of few rows nothing follows"


def test_rows_that_come_again(photos):
    evidence = seen(photos, "a cat", "a dog")
    evidence.rows.append({**evidence.rows[0], "id": "s/9", "source": "t"})
    assert said(evidence) == [(WARNING, "1 row of 3 says and shows what another one does.")]


def test_leaks_name_both_rows(photos):
    (found,) = check(seen(photos, "a cat", leaks=[Leak("train/1", "test/2")]))
    assert found.sentence == "1 training image is among the evaluation images, byte for byte."
    assert list(found.where) == ["train/1 = test/2"]


def test_look_alikes_are_a_warning_with_count_share_and_pairs(photos):
    pair = LookAlike(Place("train/1", "train", "a/猫.png"), Place("test/2", "test", None), 0.984, True)
    found = LookAlikes([pair], Compared(400, 500), Compared(8, 8))
    (finding,) = check(seen(photos, "a cat", look_alikes=found))
    assert (finding.level, finding.sentence) == (
        WARNING, "1 training image (0.2%) looks like 1 held-out image (12.5%) with other bytes.",
    )  # fmt: skip
    assert list(finding.where) == ["train/1 (a/猫.png) ≈ test/2: 0.98 mirrored"] and "take copies out" in finding.mend
    found.pairs += [pair._replace(train=Place(f"train/{n}", "train", None)) for n in range(2, 10)]
    (finding,) = check(seen(photos, "a cat", look_alikes=found))
    assert finding.sentence == "9 training images (2.2%) look like 1 held-out image (12.5%) with other bytes."
    assert len(finding.where) == 3
    assert check(seen(photos, "a cat", look_alikes=LookAlikes(train=Compared(4, 4)))) == []


def test_poor_coverage(photos):
    (found,) = check(seen(photos, coverage={"zh": Coverage(1, 100, 210, 0, 150), "en": Coverage(1, 100, 25)}))
    assert found.level == WARNING and "'zh'" in found.sentence and "71% are parts of a character" in found.sentence


@pytest.mark.parametrize(
    ("proof", "level", "words"),
    [
        ({"still": {PROJECTOR: "its gradient is zero"}}, ERROR, "did not move in 2 steps: its gradient is zero."),
        ({"changed": [TOWER]}, ERROR, "1 tensor that should be frozen changed."),
        ({"losses": [float("nan")]}, ERROR, "The loss is not a number: [nan]."),
        ({"unused": [TOWER]}, ERROR, "1 tensor of trained parts is not used"),
        ({"unused": [TOWER], "moved": [TOWER.replace("2", "1")]}, NOTE, "1 tensor of trained parts is not used"),
    ],
)
def test_what_real_steps_show(proof, level, words):
    (found,) = check(Evidence(proof=Proof(steps=2, **proof)))
    assert found.level == level and words in found.sentence


def test_a_step_that_fails():
    assert said(Evidence(stopped="No row of a batch of 4 can be trained on.")) == [
        (ERROR, "The first training step failed: No row of a batch of 4 can be trained on.")
    ]


def test_memory():
    assert said(Evidence(memory=(90 * 2**30, 80 * 2**30)))[0][0] == ERROR
    assert said(Evidence(memory=(76 * 2**30, 80 * 2**30))) == [
        (
            WARNING,
            "The run is estimated to take 76.0 GiB of 80.0 GiB, and only 90% can be planned with: "
            "`vlm-sft fit RECIPE` says which settings fit.",
        )
    ]


def test_errors_come_first(photos):
    evidence = seen(photos, "…", stopped="it broke.", proof=Proof(unused=[TOWER], moved=[TOWER + "1"]))
    assert [finding.level for finding in check(evidence)] == [ERROR, WARNING, NOTE]
    assert len(CHECKS) == len(set(CHECKS))


def test_keys_that_are_not_used_are_a_note(photos):
    source = SourceLedger(read=9, unused={"model": 9, "messages[].来源": 1})
    found = said(seen(photos, "a cat", "一只猫。", ledgers={"train": Ledger(0, {"captions": source})}))
    assert found == [
        (
            NOTE,
            'train: the source "captions" has keys that are not used: "model" in 9 rows, "messages[].来源" in 1 row.',
        )
    ]


def test_what_the_numbers_of_boxes_are_taken_for_is_said(photos):
    rows = [make_row(turn("在哪？", "x", images=1), photos, number) for number in range(3)]
    rows[0]["messages"][1]["content"] = [box_part([1, 2, 3, 4], "pixels", 0, "k")]
    rows[1]["messages"][1]["content"] = [box_part([0.1, 0.2, 0.3, 0.4], "unit", 0, "k")]
    rows[2]["messages"][1]["content"][0]["text"] = "<box>(1,2),(3,4)</box> 猫"
    note, warning = boxes_taken(Evidence(rows=rows, box_notation="internvl"))
    taken = 'The numbers of boxes in the source "s" are taken for pixels in 1 row and unit in 1 row; '
    assert note.sentence == taken + "they are written in the notation internvl."
    assert (warning.level, warning.where) == (WARNING, ["s/2"])
    assert '1 row of the source "s" holds boxes typed in text, which stay text.' in warning.sentence
    assert [found.level for found in boxes_taken(Evidence(rows=rows, as_written=frozenset({"s"})))] == [NOTE]
