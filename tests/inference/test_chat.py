"""A conversation at the terminal and through pipes: what is answered, what is said, and that it always goes on."""

from __future__ import annotations

import codecs
import copy
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import yaml
from PIL import Image

from support.films import film, frame_of
from support.paths import ROOT
from support.tiny_pieces import tiny_recipe
from vlm_sft import answer, load, load_recipe
from vlm_sft.base.console import harmless
from vlm_sft.base.errors import UserError
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.cli.main import main
from vlm_sft.inference import chat as chat_module
from vlm_sft.inference.chat import Conversation, chat
from vlm_sft.templates.template import load_template
from vlm_sft.train import train

CLI = [sys.executable, "-m", "vlm_sft"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, pieces, caption_file) -> str:
    """The bundle of one step with ziya's template."""
    root = tmp_path_factory.mktemp("bundles")
    recipe = tiny_recipe(pieces, caption_file, root / "ziya", chat_template="ziya", generation={"max_new_tokens": 8})
    recipe["sft"]["max_steps"] = 1
    path = root / "ziya.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(train(load_recipe(path)))


@pytest.fixture(scope="module")
def loaded(bundle):
    """Template → model and processor."""
    model, processor = load(bundle)
    captions = copy.copy(processor)
    captions.chat_template = load_template("plain")
    return {"ziya": (model, processor), "plain": (model, captions)}


@pytest.fixture
def talk(monkeypatch, capsys, loaded):
    """Holds a conversation of given lines; returns the answers and what was said beside them."""

    def hold(*lines: str, template: str = "ziya", images=(), options=None, videos=()) -> tuple[list[str], list[str]]:
        model, processor = loaded[template]
        monkeypatch.setattr(
            chat_module, "open_bundle", lambda bundle, given, trust: (model, processor, {"max_new_tokens": 8, **given})
        )
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        chat("bundle", list(images), None, options, videos=list(videos))
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return hold


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model by a list of answers (or exceptions); returns what it was asked: (messages, images)."""

    def make(*answers) -> list[tuple[list, list]]:
        asked, coming = [], iter(answers)

        def stream(model, processor, messages, images, **options):
            asked.append((messages, images))
            for piece in next(coming):
                if isinstance(piece, BaseException):
                    raise piece
                yield piece

        monkeypatch.setattr(chat_module, "stream_answer", stream)
        return asked

    return make


def texts(messages) -> list[str]:
    return ["".join(part.get("text") or "[image]" for part in message["content"]) for message in messages]


# ------------------------------------------------------------------------------------------------------- conversations


def test_answers_are_those_of_the_model_and_know_what_was_said_before(talk, loaded, photos):
    answers, said = talk("这是什么？", "And its colour?", images=photos[:2])
    model, processor = loaded["ziya"]
    first = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "这是什么？"}]
    messages = [{"role": "user", "content": first}]
    one = answer(model, processor, [{"messages": messages, "images": photos[:2]}], max_new_tokens=8)[0]
    messages += [{"role": "assistant", "content": one}, {"role": "user", "content": "And its colour?"}]
    two = answer(model, processor, [{"messages": messages, "images": photos[:2]}], max_new_tokens=8)[0]
    assert answers == f"{one}\n{two}\n".splitlines() and said == []


def test_images_join_the_next_question_and_stay_in_the_conversation(talk, scripted, photos, tmp_path):
    chinese = tmp_path / "我的 图片" / "猫's.png"
    chinese.parent.mkdir()
    Image.new("RGB", (9, 9)).save(chinese)
    asked = scripted(["一只", "猫"], ["two"], ["是"])
    answers, said = talk(
        "这是什么？", f"/image {chinese}", f"/image '{photos[1]}' \"{photos[2]}\"", f"／image\u3000{photos[3]}",
        "and these?", "真的吗？", images=photos[:1],
    )  # fmt: skip
    assert answers == ["一只猫", "two", "是"] and said == []
    assert [len(images) for _, images in asked] == [1, 5, 5]
    assert texts(asked[2][0]) == ["[image]这是什么？", "一只猫", "[image]" * 4 + "and these?", "two", "真的吗？"]
    assert asked[1][1][1].size == (9, 9)


def test_reset_forgets_and_quit_leaves(talk, scripted, photos):
    asked = scripted(["a"], ["b"])
    answers, said = talk("one", f"/image {photos[0]}", "/reset", "", "two", "/quit", "three")
    assert answers == ["a", "b"] and len(asked) == 2
    assert texts(asked[1][0]) == ["two"] and asked[1][1] == []
    assert said == ["The conversation and its images are forgotten."]


def test_an_answer_stopped_by_ctrl_c_is_kept_as_far_as_it_came(talk, scripted, photos):
    asked = scripted(["一", KeyboardInterrupt()], [KeyboardInterrupt()], ["c"])
    answers, said = talk("one", f"/image {photos[0]}", "two", "three")
    assert answers == ["一", "c"] and said == ["(stopped)"] * 2
    assert texts(asked[2][0]) == ["one", "一", "[image]three"], "the image waited for a question with an answer"


def test_an_empty_answer_is_said_and_not_part_of_the_conversation(talk, scripted):
    asked = scripted([], ["b"])
    answers, said = talk("one", "two")
    assert answers == ["b"] and said == ["The model gave no answer; the question is forgotten."]
    assert texts(asked[1][0]) == ["two"]


def test_mistakes_are_said_in_a_sentence_and_the_conversation_goes_on(talk, scripted, photos, tmp_path):
    empty = tmp_path / "空.png"
    empty.write_bytes(b"")
    scripted(["a"])
    answers, said = talk(
        "/imag x", "/zzz", "/image", "/image nope.png", f"/image {photos[0]} nope.png", f"/image {empty}",
        photos[0], "\udcff\udcfe", "hi",
    )  # fmt: skip
    assert answers == ["a"]
    assert said[0] == "There is no command /imag; did you mean /image?"
    assert said[1] == "There is no command /zzz; there are /image, /video, /reset, /help, /quit."
    assert said[2] == "Say which image: /image PATH."
    assert said[3].startswith("The image nope.png was not found in the folder .")
    assert said[4].startswith("The image nope.png was not found")
    assert said[5].startswith(f"The image {empty} is empty (0 bytes)")
    assert said[6] == f"To add an image, type /image {photos[0]}"
    assert said[7].startswith("The question is not UTF-8 text")
    assert len(said) == 8


def test_videos_are_added_as_frames_with_their_times(talk, scripted, photos, tmp_path):
    clip = film(tmp_path / "片 段.mp4")
    asked = scripted(["a", "b"], ["c"])
    answers, said = talk(
        "/video",
        "/video none.mp4",
        f"/video {photos[0]}",
        str(clip),
        f"/image {photos[0]}",
        f"/video '{clip}'",
        "谁？",
        "And?",
    )
    assert answers == ["ab", "c"]
    assert said[0] == "Say which video: /video PATH." and said[3] == f"To add a video, type /video {clip}"
    assert said[1].startswith("The video ") and "none.mp4 was not found" in said[1]
    assert "is a picture that does not move: name it under `images`" in said[2] and len(said) == 4
    (messages, images), (later, _) = asked
    assert [part["type"] for part in messages[0]["content"]] == ["image", *["text", "image"] * 8, "text"]
    assert messages[0]["content"][1]["text"] == "<0.0 seconds>" and len(images) == 9
    assert [frame_of(image) for image in images[1:]] == [0, 6, 11, 17, 22, 28, 33, 39]
    assert later[0] == messages[0] and len(later) == 3
    scripted(["a"])
    assert talk("hi", videos=[str(clip)]) == (["a"], [])
    with pytest.raises(UserError, match=r"none.mp4 was not found"):
        talk("hi", videos=["none.mp4"])


def test_a_conversation_that_is_too_long_is_said_and_can_be_reset(talk):
    answers, said = talk("很长" * 300, "hi", "/reset", "hi")
    assert len(said) == 2 and len(answers) >= 2
    assert said[0].startswith("The conversation takes 1,8") and said[0].endswith(": type /reset to start anew.")


def test_a_picture_that_is_refused_is_said_when_it_is_given_and_the_conversation_stays(
    talk, scripted, loaded, photos, tmp_path, monkeypatch
):
    line = tmp_path / "线 1.png"
    Image.new("RGB", (900, 1)).save(line)
    processor, real = loaded["ziya"][1], VLMProcessor.encode_images

    def encode(self, images):
        if any(image.height == 1 for image in images):
            raise ZeroDivisionError
        return real(self, images)

    monkeypatch.setattr(type(processor), "encode_images", encode)
    asked = scripted(["a"], ["b"])
    answers, said = talk(f"/image {photos[0]}", "one", f"/image {photos[1]} '{line}'", f"/image {photos[2]}", "two")
    assert answers == ["a", "b"] and said == [
        f"The image {line} of 900 x 1 pixels is refused by the model's image processor (ZeroDivisionError): give it "
        "another shape or format, or remove it."
    ]
    assert texts(asked[1][0]) == ["[image]one", "a", "[image]two"] and len(asked[1][1]) == 2
    with pytest.raises(UserError, match="is refused by the model's image processor"):
        talk("one", images=[str(line)])


def test_a_picture_that_the_model_fails_on_is_forgotten_with_its_question(talk, loaded, photos, monkeypatch, tmp_path):
    Image.new("RGB", (60, 30), "white").save(tmp_path / "white.png")
    model, real = loaded["ziya"][0].model, loaded["ziya"][0].model.encode_images

    def encode(pixel_values, **instruction):
        if (pixel_values.amin((1, 2, 3)) > 1.5).any():
            raise RuntimeError("shape mismatch")
        return real(pixel_values, **instruction)

    plain, _ = talk(f"/image {photos[0]}", "一", "three")
    monkeypatch.setattr(model, "encode_images", encode)
    answers, said = talk(f"/image {photos[0]}", "一", f"/image {tmp_path}/white.png", "two", "three")
    assert answers == plain
    assert said == [
        "An image of 60 x 30 pixels is refused by the model (shape mismatch): give it another shape or format, or "
        "remove it. The question and its images are forgotten."
    ]


def test_an_answer_that_fails_halfway_is_not_kept(talk, scripted, photos):
    asked = scripted(["half", UserError("it fails")], ["b"])
    answers, said = talk(f"/image {photos[0]}", "one", "two")
    assert answers == ["half", "b"] and said == ["It fails"]
    assert texts(asked[1][0]) == ["[image]two"], "the picture waits for the next question"


def test_a_gpu_without_memory_is_said(talk, scripted):
    scripted([torch.OutOfMemoryError()], ["a"])
    answers, said = talk("one", "two")
    assert answers == ["a"] and "memory does not hold the conversation: type /reset" in said[0]


def test_help_is_in_both_languages(talk):
    said = "\n".join(talk("/help")[1])
    assert all(command in said for command in ("/image PATH", "/reset", "/quit", "清空对话", "给下一个问题加图片"))


# ------------------------------------------------------------------------------------------------- captions (stage 1)


def test_a_captioner_says_that_it_ignores_words_and_captions_each_image_by_itself(talk, scripted, photos):
    asked = scripted(["a cat"], ["a cat"], ["two dogs"])
    answers, said = talk("", f"/image {photos[0]}", "", "what is it?", f"/image {photos[1]}", "", template="plain")
    assert answers == ["a cat", "a cat", "two dogs"]
    assert said == [
        "This bundle's template shows the model images only: words are ignored, and Enter asks for a caption."
    ]
    assert [(len(messages), len(images)) for messages, images in asked] == [(1, 1)] * 3


def test_a_captioner_needs_an_image(talk):
    answers, said = talk("什么？", template="plain")
    assert answers == [] and said[1] == "There is no image to describe: give one."


# -------------------------------------------------------------------------------------------------------- one question


def test_a_question_of_the_command_line_is_answered_alone_on_standard_output(bundle, loaded, photos, capsys):
    chat(bundle, photos[:1], "这是什么？", {"max_new_tokens": 5})
    content = [{"type": "image"}, {"type": "text", "text": "这是什么？"}]
    rows = [{"messages": [{"role": "user", "content": content}], "images": photos[:1]}]
    assert capsys.readouterr().out == answer(*loaded["ziya"], rows, max_new_tokens=5)[0] + "\n"


def test_settings_of_the_recipe_hold(bundle, loaded, capsys):
    chat(bundle, [], "你好", {})
    rows = [{"messages": [{"role": "user", "content": "你好"}], "images": []}]
    assert capsys.readouterr().out == answer(*loaded["ziya"], rows, max_new_tokens=8)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"images": ["nope.png"]}, "the image nope.png was not found"),
        ({"options": {"max_new_token": 1}}, 'did you mean "max_new_tokens"'),
        ({"question": "  "}, "The question is empty"),
        ({"bundle": "nowhere"}, "'nowhere' is no bundle"),
    ],
)
def test_what_is_wrong_with_the_command_is_an_error(bundle, arguments, says):
    with pytest.raises(UserError, match=says):
        chat(**{"bundle": bundle, "images": [], "question": "hi", "options": {}, **arguments})


# ---------------------------------------------------------------------------------------------------------------- paths


def test_control_characters_do_not_reach_the_terminal():
    assert harmless("猫\x1b[2J\ta\r\n🙂") == "猫\ufffd[2J\ta\ufffd\n🙂"


# ------------------------------------------------------------------------------------------------------- real processes


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_command_through_pipes(bundle, photos):
    lines = f"你好\n/image {photos[0]}\n这是什么？\n/imag\n"
    done = subprocess.run(
        [*CLI, "chat", bundle, "--set", "max_new_tokens=4"], input=lines.encode(), capture_output=True,
        env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.decode()
    assert "did you mean /image?" in done.stderr.decode() and "Traceback" not in done.stderr.decode()


def test_the_generate_command_answers_what_it_can_and_ends_with_code_2(bundle, photos, tmp_path, monkeypatch, capsys):
    rows = [{"image": photos[0], "question": "这是什么？"}, {"image": "nope.png", "question": "?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["generate", bundle, str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", ["vlm-sft", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ended.value.code == 2
    assert 'error: 1 of 2 rows could not be answered, the first is "2"' in capsys.readouterr().err
    assert lines[0]["answer"] and "nope.png" in lines[1]["error"]


@pytest.mark.slow
def test_the_command_at_a_terminal(bundle, photos):
    """Ctrl-C at the prompt tells how to leave, Ctrl-D leaves, and the prompt counts the images."""
    main, other = pty.openpty()
    command = [*CLI, "chat", bundle, "--image", photos[0], "--set", "max_new_tokens=4"]
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment(), start_new_session=True,
        # Tests that run in the background ignore interrupts, and programs inherit that; at a terminal none does.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(other)
    screen = Screen(main)
    try:
        screen.wait_for("[1 image] > ")
        os.write(main, "这是什么？\n".encode())
        screen.wait_for("\n> ")
        assert "这是什么？" in screen.text
        screen.wait_for("type /quit or press Ctrl-D", again=lambda: os.kill(process.pid, signal.SIGINT))
        os.write(main, f"/image {photos[1]}\n".encode())
        screen.wait_for("Added (40 x 30)")
        screen.wait_for("[1 image] > ")
        os.write(main, b"\x04")
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in screen.text
    finally:
        process.kill()
        os.close(main)


class Screen:
    """What a process wrote to a terminal."""

    def __init__(self, file: int) -> None:
        self.file, self.text, self._seen = file, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def wait_for(self, words: str, seconds: float = 300.0, again: Callable[[], None] | None = None) -> None:
        """Reads until `words` come after what was waited for last.

        `again` is done now and every five seconds, as a person presses a key again that had no effect: readline
        overlooks an interrupt that comes between the prompt and its first wait for a key.
        """
        end, next_time = time.monotonic() + seconds, time.monotonic()
        while words not in self.text[self._seen :]:
            assert time.monotonic() < end, f"no {words!r} in {self.text!r}"
            if again and time.monotonic() >= next_time:
                again()
                next_time = time.monotonic() + 5
            if select.select([self.file], [], [], 0.2)[0]:
                self.text += self._decoder.decode(os.read(self.file, 4096)).replace("\r", "")
        self._seen = self.text.index(words, self._seen) + len(words)


def test_boxes_in_questions_are_those_of_the_picture_where_the_command_says_so(loaded, photos, monkeypatch):
    asked = []

    def stream(model, processor, messages, images):
        asked.append(messages)
        yield from ()

    monkeypatch.setattr(chat_module, "stream_answer", stream)
    picture = Image.open(photos[0]).convert("RGB")
    for boxes, types in (("pixels", ["image", "text", "box", "text"]), (None, ["image", "text"])):
        talk = Conversation(*loaded["ziya"], {}, [("", picture)], boxes)
        list(talk.ask("What is [1, 2, 3, 4]?"))
        assert [part["type"] for part in asked[-1][0]["content"]] == types
    with pytest.raises(UserError, match="which has no width or height"):
        Conversation(*loaded["ziya"], {}, [("", picture)], "pixels").ask("[3, 2, 1, 4]")
