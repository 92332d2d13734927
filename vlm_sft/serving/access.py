"""Who may ask: the key of a server, and which names of it a browser may have been told."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from ..base.errors import UserError
from ..base.whole_files import IrregularError, read_bytes
from ..base.words import reason_of
from .refusal import Refusal

VARIABLE = "VLM_SFT_API_KEY"
SHORTEST = 8


def read_key(file: str | None) -> str | None:
    """The key that clients must send: of a file, else of the environment; None where neither says one.

    Raises:
        UserError: The file cannot be read, or what it holds is no key.
    """
    if file is None:
        given, where = os.environ.get(VARIABLE), VARIABLE
        if given is None:
            return None
    else:
        where = f"--api-key-file {file}"
        try:
            given = read_bytes(Path(file).expanduser()).decode("ascii", "replace").strip()
        except OSError as error:
            raise UserError(f"{where} cannot be read ({reason_of(error)}): correct it.") from None
        except IrregularError as error:
            raise UserError(f"{where} is {error.what}: give a file with one line, the key.") from None
    if len(given) < SHORTEST or not (given.isascii() and given.isprintable()) or " " in given:
        raise UserError(f"{where} holds no key: write {SHORTEST} or more ASCII letters, digits and marks, no spaces.")
    return given


def check_key(headers: Mapping[str, str], key: str | None) -> None:
    """Compares in a time that does not depend on where a wrong key differs.

    Raises:
        Refusal: The client sent another key, or none.
    """
    if key is None:
        return
    kind, _, sent = headers.get("authorization", "").partition(" ")
    if not (kind.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), key.encode())):
        what = "is another one" if sent.strip() else "is missing"
        raise Refusal(f"The key {what}: send it as `Authorization: Bearer KEY`.", 401, code="invalid_api_key")


def is_local(host: str) -> bool:
    """Whether an address, or a name of one, is this machine's own alone."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(headers: Mapping[str, str]) -> None:
    """Of a server that listens on this machine alone: it is called by a name of this machine.

    A page in a browser can make a name of its own lead here, and would read the answers.

    Raises:
        Refusal: It is called by another name.
    """
    host = headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not is_local(name):
        raise Refusal("This server listens on this machine alone: call it by 127.0.0.1 or localhost.", 403)
