"""What a client hears that asks for what there is not: a status of HTTP and one sentence, in the form of OpenAI."""

from __future__ import annotations

from ..base.errors import UserError
from ..base.names import Json

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(UserError):  # noqa: N818 - it is what a server says, not a fault of the program
    """A request that is not answered.

    Args:
        sentence: What is wrong, where, and how to mend it.
        status: Of HTTP.
        param: The key of the body that it is about.
        code: A word of OpenAI's for programs.
        retry_after: Seconds after which to ask again.
    """

    def __init__(
        self,
        sentence: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> Json:
        """As OpenAI's clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What stands beside the status."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def busy(sentence: str, seconds: int) -> Refusal:
    """Too much is asked at a time."""
    return Refusal(sentence, 429, code="rate_limit_exceeded", retry_after=seconds)


def closing() -> Refusal:
    """The server is told to end."""
    return Refusal("The server is stopping: ask again when it has started anew.", 503, code="stopping", retry_after=10)
