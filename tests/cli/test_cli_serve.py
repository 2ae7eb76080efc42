"""``ckptmgr serve``: a real server asked over real sockets; what it answers, whom, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_on_disk import Call, Run, S, start
from test_cli_docs import assert_documented

from ckptmgr.cli import serve
from ckptmgr.cli.output import Output

#: Where somebody would look for files.
ELSEWHERE = [
    "/../alpha.journal.db", "/..%2falpha.journal.db", "/alpha.journal.db", "/alpha/../../../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/etc/passwd", "/alpha/checkpoint/step-500/model.bin", "/alpha%00",
    "/.", "/..", "*", "/runs",
]  # fmt: skip


class Served:
    """A server in a process of its own."""

    def __init__(self, child: subprocess.Popen[str] | None, port: int) -> None:
        self.child = child
        self.port = port

    def get(self, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
        """Status, body and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=host is not None)
            if host:
                connection.putheader("Host", host)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())


@contextlib.contextmanager
def served(*words: str | Path) -> Iterator[Served]:
    with start("serve", *words, "--port", "0", "--json") as child:
        try:
            line = child.stdout.readline()
            yield Served(child, int(json.loads(line)["url"].rsplit(":", 1)[1].strip("/")))
        finally:
            child.kill()


def test_a_run_is_seen_at_once_and_as_it_goes_on(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        status, before, headers = site.get("/")
        run.save(1000)
        deadline = time.monotonic() + 60
        after = before
        while "step-1000" not in after and time.monotonic() < deadline:
            time.sleep(0.2)
            after = site.get("/")[1]

    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert f"{run.directory}/checkpoint/step-500" in before
    assert '<meta http-equiv="refresh" content="10">' in before
    assert "Resume from step 1,000" in after


def test_a_page_can_be_kept_from_loading_itself_again(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        assert 'href="?refresh=off"' in site.get("/")[1]
        assert 'http-equiv="refresh"' not in site.get("/?refresh=off")[1]
    with served(run.directory, "--refresh", "0") as site:
        assert 'http-equiv="refresh"' not in site.get("/")[1]


def test_a_folder_of_runs_has_a_page_with_the_verdict_of_each(run: Run, tmp_path: Path) -> None:
    run.save(500)
    torn = Run(run.directory.with_name("to rn <b>"))
    (torn.directory / torn.save(500).directory / "model.bin").unlink()
    (run.directory.with_name("broken.journal.db")).write_bytes(b"no journal" * 100)
    (run.directory.with_name("link.journal.db")).symlink_to("alpha.journal.db")
    with served(run.directory.parent) as site:
        index = site.get("/")[1]
        found = {path: site.get(path)[:2] for path in ("/alpha/", "/to%20rn%20%3Cb%3E/", "/broken/", "/link/")}

    assert 'href="/alpha/"' in index
    assert 'href="/to%20rn%20%3Cb%3E/"' in index
    assert "Safe to resume" in index
    assert "No checkpoint is intact" in index
    assert "<b>" not in index
    assert "is damaged" in index or "is not a database" in index or "no ckptmgr journal" in index
    assert [found[path][0] for path in found] == [200, 200, 503, 404]
    assert "All runs" in found["/alpha/"][1]


def test_a_run_whose_name_is_no_text_is_shown_beside_the_others(run: Run, tmp_path: Path) -> None:
    run.save(500)
    odd = Run(tmp_path / "runs" / os.fsdecode(b"b\xff"))
    odd.save(600)
    with served(run.directory.parent) as site:
        found = {path: site.get(path) for path in ("/", "/metrics", "/status.json", "/b%FF/")}
        odd.journal_path.write_bytes(b"no journal any more")
        time.sleep(serve.CHANGED_S)
        broken = site.get("/b%FF/")

    assert [status for status, _, _ in found.values()] == [200] * 4
    assert '<a href="/b%FF/">' in found["/"][1]
    assert 'run="b\\\\xff"' in found["/metrics"][1]
    assert broken[0] == 503


def test_no_path_leads_to_a_file(run: Run) -> None:
    run.save(500)
    for words in (run.directory, run.directory.parent):
        with served(words) as site:
            for path in ELSEWHERE:
                status, body, _ = site.get(path)

                assert status == 404, path
                assert "root:" not in body
                assert "weights" not in body


def test_only_get_and_head_are_answered(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "BREW"):
            assert site.get("/", method=method)[0] == 501, method
        assert site.get("/", method="HEAD")[:2] == (200, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[::1", "localhost.x"]
)
def test_another_hosts_name_is_refused(run: Run, host: str) -> None:
    """A page of evil.example whose name has come to lead here (DNS rebinding) reads nothing."""
    run.save(500)
    with served(run.directory) as site:
        for path in ("/", "/metrics", "/status.json"):
            status, body, _ = site.get(path, host=host)

            assert status in (400, 421)
            assert "alpha" not in body


def test_it_can_be_reached_through_a_tunnel_with_another_port(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        assert [site.get("/", host=host)[0] for host in ("localhost:9000", "127.0.0.1:80", "LOCALHOST")] == [200] * 3


def test_it_listens_on_the_loopback_address_alone(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site, socket.socket() as probe:
        probe.bind(("127.0.0.2", site.port))  # would be taken if it listened on all addresses

        assert site.get("/")[0] == 200


def test_every_answer_forbids_what_a_browser_might_do_with_it(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        for path in ("/", "/metrics", "/status.json", "/nothing"):
            headers = site.get(path)[2]

            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Python" not in headers["Server"]


def test_metrics_are_those_of_the_command(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    printed = ckptmgr("metrics", run.directory).out
    with served(run.directory) as site:
        _, body, headers = site.get("/metrics")

    def without_time(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("ckptmgr_seconds_since_commit{")]

    assert without_time(body) == without_time(printed)
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")


def test_json_of_the_status(run: Run) -> None:
    run.save(500)
    run.save(600, until=S.FAILED, series="other")
    (run.directory.with_name("broken.journal.db")).write_bytes(b"no journal" * 100)
    with served(run.directory.parent) as site:
        document = json.loads(site.get("/status.json")[1])

    assert_documented("status.json", [document])
    assert [each["name"] for each in document["runs"]] == ["alpha", "broken"]
    assert document["runs"][0]["series"][0]["path"] == f"{run.directory}/checkpoint/step-500"


def test_a_run_that_can_no_longer_be_read_is_said_and_the_server_goes_on(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        assert site.get("/")[0] == 200
        kept = run.journal_path.read_bytes()
        run.journal_path.write_bytes(b"no journal" * 1000)
        deadline = time.monotonic() + 60
        while (found := site.get("/"))[0] == 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        run.journal_path.write_bytes(kept)
        while (again := site.get("/"))[0] != 200 and time.monotonic() < deadline:
            time.sleep(0.2)

    assert found[0] == 503
    assert "alpha" in found[1]
    assert '<meta http-equiv="refresh" content="10">' in found[1]
    assert again[0] == 200


def test_a_slow_or_silent_client_keeps_nobody_waiting(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site, contextlib.ExitStack() as stack:
        for _ in range(8):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", site.port)))
            silent.sendall(b"GET / HT")

        assert site.get("/")[0] == 200


def test_a_client_that_says_a_little_now_and_then_keeps_its_place_no_longer_than_others(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(500)
    monkeypatch.setattr(serve, "MOST_REQUESTS", 1)
    monkeypatch.setattr(serve, "REQUEST_S", 0.3)
    args = argparse.Namespace(run=str(run.directory), journal=None, refresh=0)
    with serve.Server(serve.Site(args, Output(as_json=True)), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        site = Served(None, server.server_address[1])
        with socket.create_connection(("127.0.0.1", site.port)) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\n")
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(http.client.HTTPException, OSError):
                    assert site.get("/status.json")[0] == 200
                    break
                assert time.monotonic() < deadline
                with contextlib.suppress(OSError):
                    slow.sendall(b"x")
                time.sleep(0.05)
        server.shutdown()


def test_more_clients_than_it_has_room_for_are_turned_away_and_come_back(run: Run) -> None:
    run.save(500)
    with served(run.directory) as site:
        with contextlib.ExitStack() as stack:
            for _ in range(serve.MOST_REQUESTS):
                stack.enter_context(socket.create_connection(("127.0.0.1", site.port))).sendall(b"GET")
            with pytest.raises((http.client.HTTPException, OSError)):
                site.get("/")
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(http.client.HTTPException, OSError):
                assert site.get("/")[0] == 200
                break
            assert time.monotonic() < deadline


@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "asked"])
def test_an_interrupt_ends_it_with_130_and_without_a_traceback(run: Run, asked: bool) -> None:
    run.save(500)
    with served(run.directory) as site:
        if asked:
            site.get("/")
        site.child.send_signal(signal.SIGINT)
        _, err = site.child.communicate(timeout=30)

        assert site.child.returncode == 130
        assert "Traceback" not in err


def test_nothing_is_changed(run: Run) -> None:
    run.save(500)
    run.save(600, until=S.WRITING)
    run.crash()
    before = {path: path.read_bytes() for path in run.directory.parent.rglob("*") if path.is_file()}
    with served(run.directory.parent) as site:
        for path in ("/", "/alpha/", "/metrics", "/status.json"):
            assert site.get(path)[0] == 200

    assert {path: path.read_bytes() for path in run.directory.parent.rglob("*") if path.is_file()} == before


def test_a_folder_without_a_run_ends_with_10(ckptmgr: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert ckptmgr("serve", tmp_path / "empty").code == 10
    assert ckptmgr("serve", tmp_path / "nothing").code == 10


def test_a_port_that_is_taken_or_is_none_ends_with_2(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = ckptmgr("serve", run.directory, "--port", taken.getsockname()[1])

    assert done.code == 2
    assert "--port 0" in done.err
    assert ckptmgr("serve", run.directory, "--port", "65536").code == 2


def test_it_imports_no_torch(run: Run) -> None:
    run.save(500)
    script = (
        "import sys; from ckptmgr.cli import serve, build_parser; from ckptmgr.cli.output import Output;"
        "site = serve.Site(build_parser().parse_args(['serve', sys.argv[1]]), Output(as_json=False));"
        "print([site.answer(path, '').status.value for path in ('/', '/metrics')], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.directory)], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout == "[200, 200] False\n"
