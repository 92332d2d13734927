"""A mistake of the user ends in one sentence, said once, without traceback and without tokens."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from vlm_sft.base.errors import RowError, UserError, exit_on_user_error, row_error, sentence_of, without_tokens
from vlm_sft.base.interrupts import Interrupts


def test_wrapper_names_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise UserError("row 7 has no image.")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error (process 3): row 7 has no image.\n"


def test_processes_of_one_launch_say_the_same_thing_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for rank, said in (("1", "a.png is missing."), ("0", "a.png is missing."), ("0", "b.png is missing.")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit) as ended, exit_on_user_error():
            raise UserError(said)
        assert ended.value.code == 2
    assert capsys.readouterr().err == "error (process 1): a.png is missing.\nerror: b.png is missing.\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "1" / "error.json"))
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("c.png is missing.")
    assert "c.png" in capsys.readouterr().err, "said twice rather than never"


def test_a_process_that_lost_its_peer_leaves_the_message_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("vlm_sft.base.errors.time.sleep", waited.append)
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:39117.")
    assert ended.value.code == 1 and len(waited) == 1
    assert capsys.readouterr().err == "process 0 stops: another process ended, and its own message says why.\n"
    with pytest.raises(RuntimeError, match="out of memory"), exit_on_user_error():
        raise RuntimeError("out of memory")


def test_a_process_that_lost_its_peer_and_was_told_to_end_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("vlm_sft.base.errors.time.sleep", waited.append)

    @exit_on_user_error()
    def train() -> None:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGTERM)  # as the launcher does, which has then seen the other fail
            raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:39117.")

    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 1 and waited == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "'out/a' cannot be written (No space left on "
         "device): make room, or choose another place; then begin again."),
        (PermissionError(errno.EACCES, "Permission denied", "out/a"), "'out/a' cannot be used (Permission denied): "
         "change its permissions, or choose another place; then begin again."),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "A file cannot be written "
         "(File too large): make room, or choose another place; then begin again."),
    ],
)  # fmt: skip
def test_a_disk_that_is_full_or_closed_is_one_sentence_whoever_meets_it(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise error
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {sentence}\n"
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")


def test_wrapper_leaves_mistakes_of_the_program_alone() -> None:
    with pytest.raises(AssertionError), exit_on_user_error():
        raise AssertionError


class Broken(list):
    """A dataset whose rows cannot be read."""

    def __getitem__(self, number: int) -> None:
        raise row_error(f"rows.jsonl, line {number + 1}", "the row has no image", "name one", "no image")


def test_an_error_of_a_data_loader_worker_is_the_same_sentence() -> None:
    with pytest.raises(RowError) as caught:
        list(DataLoader(Broken([0]), num_workers=1))
    assert "Traceback" in str(caught.value), "torch wraps it"
    assert sentence_of(caught.value) == "rows.jsonl, line 1: the row has no image: name one."


def test_a_row_error_knows_its_place_and_the_words_to_count_it_by() -> None:
    error = row_error("a.jsonl, line 3", "the row has no image", "name one", "no image")
    assert isinstance(error, UserError) and str(error) == "a.jsonl, line 3: the row has no image: name one."
    assert (error.where, error.reason) == ("a.jsonl, line 3", "no image")


def test_tokens_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-like-a-token")
    assert without_tokens("hub.token=hf_abcdefgh12 or not-like-a-token") == "hub.token=hf_… or hf_…"
    assert sentence_of(UserError("hf_abcdefgh12 is refused.")) == "hf_… is refused."


def test_secrets_of_any_name_and_form_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://me:hunter22@db/猫")
    monkeypatch.setenv("GITHUB_PAT", "not like a token")
    said = "cannot connect to postgres://me:hunter22@db/猫 with not like a token and ghp_" + "a1B2" * 9
    assert sentence_of(UserError(said)) == "cannot connect to … with … and …"


@pytest.mark.parametrize(
    "key",
    ["AIza" + "a1B2_" * 7, "npm_" + "a1B2c3" * 6, "gsk_" + "a1B2" * 12, "r8_" + "a1B2" * 10, "dop_v1_" + "a1b2" * 16,
     "rk_live_" + "a1B2" * 6, "github_pat_" + "a1B2_" * 8, "glpat-" + "a1B2c3d4e5" * 2, "ghp_" + "a1B2" * 9],
)  # fmt: skip
def test_keys_of_services_are_not_shown(key: str) -> None:
    assert key not in sentence_of(UserError(f"the system says {key} there"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "/bPxRfiCYabcdefghij0123456789/+猫"), ("SSHPASS", "hunter2hunter2"),
     ("MASTERKEY", "abcdefgh-1234"), ("CI_JOB_JWT", "zzzz-yyyy-xxxx"), ("CI_JOB_JWT_V2", "zzzz-yyyy-xxxx"),
     ("SLACK_WEBHOOK", "https://example.com/T0/B0"), ("MY_BEARER", "bear-1234-bear"),
     ("PASSWORD_SALT", "salty-salt-99"),
     ("HASH_SALT", "salty-salt-99"), ("VLM_SFT_API_KEY", "/slash/key-1234")],
)  # fmt: skip
def test_secrets_under_unusual_names_are_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert sentence_of(UserError(f"it says {value} there")) == "it says … there"


def test_what_is_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints, commits, folders and the places of sockets and files."""
    for name, value in (
        ("SSH_AUTH_SOCK", "/tmp/ssh-1"),
        ("PWD", "/home/me/work"),
        ("AWS_KEY_FILE", "/a/b/c/d"),
    ):
        monkeypatch.setenv(name, value)
    said = f"/home/me/work /tmp/ssh-1 {'0123456789abcdef' * 4} Salesforce/instructblip-vicuna-7b_{'a' * 40} 这是什么"
    assert without_tokens(said) == said


@pytest.mark.parametrize("below", ["out", "out/a/b.txt"])
def test_a_link_that_leads_nowhere_is_named(below, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").symlink_to(tmp_path / "gone")
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        Path(below).mkdir(parents=True, exist_ok=True)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told == "error: 'out' is a link that leads nowhere: make what it leads to, or give another path.\n"
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        Path("none").read_text(encoding="utf-8")


class PanicException(BaseException):
    """As libraries written in Rust raise it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PanicException("index out of bounds\n猫"),
            "a library cannot read what it was given (index",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), "'xxxx"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/a/b"), "'/a/b' leads to no file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.txt/b"), "'a.txt/b' leads to no file"),
        (UserError("x" * 100_000), "xxxx"),
    ],
)
def test_what_libraries_and_the_system_say_of_names_is_one_short_sentence(error, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise error
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: {said}") and len(told) < 4200 and told.count("\n") == 1
    with pytest.raises(KeyboardInterrupt), exit_on_user_error():
        raise KeyboardInterrupt
