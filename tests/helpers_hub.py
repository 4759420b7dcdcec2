"""A small local server that speaks the endpoints of the Hugging Face hub that fledge uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 40


class LocalHub(ThreadingHTTPServer):
    """Serves data sets: `files` maps OWNER/NAME/FILE to its bytes; `asked` lists the requests."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: list[str] = []

    def paths(self) -> list[str]:
        """The files that were downloaded, in order."""
        return [line.removeprefix("GET ") for line in self.asked if "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            content = self._info("/".join(parts[2:4]))
        elif parts[0] == "datasets" and parts[3] == "resolve":
            content = self.server.files.get("/".join([*parts[1:3], *parts[5:]]))
        else:
            content = None
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"' + hashlib.sha1(content).hexdigest() + '"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _info(self, repository: str) -> bytes | None:
        inside = {
            name.removeprefix(repository + "/"): content
            for name, content in self.server.files.items()
            if name.startswith(repository + "/")
        }
        if not inside:
            return None
        siblings = [{"rfilename": name, "size": len(data)} for name, data in inside.items()]
        return json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output quiet."""


@contextlib.contextmanager
def local_hub(
    files: dict[str, bytes], home: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalHub]:
    """The server running, with the environment pointed at it and FLEDGE_HOME at `home`."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("FLEDGE_HOME", home)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    with LocalHub(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
