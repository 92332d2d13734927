"""Bundles on the Hugging Face Hub: pushed whole but for what others published, fetched by name and revision.

`huggingface_hub` does the talking. What is here decides which files go, says each failure in one sentence, and keeps
tokens out of everything.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..base.console import make_console
from ..base.errors import UserError, find_secrets, refused_by_library
from ..base.hub import LOGIN, TRIES, look_for_hub, one_sentence, patiently
from ..base.limits import limits
from ..base.names import (
    ADAPTER,
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    CURVES,
    MANIFEST,
    METRICS,
    PROCESSOR_CONFIG,
    RECIPE,
    SCORES,
    TEMPLATE,
    TRAINED,
    Json,
)
from ..base.progress import waiting
from ..base.whole_files import open_regular, read_bytes, read_text, write_json
from ..base.words import one_line
from ..recipe.yaml_file import YamlFile, dump_yaml, texts_in
from .card import without_folders, write_card
from .manifest import read_manifest
from .run_folder import nearest_bundle

# What a bundle consists of. Anything else in its folder stays where it is: optimizer states, checkpoints, logs.
SHARED = (
    *(MANIFEST, RECIPE, TRAINED, ADAPTER_CONFIG, ADAPTER, f"merged_*/{ADAPTER_CONFIG}", f"merged_*/{ADAPTER}"),
    *(CONFIG, "generation_config.json", PROCESSOR_CONFIG, "preprocessor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *(TEMPLATE, "qformer_tokenizer/*", METRICS, SCORES, CURVES, CARD),
)
# Vocabularies have up to a million words.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
TEXTS = (".json", ".yaml", ".md", ".jinja", ".txt")
PICTURES = (".png", ".jpg")


# -- pushing -----------------------------------------------------------------------------------------------------------


def push_bundle(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    max_tries: int = TRIES,
    rows: bool = False,
) -> str:
    """Pushes a bundle, with a card for its new home. The folder is left as it is.

    Args:
        folder: The bundle.
        repo_id: `name/repository`; made if it is not there.
        private: Whether a new repository is private; default as the account has it.
        revision: Branch to push to, made if it is not there; default `main`.
        message: What the commit says.
        max_tries: How often what may pass (too many requests, a server in trouble, a broken line) is tried.
        rows: Pushes the questions and answers of the test set too, which stand in `eval.json`.

    Returns:
        The address of the commit.

    Raises:
        UserError: The folder is no bundle, a file holds a token, or the Hub refuses.
    """
    folder = Path(folder)
    read_manifest(folder)
    check_repo_id(repo_id)
    api = HfApi(library_name="vlm_sft")
    what = message or f"Push {folder.resolve().name} with vlm_sft"

    def push(stage: Path) -> str:
        full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(full, branch=revision, exist_ok=True)
        done = api.upload_folder(repo_id=full, folder_path=stage, revision=revision, commit_message=what)
        return done.commit_url

    untouched = f"; the bundle in {str(folder)!r} is as it was"
    with staged(folder, repo_id, rows) as stage, one_sentence(repo_id, after=untouched):
        return patiently(lambda: push(stage), max_tries)


@contextmanager
def staged(folder: Path, repo_id: str, rows: bool = False) -> Iterator[Path]:
    """A folder beside the bundle with what goes to the Hub: links to its files, mappings without this machine's folders
    (and without rows of the test set, unless `rows`), and a card that names the repository.

    Raises:
        UserError: A file holds a token.
    """
    parent = folder.resolve().parent  # on the same disk, where links cost nothing; elsewhere if it cannot be written
    where = parent if os.access(parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".vlm-sft-push-", dir=where) as name:
        stage = Path(name)
        for path in shared_files(folder):
            goal = stage / path.relative_to(folder)
            goal.parent.mkdir(exist_ok=True)
            if not _write_cleaned(path, goal, rows):
                try:  # a hard link survives when a checkpoint is deleted during its push
                    os.link(path.resolve(), goal)
                except OSError:  # no hard link leads to another disk
                    goal.symlink_to(path.resolve())
        with refused_by_library(f"{str(folder)!r} cannot be pushed, for what its {MANIFEST} says"):
            manifest = without_folders(without_rows(read_manifest(folder)))
            recipe = without_folders(YamlFile.read(folder / RECIPE).data)
            for name in (MANIFEST, RECIPE, CARD):
                (stage / name).unlink(missing_ok=True)  # the link alone: what it leads to is the bundle's own
            write_json(stage / MANIFEST, manifest)
            (stage / RECIPE).write_text(dump_yaml(recipe), encoding="utf-8")
            write_card(stage, repo_id)
        refuse_tokens(stage)
        yield stage


def _write_cleaned(path: Path, goal: Path, rows: bool) -> bool:
    """Writes a JSON file without folders and rows; False where there is nothing to leave out, or no such file."""
    if path.suffix != ".json" or path.name in VOCABULARIES or path.name == MANIFEST:
        return False
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is no JSON ({one_line(error)}); mend it, then push.") from None
    kept = content if rows or path.name != SCORES or not isinstance(content, dict) else {**content, "wrong": None}
    if (cleaned := without_folders(kept)) == content:
        return False
    write_json(goal, cleaned)
    return True


def without_rows(manifest: Json) -> Json:
    """The same without what the ledger quotes: sentences on single rows, which may name files and what they hold."""
    for ledger in manifest.get("ledger", {}).values():
        for source in ledger["sources"].values():
            source |= {"examples": {}, "met": {}}
    return manifest


def shared_files(folder: Path) -> list[Path]:
    """The files of a bundle that are pushed."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    # A star of `fnmatch` goes past slashes, so the depth is compared too.
    return [
        path
        for name, path in found.items()
        if any(len(name.parts) == pattern.count("/") + 1 and fnmatch(name.as_posix(), pattern) for pattern in SHARED)
    ]


def refuse_tokens(folder: Path, then: str = "push") -> None:
    """Refuses a folder of which a text file holds a token, password or key; the secret itself is not repeated.

    Args:
        folder: The folder, of which folders within it are looked at too.
        then: What was to be done with it, for the message.

    Raises:
        UserError: One does.
    """
    own = get_token()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in PICTURES and path.is_file():
            is_text = path.suffix in TEXTS
            words = path.name in VOCABULARIES or not is_text
            seen = (own, words, sha256(_said(path)).digest())
            if seen in _CLEAN:  # every checkpoint has the same tokenizer
                continue
            texts = _texts_of(path)
            found = next(find_secrets(texts, words, forms=is_text), None)
            found = found or (("the token in use", "") if own and own in texts[0] else None)
            if found:
                raise UserError(
                    f"{path.name} holds what looks like a token, a password or a key ({found[0]}); remove it there, "
                    f"then {then}."
                )
            _CLEAN.add(seen)


def _said(path: Path) -> bytes:
    """The bytes of a file; of safetensors those that are no numbers: names, and what its writer noted."""
    if path.suffix != ".safetensors":
        return read_bytes(path)
    with open_regular(path) as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), limits().text_bytes))


_CLEAN: set[tuple[str | None, bool, bytes]] = set()


def _texts_of(path: Path) -> list[str]:
    """What a file says: its text, and in JSON and YAML the values as they are read, whatever hides them in the text."""
    text = _said(path).decode(errors="replace")
    if path.name in VOCABULARIES or path.suffix not in TEXTS:
        return [text]
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text) if path.suffix == ".yaml" else []
    except (ValueError, RecursionError, yaml.YAMLError):
        values = []
    return [text, *texts_in(values)]


# -- fetching ----------------------------------------------------------------------------------------------------------


def find_bundle(bundle: str | Path, revision: str | None = None) -> Path:
    """The folder of a bundle: itself, or where a repository of the Hub was fetched to.

    Args:
        bundle: A folder, `name/repository` or `name/repository@revision`.
        revision: Branch, tag or commit of the repository.

    Raises:
        UserError: It is neither a folder nor to be had from the Hub.
    """
    if Path(bundle).exists():
        if revision is not None:
            raise UserError(f"{str(bundle)!r} is a folder and has no revisions; leave out the revision {revision!r}.")
        return Path(bundle)
    repo_id, _, at = str(bundle).partition("@")
    if not is_repo_id(repo_id):
        return Path(bundle)  # a path that is not there, which is said where it is read
    near = nearest_bundle(repo_id)
    meant = f" (did you mean {near!r}?)" if near else ""
    look_for_hub()
    said = one_sentence(repo_id, before=f"{repo_id!r} is no folder here{meant}. ")
    with said, waiting(make_console(), f"Fetching {repo_id}"):
        wanted = revision or at or None
        return Path(patiently(lambda: snapshot_download(repo_id, revision=wanted, allow_patterns=list(SHARED))))


def is_repo_id(text: str) -> bool:
    """Whether a text has the form `name/repository`."""
    return is_name(text) and text.count("/") == 1


def is_name(text: str) -> bool:
    """Whether a text can be the name of a repository: `repository` (old ones) or `name/repository`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def is_fetched(folder: Path) -> bool:
    """Whether a folder is a repository in the cache of `huggingface_hub`."""
    folder = folder.resolve()
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


# -- what can go wrong -------------------------------------------------------------------------------------------------


def check_repo_id(repo_id: str) -> None:
    """Raises a UserError when a text cannot be the name of a repository."""
    if not is_name(repo_id):
        raise UserError(f"{repo_id!r} cannot be a repository of the Hub; write name/repository.")


def check_access(repo_id: str) -> None:
    """Asks the Hub, before training, whether the token at hand may push there.

    Raises:
        UserError: There is no network, no token, or no right to write; it says how to train without the Hub.
    """
    way_out = "; or remove `hub` from the recipe and push later with `vlm-sft push`"
    check_repo_id(repo_id)
    api = HfApi(library_name="vlm_sft")
    with one_sentence(repo_id, after=way_out):
        who = patiently(api.whoami)
        try:
            patiently(lambda: api.auth_check(repo_id, write=True))
        except RepositoryNotFoundError:
            _check_namespace(repo_id, who, way_out)


def _check_namespace(repo_id: str, who: Json, way_out: str) -> None:
    """A repository that is not there yet can be made under one's own name or an organisation's."""
    names = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
    role = (who.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"The token of {who['name']!r} may only read; {LOGIN}{way_out}.")
    if "/" in repo_id and repo_id.split("/")[0] not in names:
        raise UserError(
            f"hub.repo_id {repo_id!r} is not under a name of the token's owner ({', '.join(names)}); correct it"
            f"{way_out}."
        )
