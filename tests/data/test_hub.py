"""Fetching from the hub: from a small local server that speaks its endpoints, and offline."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fledge.data import hub
from fledge.errors import UserError

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


CONTENT = b'{"question": "1+1?", "answer": "#### 2"}\n'
FILE = "/datasets/some/set/resolve/main/data/train.jsonl"


class FakeHub(BaseHTTPRequestHandler):
    """HEAD and GET of one file, with the headers that huggingface_hub reads."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path != FILE:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"' + hashlib.sha1(CONTENT).hexdigest() + '"')
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if body:
            self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as made:
        made.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield made
        made.shutdown()


def test_a_file_is_fetched_once_and_then_kept(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    (path,) = hub.fetch("some/set", ["data/train.jsonl"])
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "home")
    asked = len(server.asked)  # type: ignore[attr-defined]
    assert hub.fetch("some/set", ["data/train.jsonl"]) == [path]
    assert len(server.asked) == asked  # type: ignore[attr-defined]
    assert hub.reachable()


def test_a_file_that_does_not_exist(server: ThreadingHTTPServer) -> None:
    with pytest.raises(UserError) as caught:
        hub.fetch("some/set", ["data/other.jsonl"])
    assert "the hub does not give some/set/data/other.jsonl" in caught.value.what


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert not hub.reachable(timeout_seconds=0.5)
    with pytest.raises(UserError) as caught:
        hub.fetch("some/set", ["data/train.jsonl"])
    assert "not found under --data.root or FLEDGE_DATA, and the hub is not reachable" in (
        caught.value.why
    )


def test_offline_mode_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    assert hub.offline() and not hub.reachable()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        hub.fetch("some/set", ["data/train.jsonl"])


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    assert hub.home() == tmp_path
    monkeypatch.delenv("FLEDGE_HOME")
    assert hub.home() == Path.home() / ".cache" / "fledge"
