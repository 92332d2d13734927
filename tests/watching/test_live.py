"""`vlm-sft watch`: a file that is written again while a run goes on, and a port that nobody else reaches."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest
from typer.testing import CliRunner

from vlm_sft.base.errors import UserError
from vlm_sft.cli import main as cli
from vlm_sft.watching import live


@pytest.fixture
def folder(tmp_path):
    (run := tmp_path / "run").mkdir()
    (run / "history.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return run


def test_the_command_writes_a_page_and_ends_where_no_run_goes_on(folder, tmp_path):
    done = CliRunner().invoke(cli.app, ["watch", str(folder)])
    assert done.exit_code == 0 and "run.html" in done.output and "refresh" not in (folder / "run.html").read_text()
    done = CliRunner().invoke(cli.app, ["watch", str(folder), "--once", "-o", str(tmp_path / "页.html")])
    assert done.exit_code == 0 and (tmp_path / "页.html").is_file()
    for wrong in (
        [str(tmp_path / "gone")],
        [str(folder), "-o", str(tmp_path)],
        [str(folder), "--port", "70000"],
    ):
        assert CliRunner().invoke(cli.app, ["watch", *wrong]).exit_code != 0


def test_the_page_follows_a_run_until_it_ends(folder):
    (folder / ".run.lock").write_text("{}")
    said = []

    def train():
        time.sleep(0.5)
        with (folder / "history.jsonl").open("a") as file:
            file.write(json.dumps({"step": 777, "loss": 0.5}) + "\n")
        time.sleep(1.2)
        (folder / ".run.lock").unlink()

    run = threading.Thread(target=train)
    run.start()
    live.watch([str(folder)], None, 1, False, None, said.append)
    run.join()
    page = (folder / "run.html").read_text()
    assert "777" in page and "stopped" in page and 'http-equiv="refresh"' not in page
    assert any("Ctrl-C ends this, and not the run" in line for line in said)


def test_the_port_gives_the_page_to_this_machine_alone(folder):
    server = live._serve([str(folder)], 5, 0)
    port = server.server_address[1]

    def get(path="/", host=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    try:
        status, page = get()
        assert status == 200 and "Curves" in page and 'http-equiv="refresh" content="5"' in page
        assert server.server_address[0] == "127.0.0.1"
        assert get(host=f"localhost:{port}")[0] == 200
        for path in ("/../run.json", "/history.jsonl", "/x", "/?x"):
            assert get(path)[0] == 404
        assert get(host="evil.example:80")[0] == 404, "another site's name for this address"
        (folder / "history.jsonl").unlink()
        assert get()[0] == 503
    finally:
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken_is_one_sentence(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"--port \d+ cannot be used \(Address already in use\)"):
            live.watch([str(folder)], None, 1, True, taken.getsockname()[1], print)
