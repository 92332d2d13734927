"""Images behind URLs: only from public addresses, within limits, kept on disk. The servers here are this machine's."""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlm_sft.base.errors import RowError
from vlm_sft.reading.fetch import REASON, Fetcher, default_folder, is_public
from vlm_sft.reading.images import load_image

PUBLIC = "93.184.216.34"


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(stream, "PNG")
    return stream.getvalue()


class Server:
    """A web server, and the fetcher's way to it: names resolve to public addresses, and connections end up here."""

    def __init__(self, folder):
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        self.hosts: list[str] = []
        self.connected: list[str] = []
        self.names = {"images.example": [PUBLIC]}
        self.resolved: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                server.hosts.append(self.headers["Host"])
                status, headers, body = server.pages[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if body == b"drip":
                    while self.drip():
                        time.sleep(0.02)
                else:
                    self.wfile.write(body)

            def drip(self):
                try:
                    self.wfile.write(b".")
                except OSError:
                    return False
                return True

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.fetch = Fetcher(folder, max_bytes=10_000, seconds=5.0, resolve=self.resolve, connect=self.connect)

    def resolve(self, host, port):
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror("Name or service not known")
        return self.names[host]

    def connect(self, address, port, seconds):
        self.connected.append(address)
        return socket.create_connection(self.http.server_address, timeout=seconds)

    def page(self, path, body=b"", kind="image/png", status=200, **headers):
        self.pages[path] = (status, {"Content-Type": kind, **headers}, body)
        return f"http://images.example{path}"

    def refused(self, url):
        with pytest.raises(RowError) as error:
            self.fetch(url)
        sentence = str(error.value)
        assert error.value.reason == REASON and "\n" not in sentence and sentence.endswith(".")
        assert not [path for path in self.fetch.folder.rglob("*") if path.is_file()], "nothing is kept"
        return sentence


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    server = Server(tmp_path / "kept")
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_an_image_is_fetched_once_and_kept(server):
    url = server.page("/猫.png?a=%20b", png())
    server.pages["/%E7%8C%AB.png?a=%20b"] = server.pages["/猫.png?a=%20b"]
    image = load_image(url, fetch=server.fetch)
    assert (image.size, image.getpixel((0, 0))) == ((6, 4), (255, 0, 0))
    again = Fetcher(server.fetch.folder, resolve=pytest.fail)
    assert load_image({"path": url, "bytes": None}, fetch=again).size == (6, 4)
    assert server.asked == ["/%E7%8C%AB.png?a=%20b"] and server.hosts == ["images.example"]
    assert [path.stat().st_size for path in server.fetch.folder.rglob("*") if path.is_file()] == [len(png())]


def test_what_is_fetched_and_broken_is_named_by_its_url(server):
    url = server.page("/half.png", png()[:40])
    with pytest.raises(RowError, match=r"row s/1: the image http://images\.example/half\.png .*truncated or damaged"):
        load_image(url, where="row s/1", fetch=server.fetch)
    gone = server.page("/gone.png", status=404)
    with pytest.raises(RowError, match=r"row s/1: the image http://images\.example/gone\.png answers 404") as error:
        load_image(gone, where="row s/1", fetch=server.fetch)
    assert (error.value.where, error.value.reason) == ("row s/1", REASON)


# ---------------------------------------------------------------------------------------------------------- addresses

PRIVATE = [
    *("192.0.0.9", "192.0.0.10", "192.0.0.170", "192.88.99.1", "::ffff:192.0.0.9"),
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *(
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "192.0.2.1",
        "192.0.0.9",
        "192.0.0.170",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
    ),
    *("ff02::1", "fec0::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    "no address",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(server, address):
    assert not is_public(address)
    server.names["images.example"] = [PUBLIC, address]
    assert f"leads to {address}, an address that is not public" in server.refused(server.page("/a.png", png()))
    assert server.connected == [], "one such address is enough, and nothing is asked"


def test_public_addresses():
    assert all(map(is_public, [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"]))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "0"]
)
def test_ways_to_write_this_machine(tmp_path, host):
    with pytest.raises(RowError, match=r"an address that is not public|did not answer"):
        Fetcher(tmp_path, connect=pytest.fail)(f"http://{host}:1/a.png")


def test_a_name_that_changes_its_address_leads_nowhere_else(server):
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    server.fetch.resolve = lambda host, port: next(answers)
    server.fetch(server.page("/a.png", png()))
    assert server.connected == [PUBLIC], "the checked address is the one connected to, and the name is asked once"
    assert len(list(answers)) == 1


def test_a_redirect_is_followed_and_checked_like_the_first_url(server):
    there = server.page("/there.png", png())
    server.names["cdn.example"] = ["8.8.8.8"]
    url = server.page("/a.png", status=302, Location=there.replace("images.example", "cdn.example"))
    assert load_image(url, fetch=server.fetch).size == (6, 4)
    assert server.resolved == ["images.example", "cdn.example"] and server.connected == [PUBLIC, "8.8.8.8"]
    assert server.hosts == ["images.example", "cdn.example"]


def test_redirects_that_are_not_followed(server):
    server.names["inside.example"] = ["10.0.0.7"]
    inside = server.page("/1", status=302, Location="http://inside.example/")
    assert "http://images.example/1 leads to 10.0.0.7" in server.refused(inside)
    assert "leads to 'file': only http" in server.refused(server.page("/2", status=301, Location="file:///etc/passwd"))
    assert "redirects more than 5 times" in server.refused(server.page("/3", status=307, Location="/3"))
    assert server.connected == [PUBLIC] * 8


# ------------------------------------------------------------------------------------------------------------- limits


def test_what_is_too_large(server):
    assert "has more than the 10,000 bytes" in server.refused(server.page("/1", b"x" * 10_001))
    stated = server.page("/2", b"", **{"Content-Length": "999999999"})
    assert "has more than the 10,000 bytes" in server.refused(stated)


def test_what_drips(server):
    server.fetch.seconds = 0.15
    assert "it took more than 0.15 seconds" in server.refused(server.page("/1", b"drip"))


def test_what_ends_early(server):
    url = server.page("/1", b"x" * 10, **{"Content-Length": "20"})
    assert "the connection ended after 10 of 20 bytes" in server.refused(url)
    assert server.asked == ["/1"] * 3


def test_what_is_no_image(server):
    assert "is 'text/html', not an image" in server.refused(server.page("/1", b"<html>", "text/html; charset=utf-8"))
    assert "comes compressed" in server.refused(server.page("/2", b"x", **{"Content-Encoding": "gzip"}))
    assert "answers 403 Forbidden" in server.refused(server.page("/3", status=403))
    assert "answers 301" in server.refused(server.page("/4", status=301))


def test_a_busy_server_is_asked_again(server):
    url = server.page("/1", status=503)
    assert "answers 503" in server.refused(url)
    assert server.asked == ["/1"] * 3
    server.fetch.resolve = lambda host, port: server.page("/1", png()) and [PUBLIC]
    assert server.fetch(url)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://images.example/a.png", "leads to 'ftp': only http and https"),
        ("http:///a.png", "has no host"),
        ("http://me:secret@images.example/a.png", "a password in it"),
        ("http://images.example:99999/", "is not a whole URL"),
        ("http://[::1/a.png", "is not a whole URL"),
        (f"http://{'a' * 70}.example/", "is not a whole URL"),
        ("http://nowhere.example/a.png", "did not answer (Name or service not known)"),
    ],
)
def test_urls_that_cannot_be_fetched(server, url, sentence):
    assert sentence in server.refused(url)
    assert server.connected == []


def test_https_is_checked_against_the_name_not_the_address(server, monkeypatch):
    seen = {}

    class Context:
        def wrap_socket(self, stream, server_hostname, do_handshake_on_connect):
            seen["name"] = server_hostname
            return type("Secured", (), {"__getattr__": lambda self, name: getattr(stream, name), "do_handshake": int})()

    context = ssl.create_default_context()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
    monkeypatch.setattr("ssl.create_default_context", Context)
    server.fetch(server.page("/a.png", png()).replace("http:", "https:"))
    assert seen == {"name": "images.example"} and server.connected == [PUBLIC]


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    server.fetch.folder = tmp_path / "file" / "kept"
    with pytest.raises(RowError, match=r"cannot be written .*url_cache"):
        server.fetch(server.page("/a.png", png()))


def test_where_images_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vlm_sft" / "images" == Fetcher().folder
