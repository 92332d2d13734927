"""Whether the Hub answers; what it refuses, in one sentence each; and what is worth another try."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import UserError
from .words import whole_number

Failure = TypeVar("Failure", bound=BaseException)
Result = TypeVar("Result")
TRIES, LONGEST_WAIT = 3, 60.0
PATIENCE = 4.0  # seconds; looking up a name alone may take longer where there is no network
LOOK_AGAIN = 60.0  # seconds after which a Hub that did not answer is looked for once more
LOGIN = "set HF_TOKEN to a token that may write, or run `hf auth login`"


def look_for_hub() -> bool:
    """Whether the Hub may be asked, found out before it is first asked.

    Without network the libraries try each small file for half a minute and say so in lines of their own. Where the Hub
    does not answer, a request to it is refused before it is sent, which sends the libraries to their caches, until the
    Hub is there again. A Hub that answers is left to the libraries, with all their patience.
    """
    if constants.is_offline_mode():
        return False
    if getproxies() or _answers(constants.ENDPOINT):  # only the libraries know the way through a proxy
        return True
    session = get_session()
    if _refuse not in session.event_hooks["request"]:
        session.event_hooks = {**session.event_hooks, "request": [_refuse, *session.event_hooks["request"]]}
    return False


def hub_is_away() -> bool:
    """Whether the Hub did not answer when it was last looked for."""
    return constants.ENDPOINT in _AWAY


_ANSWERED: set[str] = set()
_AWAY: dict[str, float] = {}  # endpoint → when it was last looked for in vain


def _refuse(request: Any) -> None:
    if str(request.url).startswith(constants.ENDPOINT) and not _answers(constants.ENDPOINT):
        raise OfflineModeIsEnabled(f"The Hub at {constants.ENDPOINT} does not answer.")


def _answers(endpoint: str) -> bool:
    """Whether somebody listens there; who once did is not asked again, who did not, after a while."""
    if endpoint in _ANSWERED or time.monotonic() - _AWAY.get(endpoint, -LOOK_AGAIN) < LOOK_AGAIN:
        return endpoint in _ANSWERED
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    answered = threading.Event()

    def ask() -> None:
        for attempt in range(2):
            time.sleep(attempt)
            try:
                socket.create_connection((address.hostname or "", port), PATIENCE).close()
            except OSError:
                continue
            answered.set()
            return

    asking = threading.Thread(target=ask, daemon=True)  # nothing else bounds the look-up of a name
    asking.start()
    asking.join(PATIENCE)
    if answered.is_set():
        _ANSWERED.add(endpoint)
        _AWAY.pop(endpoint, None)
    else:
        _AWAY[endpoint] = time.monotonic()
    return answered.is_set()


def patiently(call: Callable[[], Result], max_tries: int = TRIES) -> Result:
    """Calls again where another attempt may help; not all requests of `huggingface_hub` do so themselves."""
    for attempt in range(1, max_tries):
        try:
            return call()
        except Exception as error:
            wait = _seconds_to_wait(error, attempt)
            if wait is None:
                raise
            time.sleep(wait)
    return call()


def _seconds_to_wait(error: BaseException, attempt: int) -> float | None:
    """How long until another attempt may succeed; None where it will not."""
    refused = _first(error, HfHubHTTPError)
    if refused is None:
        return float(attempt) if _is_network(error) else None
    if refused.response.status_code not in (408, 429, 500, 502, 503, 504):
        return None
    asked = whole_number(refused.response.headers.get("Retry-After", ""))
    return float(attempt) if asked is None else min(float(asked), LONGEST_WAIT)


@contextmanager
def one_sentence(repo_id: str, before: str = "", after: str = "") -> Iterator[None]:
    """Turns what `huggingface_hub` raises into a `UserError`, without requests, headers and tokens.

    Args:
        repo_id: Named in the sentence.
        before: Put in front of it.
        after: Put behind it, before its full stop.

    Raises:
        UserError: The Hub refused, or could not be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = _sentence(error, repo_id)
        if sentence is None:
            raise
        # Not chained: the cause holds the request, and the request the token.
        raise UserError(f"{before}{sentence}{after}.") from None


def _sentence(error: BaseException, repo_id: str) -> str | None:
    if _first(error, OfflineModeIsEnabled) or (constants.is_offline_mode() and _first(error, EntryNotFoundError)):
        if hub_is_away():
            here = f"{repo_id!r} is not whole in the cache"
            return f"The Hub at {constants.ENDPOINT} cannot be reached, and {here}; check the network"
        return f"HF_HUB_OFFLINE=1 forbids asking the Hub for {repo_id!r}; unset it"
    if _first(error, LocalTokenNotFoundError):
        return f"The Hub wants to know who you are, and there is no token; {LOGIN}"
    refused = _first(error, HfHubHTTPError)
    if refused is not None:
        return _refusal(refused, repo_id)
    if _first(error, EntryNotFoundError):
        return f"{repo_id!r} is not whole in the cache, and the Hub cannot be asked; try again with network"
    if any("xet-write-token" in str(each) for each in _chain(error)):
        return f"The Hub at {constants.ENDPOINT} has no Xet storage; set HF_HUB_DISABLE_XET=1"
    if _is_network(error):
        return f"The Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the network"
    return None


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    """What a status of the Hub means for a person."""
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return f"The repository {repo_id!r} has no such revision; check the branch, tag or commit"
    if isinstance(error, EntryNotFoundError):
        return f"The Hub lacks a file of {repo_id!r}; fetch it again"
    if status == 401 and get_token() is None:
        return f"The Hub wants to know who you are, and there is no token (401); {LOGIN}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"The Hub does not know the token (401); {LOGIN}"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"The Hub has no repository {repo_id!r} that this token may see; check the name and the token"
    if status == 403:
        return f"The token may not do this with {repo_id!r} (403); use a token that may write there, or another name"
    if status in (409, 412):
        return f"{repo_id!r} was changed by someone else at the same time ({status}); push again"
    if status == 429:
        asked = whole_number(error.response.headers.get("Retry-After", ""))
        wait = "wait" if asked is None else f"wait {asked} seconds"
        return f"The Hub has had too many requests (429); {wait} and try again"
    if status >= 500:
        return f"The Hub is in trouble ({status}); try again later"
    return f"The Hub refuses {repo_id!r} (status {status}); check its name and its settings"


def _is_network(error: BaseException) -> bool:
    """Connection errors of the client, wherever they stand in a chain of causes."""
    # By name: which HTTP library it is changes with versions of `huggingface_hub`.
    kinds = (kind.__name__ for each in _chain(error) for kind in type(each).__mro__)
    return any(name in ("TransportError", "ConnectionError") for name in kinds)


def _first(error: BaseException, kind: type[Failure]) -> Failure | None:
    return next((each for each in _chain(error) if isinstance(each, kind)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
