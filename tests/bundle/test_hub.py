"""A bundle goes to the Hub and comes back the same, over real HTTP; what goes wrong is one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import save_file

from support.forge import Forge
from support.hub_server import TOKEN, HubServer
from support.paths import ROOT
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.card import without_folders
from vlm_sft.bundle.hub import check_access, find_bundle, is_fetched, push_bundle, refuse_tokens, staged

SHARE = """
import sys
import torch
import vlm_sft
from vlm_sft.inference.settings import open_bundle
from vlm_sft.cli.main import app
from vlm_sft.evaluation.evaluate import run

bundle, recipe = sys.argv[1:]

def logits(model, processor):
    ids = torch.tensor([[1, *[processor.image_token_id] * processor.num_image_tokens, 40, 41]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits

app(["push", bundle, "me/again", "--revision", "v1"], standalone_mode=False)
here = logits(*vlm_sft.load(bundle))
assert torch.equal(here, logits(*vlm_sft.load("me/again", revision="v1")))
assert torch.equal(here, logits(*open_bundle("me/again@v1", {})[:2]))
assert run("me/again@v1", recipe=recipe, max_rows=2)["questions"]["captions"] == 2
"""


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Of a program that uses this Hub."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**keep, **hub.environment(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def hub(pieces):
    """A Hub that has the tiny pieces."""
    with HubServer() as server:
        for name in ("blip2", "llama"):
            server.add(f"tiny/{name}", pieces[name])
        yield server


@pytest.fixture(scope="module")
def trained(hub, caption_file, tmp_path_factory) -> tuple[Path, str]:
    """A run of two steps on pieces of that Hub that pushes each save and its end; its bundle and all that it said."""
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "stack": {
            "vision_tower": {"pretrained": "tiny/blip2"},
            "resampler": {"type": "qformer", "pretrained": "tiny/blip2"},
            "projector": {"type": "linear"},
            "language_model": {"pretrained": "tiny/llama"},
        },
        "chat_template": "plain",
        "train": {"projector": 1.0e-2},
        "lora": {"r": 2},
        "data": {name: [{"path": caption_file, "format": "caption"}] for name in ("train", "eval", "test")},
        "sft": {
            "output_dir": str(folder / "bundle"), "max_steps": 2, "per_device_train_batch_size": 4, "bf16": False,
            "gradient_checkpointing": False, "report_to": "none", "save_steps": 1, "dataloader_num_workers": 0,
            "learning_rate": 1.0e-2,
        },
        "hub": {"repo_id": "me/lora", "private": True, "every_save": True, "license": "apache-2.0",
                "language": ["zh", "en"], "message": "The first"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    forge = Forge(environment=environment(hub, folder / "home"))
    command = [sys.executable, "-m", "vlm_sft.train", str(folder / "recipe.yaml")]
    done = forge.fork(command, env=forge.environment, capture_output=True, text=True)
    forge.close()
    assert done.returncode == 0, done.stderr
    return folder / "bundle", done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_pushes_its_saves_and_its_end(hub, trained):
    bundle, said = trained
    repo, files = hub.repos["me/lora"], hub.files("me/lora")
    assert repo.private
    assert repo.messages[1] == "Step 1: The first" and repo.messages[-1] == "The first"
    assert said.count(f"Pushed: {hub.endpoint}/me/lora/commit/") == len(repo.messages) - 1
    # "initial commit", step 1, step 2 unless step 1 was still on its way, the end
    assert len(repo.messages) == 4 - said.count("Step 2 is not pushed: an earlier checkpoint is still on its way")
    wanted = {"adapter_config.json", "adapter_model.safetensors", "bundle.json", "trained.safetensors", "curves.png"}
    assert wanted <= set(files)
    assert {"optimizer.pt", "trainer_state.json", "checkpoint-2"} <= {path.name for path in bundle.iterdir()} | {
        path.name for path in (bundle / "checkpoint-2").iterdir()
    }
    strange = ("checkpoint", "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "model.", "runs")
    assert not [name for name in files if name.startswith(strange)]
    for name in ("trained.safetensors", "adapter_model.safetensors"):
        assert files[name] == (bundle / name).read_bytes()


@pytest.mark.slow
def test_what_is_pushed_names_bases_and_no_folder_of_this_machine(hub, trained):
    bundle, _ = trained
    files = hub.files("me/lora")
    _, head, body = files["README.md"].decode().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["pipeline_tag"] == "image-text-to-text" and head["license"] == "apache-2.0"
    assert head["base_model"] == ["tiny/blip2", "tiny/llama"] and head["base_model_relation"] == "adapter"
    assert head["language"] == ["zh", "en"]
    assert 'vlm_sft.load("me/lora")' in body
    for section in ("Stages", "Frozen pieces", "Data", "Validation at step 2", "Parity", "Curves", "Recipe"):
        assert f"\n## {section}\n" in body
    commits = {name: hub.repos[f"tiny/{name}"].branches["main"] for name in ("blip2", "llama")}
    pieces = json.loads(files["bundle.json"])["pieces"]
    assert pieces["vision_tower"]["commit"] == commits["blip2"]
    assert pieces["language_model"]["commit"] == commits["llama"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny/llama"
    for name, data in files.items():
        assert str(bundle.parent).encode() not in data, name


@pytest.mark.slow
def test_a_pushed_bundle_loads_elsewhere_with_equal_logits(hub, trained, tmp_path):
    bundle, _ = trained
    before = bytes_of(bundle)
    hub.repos["tiny/llama"].commit("main", {}, "the branch moved on: the recorded commit must be asked for")
    recipe = str(bundle.parent / "recipe.yaml")
    shared = subprocess.run(
        [sys.executable, "-c", SHARE, str(bundle), recipe],
        env=environment(hub, tmp_path / "elsewhere"), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.startswith(f"{hub.endpoint}/me/again/commit/")
    assert bytes_of(bundle) == before
    assert list(bundle.parent.glob(".vlm-sft-push-*")) == []
    assert (tmp_path / "again-eval.json").is_file(), "what lies in the cache is not changed"
    assert TOKEN not in shared.stdout + shared.stderr


# -- what goes wrong, in this process: no model is needed for it -------------------------------------------------------


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A Hub that this process talks to; seconds that were slept stand in `here.slept`."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        address = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        disable_progress_bars()
        server.slept = []
        monkeypatch.setattr("time.sleep", server.slept.append)
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the files of a bundle, and others."""
    folder = tmp_path / "outputs" / "mine"
    (folder / "checkpoint-2").mkdir(parents=True)
    piece = {"pretrained": "/home/someone/llama", "path": "/home/someone/llama", "revision": None, "fingerprint": "ab"}
    source = {
        "read": 9,
        "used": 8,
        "truncated": 0,
        "rejected": {"no image": 1},
        "examples": {"no image": ["/home/someone/a.json, row 3: a secret"]},
        "met": {"a/3": "no image"},
    }
    manifest = {"ledger": {"train": {"max_rejected": 0.5, "sources": {"a": source}}}, "format": 1,
                "pieces": {"language_model": piece}, "trained": ["projector"], "held": ["projector"],
                "adapter": False, "versions": {"torch": "2"}}  # fmt: skip
    recipe = {"chat_template": "/home/someone/own.jinja", "sft": {"output_dir": "/home/someone/outputs/mine"}}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "trained.safetensors").write_bytes(os.urandom(400_000))
    (folder / "README.md").write_text("# mine\n")
    for name in ("optimizer.pt", "trainer_state.json", "checkpoint-2/bundle.json", "train.log", "model.safetensors"):
        (folder / name).write_text("stays at home")
    return folder


def test_what_others_need_not_know_stays_at_home(here, folder):
    push_bundle(folder, "me/mine", message="Mine")
    files = here.files("me/mine")
    assert set(files) == {"README.md", "bundle.json", "recipe.yaml", "trained.safetensors"}
    assert not [name for name, data in files.items() if b"/home/someone" in data or b"a secret" in data]
    assert "| a | 9 | 8 | 0 | 1 no image |" in files["README.md"].decode()
    assert files["trained.safetensors"] == (folder / "trained.safetensors").read_bytes()
    assert here.repos["me/mine"].messages[-1] == "Mine" and not here.repos["me/mine"].private
    assert (folder / "README.md").read_text() == "# mine\n"


REFUSALS = {
    "401": ({"status": 401, "X_Error_Message": "Invalid credentials in Authorization header"},
            r"The Hub does not know the token \(401\); set HF_TOKEN to a token that may write, or run `hf auth login`"),
    "403": ({"status": 403}, r"The token may not do this with 'me/mine' \(403\); use a token that may write there"),
    "404": ({"status": 404, "X_Error_Code": "RepoNotFound"},
            r"The Hub has no repository 'me/mine' that this token may see; check the name and the token"),
    "409": ({"status": 409}, r"'me/mine' was changed by someone else at the same time \(409\); push again"),
    "418": ({"status": 418}, r"The Hub refuses 'me/mine' \(status 418\); check its name and its settings"),
    "429": ({"status": 429, "Retry_After": "7"},
            r"The Hub has had too many requests \(429\); wait 7 seconds and try again"),
    "503": ({"status": 503}, r"The Hub is in trouble \(503\); try again later"),
    "cut": ({"cut": True}, r"The Hub at http://127\.0\.0\.1:\d+ cannot be reached \(\w+\); check the network"),
}  # fmt: skip
STEPS = {"create": ("POST", "/api/repos/create"), "preupload": ("POST", "/preupload/"), "batch": ("POST", "/objects/"),
         "upload": ("PUT", "/lfs/"), "commit": ("POST", "/commit/")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step"),
    # 409 while a repository is made says that it is there, which is fine.
    [(name, step) for name in REFUSALS for step in ("create", "upload") if (name, step) != ("409", "create")],
)
def test_what_the_hub_refuses_for_good_is_one_sentence(here, folder, caplog, name, step):
    failure, sentence = REFUSALS[name]
    before = bytes_of(folder.parent)
    here.fail(*STEPS[step], times=99, **failure)
    with pytest.raises(UserError, match=sentence) as caught:
        push_bundle(folder, "me/mine")
    assert str(caught.value).endswith(f"; the bundle in {str(folder)!r} is as it was.")
    assert bytes_of(folder.parent) == before
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert TOKEN not in shown and caught.value.__cause__ is None


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("failure", [{"status": 429, "Retry_After": "3"}, {"status": 503}, {"cut": True}])
def test_what_may_pass_is_tried_again(here, folder, failure, step):
    here.fail(*STEPS[step], times=2, **failure)
    push_bundle(folder, "me/mine")
    assert here.files("me/mine")["trained.safetensors"] == (folder / "trained.safetensors").read_bytes()
    assert len(here.slept) == 2
    if "Retry_After" in failure:
        assert min(here.slept) >= 3


def test_a_hub_without_xet_storage_is_told_from_one_that_is_not_there(here, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(UserError, match=r"has no Xet storage; set HF_HUB_DISABLE_XET=1; the bundle in"):
        push_bundle(folder, "me/mine")


def test_nobody_waits_longer_than_a_minute(here, folder):
    here.fail("POST", "/api/repos/create", 429, times=1, Retry_After="86400")
    push_bundle(folder, "me/mine")
    assert here.slept == [60.0]


def test_a_file_with_a_token_is_not_pushed(here, folder):
    (folder / "metrics.json").write_text(json.dumps({"note": TOKEN}))
    with pytest.raises(UserError, match=r"metrics\.json holds what looks like a token") as caught:
        push_bundle(folder, "me/mine")
    assert TOKEN not in str(caught.value)
    assert here.requests == []


KEYS = ["ghp_" + "a1B2" * 9, "postgres://me:hunter22@db/x", "AKIA" + "Q" * 16, "-----BEGIN RSA PRIVATE KEY-----"]


@pytest.mark.parametrize("secret", [*KEYS, "correct horse battery"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_no_key_of_any_service_is_pushed(here, folder, monkeypatch, secret, name):
    """Also one that JSON spells in another way, and the value of a variable that is called like a secret."""
    monkeypatch.setenv("DB_PASSWORD", "correct horse battery")
    spelled = "".join(f"\\u{ord(letter):04x}" for letter in secret)
    for written in (secret, spelled) if name.endswith("config.json") else (secret,):
        (folder / name).write_text(f'{{"猫": ["{"x " * 30_000}", "{written}"]}}', encoding="utf-8")
        with pytest.raises(UserError, match=rf"{name} holds what looks like a token, a password or a key") as caught:
            push_bundle(folder, "me/mine")
        assert secret not in str(caught.value)
    assert here.requests == []


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "vocab.bpe", "x.tiktoken", "tokenizer_secret", "trained.safetensors"]
)
def test_what_is_no_text_is_searched_for_the_values_of_secrets(folder, monkeypatch, name):
    monkeypatch.setenv("SSHPASS", "hunter2-hunter2")
    if name.endswith(".safetensors"):
        save_file({"a": torch.zeros(1)}, folder / name, metadata={"note": "hunter2-hunter2"})
    else:
        (folder / name).write_bytes(b"\xff\0 AKIAQQQQQQQQQQQQQQQQ hunter2-hunter2 " + name.encode())
    with pytest.raises(UserError, match=rf"{name} holds what looks like a token.*environment variable SSHPASS"):
        refuse_tokens(folder)
    monkeypatch.delenv("SSHPASS")
    refuse_tokens(folder)  # letters that look like a key by chance are no secret in what is no text


@pytest.mark.parametrize(
    "odd",
    [{"ledger": "x"}, {"ledger": [1]}, {"ledger": {"train": 5}}, {"ledger": {"train": {"sources": [1]}}},
     {"versions": {"torch": "\ud800"}}, {"trained": 5}, {"stages": {"a": 1}}, {"train_rows": "x"}],
    ids=range(8),
)  # fmt: skip
def test_odd_values_of_a_manifest_are_pushed_or_one_sentence(folder, odd):
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | odd))
    with contextlib.suppress(UserError), staged(folder, "me/mine"):
        pass


ROOTS = ["/home", "/gpfs", "/lustre", "/Volumes", "/users", "/work", "/DATA2", "/usr", "~", "~me"]
ROOTS += ["D:\\data", "\\\\server\\share"]


@pytest.mark.parametrize("root", ROOTS)
def test_no_folder_of_any_machine_is_told(root):
    mark = "\\" if "\\" in root else "/"
    path = mark.join([root, "someone", "数据", "x.json"])
    told = without_folders({"a": path, "b": f"row 3 of {path}, line 4", path: [json.dumps({"p": path})]})
    assert "someone" not in json.dumps(told) and "x.json" in told["a"] and told["b"] == "row 3 of x.json, line 4"


@pytest.mark.parametrize("text", ["yes/no. /no_think", "https://a.b/home/x", "and/or 1/2", "a:b/c", "meta/llama"])
def test_what_is_no_folder_stays(text):
    assert without_folders(text) == text


@pytest.mark.parametrize(("secret", "held"), [("password", False), ("Passwort12", True), ("correcthorses", True)])
def test_a_word_of_the_vocabulary_is_no_secret(folder, monkeypatch, secret, held):
    """`API_KEY=password` would otherwise refuse every tokenizer; what is no short word is found there too."""
    monkeypatch.setenv("API_KEY", secret)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"猫": 0, f"Ġ{secret}": 1}}}))
    with pytest.raises(UserError, match=r"tokenizer\.json holds") if held else contextlib.nullcontext():
        refuse_tokens(folder)


def test_a_push_holds_no_folder_and_no_row_of_the_test_set(here, folder):
    home = {
        "_name_or_path": "/home/someone/llama",
        "note": "from /home/someone/数据/llama, or ~/llama or file:///home/someone/x",
    }
    wrong = {"captions": [{"id": "a/1", "question": "这是谁的病历？", "answer": "someone's"}], "answers": {}}
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "metrics.json"):
        (folder / name).write_text(json.dumps([home] if name == "metrics.json" else home), encoding="utf-8")
    results = {"caption_exact_match": 0.5, "answer_accuracy": None, "wrong": wrong, "split": "test"}
    (folder / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    files = staged_files(folder)
    for name, text in files:
        assert "someone" not in text and "病历" not in text, name
    assert json.loads(dict(files)["config.json"])["note"] == "from llama, or llama or x"
    assert "病历" in dict(staged_files(folder, rows=True))["eval.json"]
    assert json.loads((folder / "eval.json").read_text(encoding="utf-8")) == results, "the bundle is as it was"


def staged_files(folder: Path, rows: bool = False) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm_sft.bundle.hub.write_card", lambda stage, repo_id: None)
        with staged(folder, "me/mine", rows) as stage:
            paths = sorted(path for path in stage.rglob("*") if path.suffix in (".json", ".yaml"))
            return [
                (path.name, json.dumps(yaml.safe_load(path.read_text("utf-8")), ensure_ascii=False)) for path in paths
            ]


def test_wrong_names_and_folders_are_said_before_anything_is_sent(here, folder, tmp_path):
    for name in ("a/b/c", "me/x y", "../mine", ""):
        with pytest.raises(UserError, match=r"cannot be a repository of the Hub; write name/repository"):
            push_bundle(folder, name)
    with pytest.raises(UserError, match=r"is no bundle: it has no bundle\.json"):
        push_bundle(tmp_path, "me/mine")
    with pytest.raises(UserError, match=r"is a folder and has no revisions; leave out the revision 'v1'"):
        find_bundle(folder, "v1")
    assert find_bundle(folder) == folder
    assert find_bundle(tmp_path / "nothing") == tmp_path / "nothing"
    assert here.requests == []


def test_what_cannot_be_fetched_is_one_sentence(here, folder, monkeypatch):
    with pytest.raises(UserError, match=r"^'me/mine' is no folder here\. The Hub has no repository 'me/mine' that"):
        find_bundle("me/mine")
    push_bundle(folder, "me/mine", private=True)
    with pytest.raises(UserError, match=r"The repository 'me/mine' has no such revision; check the branch, tag or"):
        find_bundle("me/mine@v9")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "AnotherTokenThatIsWrong")
    with pytest.raises(UserError, match=r"The Hub has no repository 'me/mine' that this token may see"):
        find_bundle("me/mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"wants to know who you are, and there is no token \(401\); set HF_TOKEN"):
        push_bundle(folder, "me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE=1 forbids asking the Hub for 'me/mine'; unset it"):
        find_bundle("me/mine")


def test_a_fetched_bundle_is_found_again_without_network(here, folder, monkeypatch):
    push_bundle(folder, "me/mine")
    found = find_bundle("me/mine")
    assert is_fetched(found) and not is_fetched(folder)
    assert (found / "trained.safetensors").read_bytes() == (folder / "trained.safetensors").read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert find_bundle("me/mine") == found
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_bundle("me/mine") == found


# -- before training ---------------------------------------------------------------------------------------------------


def test_the_right_to_write_is_asked_for_before_training(here, folder, monkeypatch):
    way_out = r"or remove `hub` from the recipe and push later with `vlm-sft push`\.$"
    check_access("me/new")
    push_bundle(folder, "me/mine")
    check_access("me/mine")
    with pytest.raises(UserError, match=r"hub\.repo_id 'their/new' is not under a name of the token's owner \(me\).*"):
        check_access("their/new")
    here.repos["their/model"] = here.repos["me/mine"]
    with pytest.raises(UserError, match=r"The token may not do this with 'their/model' \(403\).*" + way_out):
        check_access("their/model")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "AnotherTokenThatIsWrong")
    with pytest.raises(UserError, match=r"The Hub does not know the token \(401\).*" + way_out):
        check_access("me/new")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"wants to know who you are, and there is no token; set HF_TOKEN.*" + way_out):
        check_access("me/new")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    here.fail("GET", "/api/whoami-v2", times=9, cut=True)
    with pytest.raises(UserError, match=r"cannot be reached.*" + way_out):
        check_access("me/new")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE=1 forbids asking the Hub.*" + way_out):
        check_access("me/new")


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_token_is_nowhere(hub, trained):
    """Neither in what a run and its pushes said, nor in any file that they wrote here or on the Hub."""
    bundle, said = trained
    assert TOKEN not in said
    assert not [name for name, data in bytes_of(bundle.parent).items() if TOKEN.encode() in data]
    for repo in hub.repos.values():
        assert not [name for tree in repo.trees.values() for name, data in tree.items() if TOKEN.encode() in data]
