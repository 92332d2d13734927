"""Whether the Hub can be reached at all, found out once and before it is first asked.

Without network the libraries try each small file for half a minute and say so in lines of their own.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE = 4.0  # seconds; looking up a name alone may take longer where there is no network
TRIES = 2


def look_for_hub() -> bool:
    """Whether the Hub may be asked. Where it does not answer, the libraries go by their caches from here on.

    That is what `HF_HUB_OFFLINE=1` does. A Hub that answers is left to the libraries, with all their patience.
    """
    if constants.is_offline_mode():
        return False
    if getproxies() or _answers(constants.ENDPOINT):  # how to reach it through a proxy is the libraries' business
        return True
    constants.HF_HUB_OFFLINE = True
    if (loaded := sys.modules.get("datasets.config")) is not None:  # it copies the switch when it is imported
        loaded.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return False


def hub_is_away() -> bool:
    """Whether `look_for_hub` found that the Hub does not answer."""
    return constants.ENDPOINT in _AWAY


_AWAY: set[str] = set()


@cache
def _answers(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    answered = threading.Event()
    asking = threading.Thread(target=_ask, args=(address.hostname or "", port, answered), daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if not answered.is_set():
        _AWAY.add(endpoint)
    return answered.is_set()


def _ask(host: str, port: int, answered: threading.Event) -> None:
    for attempt in range(TRIES):
        time.sleep(attempt)
        try:
            socket.create_connection((host, port), PATIENCE).close()
        except OSError:
            continue
        answered.set()
        return
