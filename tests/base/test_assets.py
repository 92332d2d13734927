"""Finding what ships, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from support.paths import ROOT, accelerate_config
from vlm_sft.base import assets
from vlm_sft.base.errors import UserError


def test_lists_are_what_the_folders_hold() -> None:
    assert assets.list_recipes() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert assets.list_templates() == sorted(path.stem for path in (ROOT / "chat_templates").glob("*.jinja"))
    assert {"ziya", "plain", "vicuna_v1"} <= set(assets.list_templates())


def test_every_name_is_found() -> None:
    for name in assets.list_recipes():
        assert assets.recipe_path(name).is_file()
    for name in assets.list_templates():
        assert assets.template_path(name).is_file()


def test_packaged_folder_wins_over_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_assets" / "recipes" / "deeper").mkdir(parents=True)
    (tmp_path / "_assets" / "recipes" / "deeper" / "one.yaml").write_text("a: 1\n")
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path)
    assert assets.list_recipes() == ["deeper/one"]
    assert assets.recipe_path("deeper/one").read_text() == "a: 1\n"


def test_template_may_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "我的模板.jinja"
    path.write_text("x", encoding="utf-8")
    assert assets.template_path(str(path)) == path


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (assets.recipe_path, "zia_stage1", 'there is no recipe "zia_stage1"; the closest that ships is "ziya_stage1".'),
        (assets.template_path, "vicuna", 'there is no chat template "vicuna"; the closest that ships is "vicuna_v1".'),
        (
            assets.template_path,
            "mine/zia.jinja",
            'the chat template file "mine/zia.jinja" does not exist; the closest that ships is "ziya".',
        ),
        (
            assets.template_path,
            "0000",
            'there is no chat template "0000"; these ship: aria, aya_vision, blip2_caption,',
        ),
    ],
)
def test_wrong_names(find, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        find(name)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("cpu", "NO", 1), ("cpu_2", "MULTI_GPU", 2), ("single_gpu", "NO", 1), ("ddp", "MULTI_GPU", 8)],
)
def test_accelerate_reads_its_configs(name: str, kind: str, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = accelerate_config(name)
    config = load_config_from_file(str(path))
    assert (str(config.distributed_type.value), config.num_processes) == (kind, processes)
    assert config.use_cpu is name.startswith("cpu")
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no", "the recipe decides"
