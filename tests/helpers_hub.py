"""A small local server that speaks the endpoints of the Hugging Face hub that fledge uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 40


FAULTS = ("429", "500", "broken off", "short", "corrupt", "hangs")
"""What a request may meet instead of its answer: a status; half of the body and then silence; a
body of another length; other bytes of the right length; no answer until the server closes."""


class LocalHub(ThreadingHTTPServer):
    """Serves data sets: `files` maps OWNER/NAME/FILE to its bytes; `asked` lists the requests.

    `faults` maps a part of a path to the faults that its next GETs meet, one each, in order. A path
    without a data set (/NAME) is a plain file, as CORE's archive is.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: list[str] = []
        self.faults: dict[str, list[str]] = {}
        self.closing = threading.Event()

    def paths(self) -> list[str]:
        """The files that were downloaded, in order."""
        return [line.removeprefix("GET ") for line in self.asked if "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        ranged = self.headers.get("Range")
        self.server.asked.append(f"GET {self.path}" + (f" {ranged}" if ranged else ""))
        fault = None
        for part, faults in self.server.faults.items():
            if part in self.path and faults:
                fault = faults.pop(0)
                break
        if fault in ("429", "500"):
            self.send_response(int(fault))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hangs":
            self.server.closing.wait(20)
            self.close_connection = True
            return
        self._answer(body=True, fault=fault)

    def _answer(self, *, body: bool, fault: str | None = None) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        name = "/".join(parts)
        if parts[:2] == ["api", "datasets"]:
            content = self._info("/".join(parts[2:4]))
        elif parts[0] == "datasets" and parts[3] == "resolve":
            content = self.server.files.get("/".join([*parts[1:3], *parts[5:]]))
        else:
            content = self.server.files.get(name) if len(parts) == 1 else None
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = len(content)
        etag = etag_of(name, content)
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(first.group(1)) if first else 0
        if fault == "corrupt":
            content = bytes(byte ^ 1 for byte in content)
        elif fault == "short":
            content = content[: whole // 2]
        sent = content[start:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if body and fault == "broken off":
            self.wfile.write(sent[: len(sent) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(sent)

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


def etag_of(name: str, content: bytes) -> str:
    """As the hub names content: large files by SHA-256, small ones by Git's SHA-1."""
    if name.endswith(".parquet"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("FLEDGE_CORE_BUNDLE", f"{address}/eval_bundle.zip")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
