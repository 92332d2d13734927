"""Keys of a recipe set in its file, with everything else as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlm_sft.base.assets import assets_root
from vlm_sft.base.errors import UserError
from vlm_sft.machine.recipe_edit import set_keys

CHANGES = {
    ("sft", "per_device_train_batch_size"): 2,
    ("sft", "gradient_accumulation_steps"): 8,
    ("sft", "activation_checkpointing"): True,
    ("sft", "max_length"): 777,
    ("quantization",): {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ("generation", "max_new_tokens"): 9,
}
TEXTS = {
    "block": "# 标题\nmodel: {pretrained: a/b} # 模型\n\nsft: # how\n  output_dir: o # 输出\n  max_length: 2048 # t\n",
    "flow": "model: {pretrained: a/b}\nsft: {output_dir: out, max_length: 2048} # all\n# end\n",
    "spread": "sft:\n  {\n    output_dir: out, # here\n    max_length: 2048,\n  }\nmodel:\n  pretrained: a/b\n",
    "last": "model:\n    pretrained: a/b\n\n    # about the steps\nsft:\n    output_dir: o\n    # the end, no break",
    "lists": "data:\n  train:\n    - {path: x, format: vqa}\n    - path: y\n      format: vqa\nsft: {output_dir: o}\n",
}


def merged(data: dict, changes: dict) -> dict:
    for path, value in changes.items():
        here = data
        for name in path[:-1]:
            here = here.setdefault(name, {})
        here[path[-1]] = value
    return data


@pytest.mark.parametrize("name", TEXTS)
def test_values_change_and_comments_stay(name, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXTS[name], encoding="utf-8")
    set_keys(path, CHANGES)
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == merged(yaml.safe_load(TEXTS[name]), CHANGES)
    comments = [line[line.index("#") :] for line in TEXTS[name].splitlines() if "#" in line]
    assert all(comment in text for comment in comments)
    set_keys(path, CHANGES)
    assert path.read_text(encoding="utf-8") == text, "twice is as once"


@pytest.mark.parametrize("shipped", sorted((assets_root() / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_can_be_changed(shipped: Path, tmp_path):
    text = shipped.read_text(encoding="utf-8")
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    set_keys(path, CHANGES)
    changed = path.read_text(encoding="utf-8")
    assert yaml.safe_load(changed) == merged(yaml.safe_load(text), CHANGES)
    kept = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in changed.splitlines() if line.lstrip().startswith("#")] == kept


def test_what_cannot_be_changed_is_left_as_it_is(tmp_path):
    path = tmp_path / "r.yaml"
    text = "base: &base {output_dir: out}\nsft: *base\n"
    path.write_text(text)
    with pytest.raises(UserError, match="set the keys by hand"):
        set_keys(path, {("sft", "max_length"): 9})
    assert path.read_text() == text
