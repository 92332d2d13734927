"""One answer: what of it is shown and when, how it ends, how it is drawn."""

from __future__ import annotations

import pytest
import torch

from vlm_sft.batch.encoding import EncodedChat
from vlm_sft.inference.generation import cut_at, decode
from vlm_sft.serving.writing import Choice, End, Piece, Share, Step, Writing, how_drawn


@pytest.fixture
def write(tiny):
    """Writes an answer token by token; gives its pieces and its end."""
    processor = tiny[1]

    def make(text, most=99, end=True, **more) -> tuple[list, Writing]:
        told: list = []
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        chat = EncodedChat([5, 6], [-100, -100], 0, [0, 0])
        writing = Writing(chat, {}, most, processor, told.append, **more)
        for token in [*ids, *([processor.tokenizer.eos_token_id] if end else [])]:
            writing.take(token)
        return told, writing

    return make


def said(told) -> str:
    return "".join(each.text for each in told if isinstance(each, Piece))


def test_pieces_joined_are_the_answer_and_no_half_character_is_shown(write) -> None:
    told, writing = write(" 左上角是3，右下角是蓝色的7 a red 3 ")
    assert said(told) == "左上角是3，右下角是蓝色的7 a red 3" and told[-1] == End("stop") and len(told) > 5
    assert not any("\ufffd" in each.text for each in told[:-1])
    assert writing.length == 2 + len(writing.ids) == len(writing.so_far().input_ids) == len(writing.so_far().places)


def test_the_most_tokens_end_it(write) -> None:
    told, writing = write("a red 3 at the top", most=4)
    assert told[-1] == End("length") and len(writing.ids) == 4 and writing.left == 0
    assert said(told) == decode(writing.processor, writing.ids).strip()
    told, writing = write("猫", most=1)
    assert said(told) == "\ufffd", "the half of a character at which an answer is cut, as `answer` gives it"


STOPS = [(["right"], "a red 3 at the bottom"), (["zz", "d 3"], "a re"), (["a"], "")]


@pytest.mark.parametrize(("stop", "left"), STOPS)
def test_a_stop_ends_it_and_is_not_shown(write, stop, left) -> None:
    told, _ = write("a red 3 at the bottom right and a blue 7", stop=stop)
    assert said(told) == left and told[-1] == End("stop")


def test_what_only_looked_like_a_stop_is_shown_in_the_end(write) -> None:
    told, _ = write("a red 3", stop=["3 at"])
    assert said(told) == "a red 3"
    mark = write("x")[1].processor.end_of_answer.strip(" ")
    told, _ = write(f"a red 3{mark}and more") if mark and mark != "</s>" else write("a red 3")
    assert said(told) == cut_at("a red 3", mark)


def test_after_its_end_or_without_a_reader_nothing_is_written(write) -> None:
    told, writing = write("a red 3")
    before = list(told)
    writing.take(40)
    writing.end("error", ValueError())
    assert told == before
    told, writing = write("a", end=False)
    writing.gone = True
    writing.take(40)
    assert len(writing.ids) == 1


def test_draws_are_settings_as_generate_has_them() -> None:
    assert how_drawn({}, None).warpers is None
    assert how_drawn({"temperature": 0.0, "do_sample": True}, 1).warpers is None
    assert how_drawn({"do_sample": False, "temperature": 0.7}, 1).warpers is None
    assert how_drawn({"top_p": 0.0, "do_sample": True}, 1).warpers is None
    plain = how_drawn({"temperature": 1.0, "do_sample": True}, 1)
    assert plain.warpers == [] and plain.seed == 1
    assert len(how_drawn({"temperature": 0.5, "top_k": 3, "top_p": 1.0, "do_sample": True}, 1).warpers) == 2


def test_a_seed_gives_the_same_draws_and_top_k_is_obeyed(write) -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    drawn = []
    for seed in (1, 1, 2):
        writing = write("", end=False, draw=how_drawn({"do_sample": True, "top_k": 5}, seed))[1]
        drawn.append([writing.choose(scores.clone()) for _ in range(30)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) <= set(scores[0].topk(5).indices.tolist()) and len(set(drawn[0])) > 1


def test_a_batch_has_greedy_and_drawn_answers_probabilities_and_ends(write) -> None:
    draws = (how_drawn({}, None), how_drawn({"do_sample": True}, 3), how_drawn({}, None))
    greedy, drawn, gone = (write("", end=False, most=2, draw=draw)[1] for draw in draws)
    greedy.likely = 2
    told: list = []
    greedy.tell = told.append
    gone.gone = True
    rows = [greedy, drawn, gone]
    choice = Choice(rows)
    step = Step(rows, choice, lambda steps: False)
    ids = torch.zeros(3, 0, dtype=torch.long)
    for turn in range(3):
        scores = torch.randn(3, 60, generator=torch.Generator().manual_seed(turn)) * 3
        wanted = scores.clone()
        ids = torch.cat([ids, choice(ids, scores).argmax(-1, keepdim=True)], dim=1)
        assert ids[0, -1] == wanted[0].argmax()
        ended = step(ids, scores).tolist()
        if turn == 0:
            (share,) = told[0].shares
            logs = wanted[0].log_softmax(-1).topk(2).values.tolist()
            assert share.log == pytest.approx(logs[0])
            assert [other.log for other in share.others] == pytest.approx(logs)
            assert isinstance(share, Share) and ended == [False, False, True]
    assert ended == [True, True, True] and len(greedy.ids) == len(drawn.ids) == 2 and gone.ids == []


def test_scores_that_are_no_numbers_end_one_answer_alone(write) -> None:
    bad = write("", end=False, draw=how_drawn({"do_sample": True}, 3))[1]
    good = write("", end=False)[1]
    scores = torch.full((2, 9), float("nan"))
    scores[1] = torch.arange(9.0)
    assert Choice([bad, good])(torch.zeros(2, 0, dtype=torch.long), scores)[1].argmax() == 8
    assert bad.ended == "error" and good.ended is None
