"""Every command that builds a recipe's model begins with the same questions."""

from __future__ import annotations

import sys

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.recipe.opening import open_recipe


def test_overrides_count_and_code_needs_the_users_word(recipe_file, pieces):
    own = {"pretrained": pieces["llama"], "trust_remote_code": True}
    path = str(recipe_file(stack={"vision_tower": {"pretrained": pieces["blip2"]}, "projector": {"type": "linear"},
                                  "language_model": own}))  # fmt: skip
    with pytest.raises(UserError, match=r"wants to run Python code .* allow it with --trust-remote-code"):
        open_recipe(path, [], False)
    assert open_recipe(path, ["sft.max_steps=7"], True).sft["max_steps"] == 7


def test_a_folder_has_no_revision(recipe_file):
    with pytest.raises(UserError, match=r"is a folder here and has no revisions; remove stack\.language_model\.rev"):
        open_recipe(str(recipe_file()), ["stack.language_model.revision=main"], False)


@pytest.mark.parametrize("command", ["cache", "preflight", "train"])
def test_the_commands_refuse_the_same(command, recipe_file, monkeypatch, capsys):
    from vlm_sft.cli import main as cli

    words = ["cache", "build"] if command == "cache" else [command]
    arguments = ["vlm-sft", *words, str(recipe_file()), "stack.language_model.revision=主干"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "is a folder here and has no revisions" in line
