"""Many answers at a time: each as if it were alone, whoever comes, leaves or fails beside it."""

from __future__ import annotations

import base64
import queue
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from support.asking import QUESTIONS
from support.tiny_families import ALL, encoded, processor_of, tiny
from vlm_sft import answer
from vlm_sft.families.build_family import model_class
from vlm_sft.inference.generation import encode_question
from vlm_sft.serving import pool as pools
from vlm_sft.serving.asked import Asked
from vlm_sft.serving.bundles import Base, Served
from vlm_sft.serving.meters import Meters
from vlm_sft.serving.pool import Pool
from vlm_sft.serving.prepare import Rules, prepare
from vlm_sft.serving.refusal import Refusal
from vlm_sft.serving.writing import End, Writing


@pytest.fixture
def make_pool():
    made = []

    def make(batch_size=4, queue=99) -> Pool:
        made.append(Pool(batch_size, queue, Meters()))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each._thread.join(20)
        assert not each._thread.is_alive()


@pytest.fixture
def ask(served, picture):
    """Puts a question to a pool; gives what comes of it."""

    def make(pool, number=0, most=12, data=None, bundle=None, **more) -> SimpleNamespace:
        told: queue.Queue = queue.Queue()
        url = picture(number)["image_url"]["url"] if data is None else data
        text = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
        messages = [{"role": "user", "content": [{"type": "image", "text": None}, text]}]
        asked = Asked("tiny", messages, [{"url": url, "where": "messages[0].content[0]"}], most, **more)
        writing = prepare(bundle or served, asked, Rules(), told.put)
        pool.ask(bundle or served, writing)

        texts: list[str] = []

        def begun() -> None:
            texts.append(told.get(timeout=60).text)

        def end() -> tuple[str, End]:
            while not isinstance(what := told.get(timeout=60), End):
                texts.append(what.text)
            return "".join(texts), what

        return SimpleNamespace(end=end, writing=writing, begun=begun)

    return make


@pytest.mark.parametrize("slice_", [1, 3, 32])
def test_each_answer_is_the_one_of_its_question_alone(make_pool, ask, alone, monkeypatch, slice_) -> None:
    monkeypatch.setattr(pools, "SLICE", slice_)
    pool = make_pool(batch_size=3)
    lengths = [5 + 7 * (number % 4) for number in range(10)]
    asked = [ask(pool, number, most) for number, most in enumerate(lengths)]
    for number, (each, most) in enumerate(zip(asked, lengths, strict=True)):
        text, end = each.end()
        assert (text, end.error) == (alone(number, most), None)
    assert pool.counts() == (0, 0)


def test_a_newcomer_does_not_wait_for_the_end_of_a_long_answer(make_pool, ask, alone, monkeypatch) -> None:
    monkeypatch.setattr(pools, "SLICE", 4)
    pool = make_pool()
    long = ask(pool, 0, 300)
    long.begun()
    short = ask(pool, 1, 3)
    assert short.end()[0] == alone(1, 3)
    assert long.writing.ended is None, "the long one went on meanwhile"
    assert long.end()[0] == alone(0, 300)


def test_a_client_that_leaves_frees_its_place(make_pool, ask, alone) -> None:
    pool = make_pool(batch_size=1)
    first, waits = ask(pool, 0, 400), ask(pool, 1, 400)
    third = ask(pool, 2, 4)
    first.begun()
    pool.leave(waits.writing)
    pool.leave(first.writing)
    assert third.end()[0] == alone(2, 4)
    assert len(first.writing.ids) < 400 and waits.writing.ids == []


def test_a_picture_that_fails_fails_alone(make_pool, ask, alone, shared_photos) -> None:
    data = Path(shared_photos[0]).read_bytes()
    cut = "data:image/png;base64," + base64.b64encode(data[: len(data) // 2]).decode()
    pool = make_pool()
    bad, good = ask(pool, 0, 5, data=cut), ask(pool, 1, 5)
    assert "damaged" in str(bad.end()[1].error) and good.end()[0] == alone(1, 5)


def test_what_a_model_raises_is_the_error_of_one_answer(make_pool, ask, alone, monkeypatch) -> None:
    real = pools.new_tokens

    def fails(model, batch, settings, **more):
        if any(row.most == 7 for row in more["logits_processor"][0].writings):
            raise RuntimeError("a kernel of ours")
        return real(model, batch, settings, **more)

    monkeypatch.setattr(pools, "new_tokens", fails)
    pool = make_pool()
    asked = [ask(pool, number, 7 if number == 2 else 5) for number in range(4)]
    for number, each in enumerate(asked):
        text, end = each.end()
        assert ("kernel" in str(end.error)) if number == 2 else text == alone(number, 5)
    assert pool.alive


def test_a_full_queue_and_a_closed_pool_refuse(make_pool, ask, monkeypatch) -> None:
    entered, go = threading.Event(), threading.Event()
    real = pools.new_tokens

    def waits(*args, **more):
        entered.set()
        assert go.wait(30)
        return real(*args, **more)

    monkeypatch.setattr(pools, "new_tokens", waits)
    pool = make_pool(batch_size=1, queue=1)
    first = ask(pool, 0, 2)
    assert entered.wait(30)
    second = ask(pool, 1, 2)
    with pytest.raises(Refusal, match="wait already") as full:
        ask(pool, 2, 2)
    assert full.value.status == 429 and pool.counts() == (1, 1)
    pool.close()
    go.set()
    assert second.end()[1].error.status == 503 and not pool.alive
    assert first.end()[1].reason in ("error", "length")
    with pytest.raises(Refusal) as closed:
        ask(pool, 3, 2)
    assert closed.value.status == 503


def test_two_bundles_have_their_turns(make_pool, ask, alone, served, monkeypatch) -> None:
    monkeypatch.setattr(pools, "SLICE", 4)
    other = replace(served, name="other", own={"stop_strings": "e"})
    pool = make_pool()
    long = ask(pool, 0, 200)
    long.begun()
    short = ask(pool, 1, 30, bundle=other)
    assert short.end()[0] == alone(1, 30).split("e")[0].strip() and long.writing.ended is None
    assert long.end()[0] == alone(0, 200)


def test_a_bundle_does_not_wait_for_all_questions_to_another(make_pool, ask, alone, served, monkeypatch) -> None:
    monkeypatch.setattr(pools, "SLICE", 4)
    other = replace(served, name="other")
    pool = make_pool(batch_size=1)
    first, second = ask(pool, 0, 300), ask(pool, 2, 300)
    first.begun()
    short = ask(pool, 1, 3, bundle=other)
    assert short.end()[0] == alone(1, 3) and first.writing.ended is None and second.writing.ended is None
    assert (first.end()[0], second.end()[0]) == (alone(0, 300), alone(2, 300))


def test_a_penalty_beside_a_prompt_that_nearly_fills_the_model(make_pool, served) -> None:
    careful = replace(served, name="careful", own={"repetition_penalty": 1.5})
    texts, wanted, told = ["猫" * 155, "What is it?"], [], []
    pool = make_pool()
    for text in texts:
        row = {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}], "images": []}
        chat = encode_question(careful.processor, row)
        most = min(60, 512 - len(chat.input_ids))
        assert (most < 60) == (text != "What is it?")
        wanted.append(
            str(answer(served.model, served.processor, [row], max_new_tokens=most, repetition_penalty=1.5)[0])
        )
        told.append(queue.Queue())
        pool.ask(careful, Writing(chat, row, most, careful.processor, told[-1].put))
    for answers, text in zip(told, wanted, strict=True):
        pieces = []
        while not isinstance(what := answers.get(timeout=60), End):
            pieces.append(what.text)
        assert what.error is None and "".join(pieces) == text


def test_penalties_are_not_stopped_in_the_middle(make_pool, ask, alone, served, monkeypatch) -> None:
    monkeypatch.setattr(pools, "SLICE", 2)
    careful = replace(served, name="careful", own={"repetition_penalty": 1.5})
    assert not careful.goes_on and served.goes_on
    pool = make_pool(batch_size=2)
    asked = [ask(pool, number, 20, bundle=careful) for number in range(5)]
    for number, each in enumerate(asked):
        assert each.end()[0] == alone(number, 20, repetition_penalty=1.5)
    assert torch.is_tensor(served.model.lm_head.weight)


@pytest.mark.parametrize("name", ALL)
def test_existing_models_go_on_from_what_is_written(name, make_pool, monkeypatch) -> None:
    monkeypatch.setattr(pools, "SLICE", 2)
    torch.manual_seed(0)
    model = model_class(AutoConfig.from_pretrained(tiny(name))).from_pretrained(tiny(name)).eval().requires_grad_(False)
    bundle = Served(name, Base(model), processor_of(name), {}, None, model.generation_config)
    bundle.base.now = bundle
    pool, told, wanted = make_pool(batch_size=2), [], []
    for number, size in enumerate([(40, 30), (64, 64), (30, 50), (90, 30)]):
        content = [{"type": "image", "text": None}, {"type": "text", "text": QUESTIONS[number]}]
        row = {"messages": [{"role": "user", "content": content}]}
        row["images"] = [{"path": None, "bytes": encoded(size)}]
        most = 3 + 2 * number
        wanted.append(str(answer(model, bundle.processor, [row], max_new_tokens=most)[0]))
        told.append(queue.Queue())
        chat = encode_question(bundle.processor, row)
        pool.ask(bundle, Writing(chat, row, most, bundle.processor, told[-1].put))
    for number, answers in enumerate(told):
        pieces = []
        while not isinstance(what := answers.get(timeout=60), End):
            pieces.append(what.text)
        assert what.error is None and "".join(pieces) == wanted[number]
