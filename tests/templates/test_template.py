"""Chat templates as files: which ship, what each says of itself, and what is wrong with one of somebody's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.paths import ROOT
from support.template_texts import AROUND, CHINESE, ENGLISH, IMAGE, assistant, refusal, user
from vlm_sft.base.assets import list_templates, template_path
from vlm_sft.templates.render import render, render_chat
from vlm_sft.templates.template import end_of_answer, load_template, owns_bos

DOCS = ROOT / "docs" / "chat_templates.md"


def test_every_template_that_ships_is_tested() -> None:
    assert sorted(AROUND) == list_templates()


def test_tokens_of_the_tokenizer_are_used() -> None:
    for name, (_, after) in AROUND.items():
        ends = render(CHINESE, name, eos_token="<eos>").supervised[-1]
        assert ends.endswith(after.replace("</s>", "<eos>"))
        assert end_of_answer(name) == after
        assert end_of_answer(name, eos_token="<eos>") == after.replace("</s>", "<eos>")
    own = {"blip2_caption", "blip2_vqa", "instructblip", "gemma3", "kosmos2", "paligemma", "smolvlm", "aya_vision",
           "gemma4", "janus", "vipllava", "idefics2", "deepseek_ocr2", "mistral3", "lfm2_vl", "molmo2", "llama4",
           "cohere2_vision", "perception_lm", "mllama"}  # fmt: skip
    assert {name for name in AROUND if owns_bos(name)} == own
    assert not owns_bos("{# bos_token #}{% generation %}{% endgeneration %}")


# -- own templates -----------------------------------------------------------------------------------------------------

OWN = """{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
Q: {% for p in m['content'] %}{{ image_token if p['type'] == 'image' else p['text'] }}{% endfor %} A:
{%- elif m['role'] == 'assistant' -%}
{%- set said -%}{%- generation -%}{{ ' ' + m['content'][0]['text'] + eos_token }}{%- endgeneration -%}{%- endset -%}
{{ said }}
{%- endif -%}
{%- endfor -%}
"""


def test_own_template_from_source_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(OWN, encoding="utf-8")
    messages = [user("看", IMAGE), assistant("猫")]
    expected = ("Q: 看<image> A: 猫</s>", [(14, 20)])  # exact although the marker is inside a set block
    assert load_template(file) == load_template(str(file)) == load_template(OWN) == OWN
    for template in (OWN, file, str(file)):
        assert render_chat(messages, template) == expected
    assert end_of_answer(file) == "</s>"
    assert end_of_answer(OWN.replace(" + eos_token", "")) == ""


def test_the_end_of_an_answer_is_rendered_once_and_anew_for_a_file_that_changed(tmp_path: Path, monkeypatch) -> None:
    rendered = []
    monkeypatch.setattr("vlm_sft.templates.template.render", lambda *a, **o: rendered.append(a) or render(*a, **o))
    file = tmp_path / "own.jinja"
    file.write_text(OWN.replace("eos_token", "'[完]'"), encoding="utf-8")
    assert [end_of_answer(file) for _ in range(3)] == ["[完]"] * 3 and len(rendered) == 1
    file.write_text(OWN.replace("eos_token", "'[end]'"), encoding="utf-8")
    assert end_of_answer(file) == end_of_answer(str(file)) == "[end]"
    assert end_of_answer(OWN, eos_token="<a>") + end_of_answer(OWN, eos_token="<b>") == "<a><b>"


def test_unknown_template_names_the_closest() -> None:
    assert refusal("vicuna") == 'there is no chat template "vicuna"; the closest that ships is "vicuna_v1".'
    assert "no/such/ziya.jinja" in refusal("no/such/ziya.jinja")
    assert "cannot be read (No such file or directory)" in refusal(Path("no/such/ziya.jinja"))


def test_unreadable_template(tmp_path: Path) -> None:
    file = tmp_path / "latin.jinja"
    file.write_bytes("é".encode("latin-1"))
    assert "it is not UTF-8 text" in refusal(file)


def test_templates_that_lose_something() -> None:
    literal = OWN.replace("image_token if", "'<image>' if")  # as in templates made for other processors
    assert "prints 0 image placeholders for 1 images; let it print {{ image_token }} once" in refusal(literal)
    unsaid = OWN.replace("m['content'][0]['text']", "'well'")
    assert "prints the answer outside its generation markers" in refusal(unsaid)
    asks_otherwise = OWN + "{%- if add_generation_prompt -%}{{ ' Bot:' }}{%- endif -%}"
    assert "asks for an answer with 'Q: <image>question A: Bot:'" in refusal(asks_otherwise)
    nested = "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}"
    assert "generation markers inside generation markers" in refusal(nested, ENGLISH)
    inside = "{% generation %}{{ image_token }}{% endgeneration %}"
    assert "prints an image inside its generation markers" in refusal(inside, ENGLISH)


def test_the_pages_own_template_works() -> None:
    source = DOCS.read_text(encoding="utf-8").split("```jinja\n")[1].split("```")[0]
    assert load_template(source) == source
    assert end_of_answer(source) == "</s>"
    assert all(template_path(name).read_text(encoding="utf-8").startswith(f"{{#-\n{name}: ") for name in AROUND)


def test_no_torch_is_needed() -> None:
    check = "import sys, vlm_sft.templates.template as c; c.load_template('ziya'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
