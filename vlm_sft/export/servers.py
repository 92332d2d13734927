"""Other people's servers on a native export, started in place of ours with what ours was told."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ..base.errors import UserError
from ..base.names import MANIFEST, Json
from ..base.whole_files import read_text

ENGINES = ("own", "vllm", "transformers")
NOWHERE = "nowhere.invalid"  # no URL leads there; without a domain vLLM fetches whatever a client names


def start(
    engine: str,
    export: str,
    host: str,
    port: int,
    key: str | None,
    *,
    local: bool,
    images: int,
    batch_size: int,
    allow_urls: bool = False,
    image_folders: tuple[str, ...] = (),
    trust_remote_code: bool = False,
) -> NoReturn:
    """Becomes another server; this program ends with it.

    Args:
        engine: vllm or transformers.
        export: Folder that `vlm-sft export` wrote.
        host, port: Where to listen.
        key: That clients must send; it is handed on in the environment.
        local: Whether that address is this machine's own alone.
        images: The most of a request.
        batch_size: Answers written at a time.
        allow_urls: Whether images of URLs are fetched.
        image_folders: In which files may be named.
        trust_remote_code: Lets the engine run code that lies in the export.

    Raises:
        UserError: The folder is no native export, or the engine is not installed or lacks what was asked for.
    """
    config = config_of(export, engine)
    folder = Path(export).expanduser().resolve()
    environment = dict(os.environ)
    if engine == "vllm":
        most = 1 if config.get("model_type") == "blip-2" else images  # vLLM's class takes one image alone
        command = ["serve", str(folder), "--served-model-name", folder.name, "--host", host, "--port", str(port)]
        command += ["--max-num-seqs", str(batch_size), "--limit-mm-per-prompt", json.dumps({"image": most})]
        if len(image_folders) > 1:
            raise UserError("--engine vllm reads files of one --image-folder alone: give one that holds them all.")
        command += ["--allowed-local-media-path", str(Path(image_folders[0]).resolve())] if image_folders else []
        command += [] if allow_urls else ["--allowed-media-domains", NOWHERE]
        if key is not None:
            environment["VLLM_API_KEY"] = key
    else:
        if key is not None:
            raise UserError("--engine transformers asks for no key: take another engine, or leave the key out.")
        if image_folders or not local:
            what = "knows no --image-folder" if image_folders else "reads every file and URL that a client names"
            mend = "leave it out" if image_folders else "leave --host at 127.0.0.1"
            raise UserError(f"--engine transformers {what}: take another engine, or {mend}.")
        # It looks a model up by its name, which is its folder's where it is started, and takes no stroke in it.
        command = ["serve", folder.name, "--host", host, "--port", str(port)]
        environment |= {"HF_HUB_OFFLINE": "1"}
        os.chdir(folder.parent)
    command += ["--trust-remote-code"] if trust_remote_code else []
    os.execve(_program(engine), [engine, *command], environment)  # noqa: S606 - that is the point


def config_of(export: str, engine: str) -> Json:
    """The `config.json` of a native export.

    Raises:
        UserError: The folder is something else.
    """
    folder = Path(export).expanduser()
    if (folder / MANIFEST).is_file():
        raise UserError(
            f"{export!r} is a bundle, which --engine {engine} cannot read: write a native one with `vlm-sft export "
            f"{export} OUT --to {engine}` and serve OUT."
        )
    try:
        config = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, Mapping):
        raise UserError(f"{export!r} has no config.json that can be read: give a folder that `vlm-sft export` wrote.")
    return dict(config)


def _program(engine: str) -> str:
    beside = Path(sys.executable).with_name(engine)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(engine)
    if found is None:
        mend = "pip install 'vlm-sft[serve]'" if engine == "transformers" else "install it in an environment of its own"
        raise UserError(f"--engine {engine}: there is no program {engine} here: {mend}, and put it on the PATH.")
    return found
