"""`fledge serve` as a process: it starts, answers, drains on SIGTERM, and leaves with code 0."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers_mini import assert_three_parts, command, environment, fledge
from tests.serve.test_http import ask, chat, connect, head_of, read_all

ROOT = Path(__file__).resolve().parents[2]
SERVE_FAKE = """
import sys, signal
from pathlib import Path
from tests.helpers_model import tiny_tokenizer
from tests.serve.fake import fake_server
from fledge.serve.settings import Limits, Settings
grace = float(sys.argv[1])
fake = fake_server(tiny_tokenizer(), Settings(limits=Limits(grace_seconds=grace)), slots=128,
                   delay=0.02, context=1 << 16)
print(fake.server.port, flush=True)
fake.server.server.run(sockets=[fake.server._listener])
"""


def test_the_real_thing(toy, tmp_path):
    """The command, on a tiny checkpoint: one line with the address, then answers."""
    from tests.helpers_model import tiny_model

    tiny_model(toy.vocab_size).save(tmp_path)
    toy.save(tmp_path)
    process = subprocess.Popen(
        command("serve", f"tiny={tmp_path}", "--port", "0"),
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line
        url = found.group(1)
        until = time.monotonic() + 90
        while True:
            try:
                if ask(url, "GET", "/health")[0] == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < until
            time.sleep(0.05)
        status, _, body = ask(url, "POST", "/v1/chat/completions", chat("hello", max_tokens=3))
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] <= 3
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
        assert process.wait(30) == 0
        assert "hello" not in log  # no prompt text in logs
        assert "Traceback" not in log, log
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.mark.parametrize("grace", [30.0, 0.3])
def test_sigterm_under_64_streams(grace):
    """Every stream ends with a finish or an error event, and the code is 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE_FAKE, str(grace)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"}, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        until = time.monotonic() + 60
        while not healthy(url):
            assert time.monotonic() < until
            time.sleep(0.05)
        count = 30 if grace > 1 else 5000
        streams = [Stream(url, count) for _ in range(64)]
        for stream in streams:
            stream.begun.wait(60)
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while ask_health(url) == 200:
            assert time.monotonic() < until
            time.sleep(0.01)
        for stream in streams:
            stream.thread.join(60)
        assert process.wait(30) == 0
        for stream in streams:
            assert stream.data.endswith(b"data: [DONE]\n\n"), stream.data[-200:]
            assert b'"finish_reason":"stop"' in stream.data or b'"error"' in stream.data
        if grace > 1:
            assert all(b'"error"' not in stream.data for stream in streams)
        else:
            assert all(b'"shutting_down"' in stream.data for stream in streams)
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


class Stream:
    """A streamed chat read to its end in a thread."""

    def __init__(self, url: str, count: int) -> None:
        self.data = b""
        self.begun = threading.Event()
        self.sock: socket.socket = connect(url)
        self.sock.settimeout(60)
        self.body = chat(f"count {count}", stream=True)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        with self.sock:
            self.sock.sendall(head_of(self.body) + self.body)
            while b"content" not in self.data:
                self.data += self.sock.recv(4096)
            self.begun.set()
            self.data += read_all(self.sock)
        # unchunk: the sizes stand between the events
        self.data = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", self.data.partition(b"\r\n\r\n")[2])
        self.data = self.data.removesuffix(b"\r\n")


def healthy(url: str) -> bool:
    return ask_health(url) == 200


def ask_health(url: str) -> int:
    try:
        return ask(url, "GET", "/health")[0]
    except OSError:
        return 0


def test_refusals(tmp_path):
    for words in (
        ["serve", tmp_path / "absent"],
        ["serve", tmp_path, "--host", "0.0.0.0"],
        ["serve", tmp_path, "--port", "70000"],
        ["serve", tmp_path, "--api-keys", tmp_path / "absent"],
    ):
        done = fledge(*words)
        assert done.returncode == 1, done.stderr
        assert_three_parts(done.stderr)


def test_a_port_that_is_taken(toy, tmp_path):
    from tests.helpers_model import tiny_model

    tiny_model(toy.vocab_size).save(tmp_path)
    toy.save(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = fledge("serve", tmp_path, "--port", taken.getsockname()[1])
    assert done.returncode == 1 and "cannot listen" in done.stderr
    assert_three_parts(done.stderr)
