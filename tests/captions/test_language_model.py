"""Prompts go to the language model as its own library would send them, and to no other server than the one named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from support.chat_server import ChatServerDouble
from support.flant5 import write_flant5
from support.tiny_pieces import make_tokenizer
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.captions.language_model import Served, is_server, load_language

PROMPTS = ["What is this?", "这是什么？ A dog, or a cat on the grass?"]
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def own(folder, texts, special, **settings):
    """What transformers' own class writes to each text by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = make_tokenizer()
    said = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special, return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=False, pad_token_id=0, **settings)[0]
        said.append(" ".join(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()))
    return said


def test_a_model_without_a_template_goes_on_with_the_prompt(pieces):
    with load_language(pieces["llama"], {"max_new_tokens": 9}) as llm:
        assert llm(PROMPTS) == own(pieces["llama"], PROMPTS, True, max_new_tokens=9)


@pytest.mark.parametrize("place", ["file", "tokenizer"])
def test_its_own_chat_template_is_used_wherever_it_lies(pieces, tmp_path, place):
    folder = shutil.copytree(pieces["llama"], tmp_path / "llama")
    if place == "file":
        (folder / "chat_template.jinja").write_text(CHATML)
    else:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHATML}))
    rendered = [f"<|user|>{prompt}\n<|assistant|>" for prompt in PROMPTS]
    with load_language(str(folder), {"max_new_tokens": 9}) as llm:
        assert llm(PROMPTS) == own(folder, rendered, False, max_new_tokens=9)
        (typed,) = llm(["</s> is what?"])  # what a question says ends nothing
        assert [typed] == own(folder, ["<|user|>< /s> is what?\n<|assistant|>"], False, max_new_tokens=9)


def test_a_template_that_would_take_the_machine_is_stopped(pieces, tmp_path):
    folder = shutil.copytree(pieces["llama"], tmp_path / "llama")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with load_language(str(folder), {}) as llm, pytest.raises(UserError, match="tried to leave its sandbox"):
        llm(PROMPTS)


def test_an_encoder_decoder_answers(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    from support.flant5 import flant5_tokenizer

    folder = write_flant5(tmp_path / "t5", num_decoder_layers=2)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval(), flant5_tokenizer()
    ids = model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    with load_language(folder, {"max_new_tokens": 6}) as llm:
        said = llm(PROMPTS)
    assert said[0] == " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()) and len(said) == 2


def test_a_prompt_that_is_too_long_takes_no_other_with_it(pieces):
    with load_language(pieces["llama"], {"max_new_tokens": 3}) as llm:
        long, short = llm(["dog " * 400, PROMPTS[0]])
    assert isinstance(long, RowError) and "the language model reads 512: shorten the question" in str(long)
    assert [short] == own(pieces["llama"], PROMPTS[:1], True, max_new_tokens=3)


def test_what_is_no_language_model_is_one_sentence(pieces, tmp_path):
    for given, says in (
        (pieces["clip"], "--llm: a 'clip_text_model' checkpoint is no causal language model"),
        (str(tmp_path / "nowhere"), "--llm"),
        (str(tmp_path), r"--llm: .* has no config\.json"),
    ):
        with pytest.raises(UserError, match=says) as refused:
            load_language(given, {})
        assert "\n" not in str(refused.value) and "stack." not in str(refused.value)
    with pytest.raises(UserError, match="no generation setting"):
        load_language(pieces["llama"], {"max_tokens": 3})


def test_a_server_is_asked_once_for_each_prompt(tmp_path):
    kept = tmp_path / "kept.jsonl"
    with ChatServerDouble(lambda prompt: f"<think>hm</think> {prompt.upper()}\n") as server:
        with Served(server.url, "m", None, {"temperature": 0.5, "max_tokens": None}, kept) as llm:
            assert llm(["a", "b", "a"]) == ["A", "B", "A"]
            assert llm(["b", "c"]) == ["B", "C"]
        with Served(server.url, "m", None, {"temperature": 0.5, "max_tokens": None}, kept) as llm:
            assert llm(["a", "c"]) == ["A", "C"]
        assert sorted(each["messages"][0]["content"] for each in server.asked) == ["a", "b", "c"]
        assert all(each["temperature"] == 0.5 and "max_tokens" not in each for each in server.asked)
        assert not any("Authorization" in headers for headers in server.headers)


def test_what_a_server_refuses_is_the_error_of_one_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with ChatServerDouble(lambda prompt: "yes") as server:
        with Served(server.url, "m", "MY_KEY", {}, tmp_path / "kept.jsonl") as llm:
            assert llm(["a"]) == ["yes"]
            server.next = [(400, {}, json.dumps({"error": {"message": "too long for sk-very-secret"}}).encode())]
            (refused,) = llm(["b"])
            assert isinstance(refused, RowError) and "The language model http" in str(refused)
            assert "correct --llm-set" in str(refused) and "secret" not in str(refused)
            server.next = [(401, {}, b"{}")]
            with pytest.raises(UserError, match="answers 401: name the variable that holds the key with --llm-key"):
                llm(["c"])
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
        assert "secret" not in (tmp_path / "kept.jsonl").read_text()


@pytest.mark.parametrize(("url", "key", "settings", "says"), [
    ("http://", None, {}, "--llm is no URL of a server"),
    ("https://me:word@host/v1", None, {}, "--llm holds a name or password: .*--llm-key"),
    ("http://localhost:1/v1", "NO_SUCH", {}, "--llm-key names no environment variable"),
    ("http://localhost:1/v1", None, {"model": "x"}, "--llm-set model is not yours"),
    ("http://8.8.8.8/v1", "MY_KEY", {}, "--llm http://8.8.8.8/v1 would get the key unencrypted"),
])  # fmt: skip
def test_a_server_that_cannot_be_asked_is_said_before_anything_is_done(url, key, settings, says, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with pytest.raises(UserError, match=says) as refused:
        Served(url, "m", key, settings, None)
    assert "word" not in str(refused.value).replace("password", "") and "secret" not in str(refused.value)


def test_what_names_a_server():
    assert is_server("http://localhost:8000/v1") and is_server("HTTPS://host/v1")
    assert not is_server("Qwen/Qwen3-0.6B") and not is_server("/models/http")
