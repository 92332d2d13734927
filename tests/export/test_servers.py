"""Other servers on an export: which program is started, with what."""

from __future__ import annotations

import json
import os
import stat

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.export import servers

SCRIPT = """#!{python}
import json, os, sys
names = ("VLLM_API_KEY", "HF_HUB_OFFLINE")
print(json.dumps([sys.argv[1:], os.getcwd(), {{name: os.environ.get(name) for name in names}}]))
"""


@pytest.fixture
def export(tmp_path):
    """A folder that looks like an export."""

    def make(name="猫", kind="llava"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
        return tmp_path / name

    return make


@pytest.fixture
def started(tmp_path, monkeypatch):
    """What becomes of this process, asked in a child."""
    import sys

    for name in ("vllm", "transformers"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(SCRIPT.format(python=sys.executable))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(servers.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def run(engine, folder, key=None, **more):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.dup2(write, 1)
                servers.start(engine, str(folder), "127.0.0.1", 8123, key, local=True, images=3, batch_size=5, **more)
            finally:
                os._exit(9)
        os.close(write)
        with os.fdopen(read) as told:
            text = told.read()
        assert os.waitpid(child, 0)[1] == 0
        return json.loads(text)

    return run


def test_vllm_gets_name_bounds_folder_and_key(export, started, tmp_path) -> None:
    folder = export()
    given, _, environment = started("vllm", folder, "a-key-of-ours-1", image_folders=(str(tmp_path),))
    assert given[:2] == ["serve", str(folder)] and "a-key-of-ours-1" not in given
    options = dict(zip(given[2::2], given[3::2], strict=True))
    assert options == {
        "--served-model-name": "猫", "--host": "127.0.0.1", "--port": "8123", "--max-num-seqs": "5",
        "--limit-mm-per-prompt": '{"image": 3}', "--allowed-local-media-path": str(tmp_path),
        "--allowed-media-domains": "nowhere.invalid",
    }  # fmt: skip
    assert environment["VLLM_API_KEY"] == "a-key-of-ours-1"
    given, _, _ = started("vllm", export("blip", "blip-2"), trust_remote_code=True, allow_urls=True)
    assert "--allowed-media-domains" not in given
    assert '{"image": 1}' in given and given[-1] == "--trust-remote-code"


def test_transformers_is_started_beside_the_folder(export, started) -> None:
    folder = export()
    given, place, environment = started("transformers", folder)
    assert given == ["serve", "猫", "--host", "127.0.0.1", "--port", "8123"] and place == str(folder.parent)
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_what_cannot_be_started_is_one_sentence(export, tmp_path, monkeypatch) -> None:
    def start(engine, folder, key=None, **more):
        servers.start(engine, str(folder), "127.0.0.1", 1, key, **{"local": True, "images": 1, "batch_size": 1, **more})

    folder = export()
    with pytest.raises(UserError, match="--engine transformers asks for no key"):
        start("transformers", folder, "a-key-of-ours-1")
    with pytest.raises(UserError, match="knows no --image-folder"):
        start("transformers", folder, image_folders=("a",))
    with pytest.raises(UserError, match="reads every file and URL that a client names"):
        start("transformers", folder, local=False)
    with pytest.raises(UserError, match="one --image-folder alone"):
        start("vllm", folder, image_folders=("a", "b"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="there is no program vllm here: install it in an environment of its own"):
        start("vllm", folder)
    (folder / "bundle.json").write_text("{}")
    with pytest.raises(UserError, match="is a bundle, which --engine vllm cannot read"):
        start("vllm", folder)
    for text in ("[", "[]"):
        (bad := tmp_path / f"bad{len(text)}").mkdir()
        (bad / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"has no config.json that can be read"):
            start("vllm", bad)
