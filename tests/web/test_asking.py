"""A question of the page: each bundle's answer with the pictures and without, as it is written."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from vlm_sft import answer
from vlm_sft.evaluation.pictures import grey
from vlm_sft.reading.images import load_image
from vlm_sft.web import asking
from vlm_sft.web.asking import ask

QUESTION = "左上角是什么？ What is it?"


def all_of(server, question, pictures, blank=True) -> list[list[str]]:
    """The texts of all answers each time that one went on; the last entry holds the faults."""

    async def asked() -> list[list[str]]:
        seen = []
        async for said in ask(server, question, pictures, blank):
            seen.append([each.text for each in said])
        return [*seen, [each.fault for each in said]]

    return asyncio.run(asked())


@pytest.fixture
def alone(served):
    """What the model answers by itself."""

    def say(images: list, question: str = QUESTION) -> str:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        row = {"messages": [{"role": "user", "content": content}], "images": images}
        (said,) = answer(served.model, served.processor, [row], max_new_tokens=12)
        return str(said)

    return say


def test_answers_come_in_pieces_and_are_those_of_the_bundle_alone(
    make_server, alone, shared_photos, monkeypatch
) -> None:
    photos, shown = [Path(photo) for photo in shared_photos[:2]], []
    real = asking.prepare

    def noted(served, asked, rules, tell):
        writing = real(served, asked, rules, tell)
        shown.append([load_image(image).tobytes() for image in writing.row["images"]])
        return writing

    monkeypatch.setattr(asking, "prepare", noted)
    *seen, faults = all_of(make_server(), QUESTION, photos)
    seeing, blind = alone([str(photo) for photo in photos]), alone([grey(), grey()])
    assert seen[0] == [""] * 4 and seen[-1] == [seeing, blind, seeing, blind]
    assert shown == [[load_image(photo).tobytes() for photo in photos], [load_image(grey()).tobytes()] * 2] * 2
    assert len({texts[0] for texts in seen}) > 2, "it is seen as it is written"
    assert not any(faults)


def test_without_pictures_there_is_nothing_to_blank(make_server, alone) -> None:
    assert all_of(make_server(), QUESTION, [])[-2] == [alone([])] * 2


@pytest.mark.parametrize(
    ("pictures", "rules", "fault"),
    [
        ("text.jpg", {}, "picture 1, text.jpg, is"),
        ("outside.png", {}, "picture 1"),
        ("0.png", {"images": 0}, "at most 0 are taken"),
        ("0.png", {"pixels": 10}, "pixels together; at most 10"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(make_server, shared_photos, tmp_path, pictures, rules, fault) -> None:
    folder = Path(shared_photos[0]).parent
    paths = {"text.jpg": tmp_path / "text.jpg", "outside.png": tmp_path / "outside.png", "0.png": folder / "0.png"}
    paths["text.jpg"].write_text("<script>猫</script>", encoding="utf-8")
    paths["outside.png"].write_bytes((folder / "0.png").read_bytes())
    folders = (str(tmp_path if pictures == "text.jpg" else folder),)
    *_, faults = all_of(make_server(image_folders=folders, **rules), QUESTION, [paths[pictures]], blank=False)
    assert all(fault in each and each.endswith(".") and "\n" not in each for each in faults), faults


def test_half_a_character_is_refused(make_server) -> None:
    *_, faults = all_of(make_server(), "猫\ud83d", [], blank=False)
    assert all("half a character" in each for each in faults), faults


def test_a_full_queue_is_told_to_ask_again(make_server) -> None:
    server = make_server(batch_size=1, queue=1)
    *_, faults = all_of(server, QUESTION * 3, [], blank=False)
    # Two bundles ask at a time: there is room for two answers, and none for a third.
    assert not any(faults)
    server.pool.close()
    assert all("stopping" in each for each in all_of(server, QUESTION, [])[-1])


def test_who_leaves_frees_the_places(make_server) -> None:
    server = make_server(batch_size=1, tokens=400)

    async def leave() -> None:
        asked = ask(server, QUESTION, [], False)
        async for said in asked:
            if said[0].text:
                break
        await asked.aclose()

    asyncio.run(leave())
    end = time.monotonic() + 20
    while server.pool.counts() != (0, 0):
        assert time.monotonic() < end, "the places are not free"
        time.sleep(0.01)
