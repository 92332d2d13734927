"""Refusals in OpenAI's form."""

from __future__ import annotations

from vlm_sft.serving.refusal import Refusal, busy, closing


def test_each_has_its_status_its_words_and_when_to_come_again() -> None:
    wrong = Refusal("seed is wrong: mend it.", param="seed")
    assert wrong.status == 400 and wrong.headers() == {}
    assert wrong.body()["error"] == {
        "message": "seed is wrong: mend it.", "type": "invalid_request_error", "param": "seed", "code": None,
    }  # fmt: skip
    assert busy("Full.", 2).status == 429 and busy("Full.", 2).headers() == {"retry-after": "2"}
    assert busy("Full.", 2).body()["error"]["type"] == "rate_limit_error"
    assert closing().status == 503 and closing().body()["error"]["type"] == "server_error"
    assert int(closing().headers()["retry-after"]) > 0
