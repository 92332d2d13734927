"""Images behind URLs: fetched once into a folder, within limits, and never from an address inside one's own network."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ..base.errors import RowError
from ..base.whole_files import write_whole
from ..base.words import one_line, reason_of, whole_number

REASON = "image not fetched"
TYPES = ("image/", "application/octet-stream", "binary/octet-stream")  # the last two from stores that do not know
REDIRECTS = 5
ATTEMPTS = 3  # of a server that is busy or does not answer
BUSY = (429, 500, 502, 503, 504)
_CHUNK = 2**16

# Networks of IPv6 in whose addresses one of IPv4 is hidden, that a gateway may unpack (RFC 4291, 6052, 8215, 3056,
# 4380), site-local ones (RFC 3879); of IPv4 those of protocols (RFC 6890), of which Python calls some global, and of
# relays to IPv6 (RFC 7526).
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        *("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "fec0::/10"),
        *("192.0.0.0/24", "192.88.99.0/24"),
    )
]


class Fetcher:
    """Gives for a URL the file in which its image lies, and downloads it if it is not there yet.

    A host name is resolved once; every address that it has is checked, and the connection is made to a checked address,
    so that a second answer of the name server cannot lead elsewhere. A redirect is checked like the first URL.
    Proxies of the environment are not used, because they would resolve the name themselves.

    Args:
        folder: Where images are kept; None is `default_folder()`. Several processes may share it.
        max_bytes: Largest body.
        seconds: Longest time that one attempt may take in all, from connecting to the last byte.
        resolve: Host and port → addresses; by default the system's resolver.
        connect: Address, port and seconds → a connected socket; by default the system's.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        max_bytes: int = 32 * 2**20,
        seconds: float = 20.0,
        resolve: Callable[[str, int], list[str]] | None = None,
        connect: Callable[[str, int, float], socket.socket] | None = None,
    ) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.resolve = resolve or _resolve
        self.connect = connect or (lambda host, port, seconds: socket.create_connection((host, port), seconds))

    def __call__(self, url: str) -> str:
        """The file that holds what lies at `url`.

        Raises:
            RowError: The URL is not allowed, or what it gives is no image within the limits; nothing is kept then.
        """
        name = hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()
        path = self.folder / name[:2] / name
        if not path.is_file():
            body = self._download(url)
            try:
                write_whole(path, body)
            except OSError as error:
                sentence = f"the folder {self.folder} for fetched images cannot be written ({reason_of(error)})"
                raise RowError(f"{sentence}: set `data.url_cache` to one that can.", reason=REASON) from None
        return str(path)

    def _download(self, url: str) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                if (body := self._follow(url, last)) is not None:
                    return body
            except (OSError, http.client.HTTPException) as error:
                if last:
                    raise _refuse(url, f"did not answer ({reason_of(error)})") from None
            time.sleep(2.0 ** (attempt - 2))
        raise AssertionError("the last attempt returns or raises")

    def _follow(self, url: str, last: bool) -> bytes | None:
        """The body at the end of the redirects; None where the server is busy and may be asked again."""
        at = url
        for _ in range(REDIRECTS + 1):
            parts = _checked_parts(url, at)
            with _Deadline(self.seconds) as deadline, closing(self._open(url, parts, deadline)) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                headers = {"Host": _host_header(parts), "Accept": "image/*", "Accept-Encoding": "identity"}
                target = quote(target, safe=string.punctuation, errors="replace")  # as HTTP takes it
                connection.request("GET", target, headers={**headers, "User-Agent": "vlm_sft"})
                response = connection.getresponse()
                if response.status in BUSY and not last:
                    return None
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or not location:
                    body = self._body(url, response)
                    deadline.check()
                    return body
            at = urljoin(at, location.encode("latin-1", "replace").decode("utf-8", "replace"))
        raise _refuse(url, f"redirects more than {REDIRECTS} times")

    def _open(self, url: str, parts: SplitResult, deadline: _Deadline) -> http.client.HTTPConnection:
        """A connection to the first address of the host that answers, once all of them are allowed."""
        host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        addresses = self.resolve(host, port)
        for address in addresses:
            if not is_public(address):
                raise _refuse(url, f"leads to {address}, an address that is not public")
        problem = OSError("it has no address")
        for address in addresses:
            try:
                stream = self.connect(address, port, self.seconds)
                deadline.watch(stream)
                if parts.scheme == "https":
                    secured = ssl.create_default_context().wrap_socket(
                        stream, server_hostname=host, do_handshake_on_connect=False
                    )
                    deadline.watch(secured)
                    secured.do_handshake()
                    stream = secured
            except OSError as error:
                problem = error
                continue
            connection = http.client.HTTPConnection(host, port, timeout=self.seconds)
            connection.sock = stream  # so that http.client resolves nothing itself
            return connection
        raise problem

    def _body(self, url: str, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise _refuse(url, f"answers {response.status} {response.reason}")
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if kind and not kind.startswith(TYPES):
            raise _refuse(url, f"is {kind[:80]!a}, not an image")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _refuse(url, "comes compressed though it was asked not to")
        stated = whole_number(response.headers.get("Content-Length", ""))
        body = bytearray()
        if stated is None or stated <= self.max_bytes:
            while len(body) <= self.max_bytes and (chunk := response.read(_CHUNK)):
                body += chunk
            if stated is not None and len(body) < stated:
                raise OSError(f"the connection ended after {len(body):,} of {stated:,} bytes")
            if len(body) <= self.max_bytes:
                return bytes(body)
        raise _refuse(url, f"has more than the {self.max_bytes:,} bytes allowed")


def default_folder() -> Path:
    """Where fetched images are kept unless the recipe says otherwise: `vlm_sft/images` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm_sft" / "images"


def is_public(address: str) -> bool:
    """Whether an IP address may be fetched from: global, unicast, and none that hides an address of IPv4."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # an address with a zone, such as fe80::1%eth0
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    inside = any(found in network for network in _NOT_PUBLIC)
    return found.is_global and not (inside or found.is_multicast)


class _Deadline:
    """Ends a connection when its time is over, however slowly its bytes drip."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self.stream: socket.socket | None = None
        self.timer = threading.Timer(seconds, self._end)
        self.timer.daemon = True

    def __enter__(self) -> _Deadline:
        self.timer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.timer.cancel()
        if isinstance(error, (OSError, http.client.HTTPException)):
            self.check()  # a connection that was ended raises errors of many kinds

    def watch(self, stream: socket.socket) -> None:
        """Takes the socket that is to be ended."""
        self.stream = stream
        self.check()

    def check(self) -> None:
        """Raises OSError when the time is over."""
        if self.over:
            raise OSError(f"it took more than {self.seconds:g} seconds")

    def _end(self) -> None:
        self.over = True
        if self.stream is not None:
            with suppress(OSError):
                self.stream.shutdown(socket.SHUT_RDWR)


def _checked_parts(url: str, at: str) -> SplitResult:
    try:
        parts = urlsplit(at)
        allowed, named, _ = parts.scheme in ("http", "https"), bool(parts.hostname), parts.port
        _host_header(parts)
    except ValueError as error:
        raise _refuse(url, f"is not a whole URL ({error})") from None
    if not allowed:
        raise _refuse(url, f"leads to {parts.scheme[:20]!a}: only http and https are fetched")
    if not named or parts.username is not None:
        raise _refuse(url, "has no host, or a password in it")
    return parts


def _host_header(parts: SplitResult) -> str:
    return parts.netloc.encode("idna").decode("ascii")


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _refuse(url: str, what: str) -> RowError:
    return RowError(f"the image {one_line(url[:200])} {what}: correct the URL, or remove the row.", reason=REASON)
