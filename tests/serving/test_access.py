"""Keys, and the names by which a server on this machine is called."""

from __future__ import annotations

import os

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.serving.access import check_host, check_key, is_local, read_key
from vlm_sft.serving.refusal import Refusal

KEY = "a-key-of-ours-1"


def test_the_file_goes_before_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("VLM_SFT_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("VLM_SFT_API_KEY", KEY)
    assert read_key(None) == KEY
    (tmp_path / "key").write_text("another-key\n")
    assert read_key(str(tmp_path / "key")) == "another-key"


@pytest.mark.parametrize("text", ["", "short", "two words of it", "钥匙钥匙钥匙钥匙", "line\nline-two"])
def test_what_is_no_key_is_refused_and_not_repeated(text, tmp_path, monkeypatch) -> None:
    (tmp_path / "key").write_text(text, encoding="utf-8")
    monkeypatch.setenv("VLM_SFT_API_KEY", text)
    for file in (None, str(tmp_path / "key")):
        with pytest.raises(UserError, match="holds no key") as refused:
            read_key(file)
        assert not text or text not in str(refused.value)


def test_a_key_file_that_is_none_is_one_sentence(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("none", "cannot be read"), ("pipe", "named pipe"), (".", "--api-key-file")):
        with pytest.raises(UserError, match=said):
            read_key(str(tmp_path / name))


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", "Bearer a-key-of-ours-", f"Basic {KEY}", KEY, "Bearer 钥匙"])
def test_another_key_is_refused(sent) -> None:
    check_key({"authorization": f"Bearer {KEY}"}, KEY)
    check_key({"authorization": f"bearer {KEY}"}, KEY)
    check_key({}, None)
    with pytest.raises(Refusal, match="The key is") as refused:
        check_key({"authorization": sent}, KEY)
    assert refused.value.status == 401 and KEY not in str(refused.value)


def test_a_page_of_elsewhere_cannot_call_it_by_a_name_of_its_own() -> None:
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80", "LOCALHOST:1", "127.1.2.3"):
        check_host({"host": host})
    for host in ("evil.example", "evil.example:8000", "", "10.0.0.1", "localhost.evil.example", "[::2]:80"):
        with pytest.raises(Refusal):
            check_host({"host": host})
    assert is_local("::1") and not is_local("0.0.0.0") and not is_local("::")
