"""Raw HTTP: one error shape, limits, keys, hosts, slow and broken clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from fledge.serve.gate import host_name
from fledge.serve.keys import Keys, load_keys
from fledge.serve.settings import Limits, Settings
from tests.serve.fake import fake_server, open_files
from tests.serve.test_openai_client import wait_until

CHAT = "/v1/chat/completions"
SECRET = "a-long-enough-secret-key"


def ask(
    url: str, method: str, path: str, body: Any = None, headers: dict | None = None
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request on a connection of its own."""
    import http.client

    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        given = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            method, path, body, {**given, **(headers or {})},
            encode_chunked="Transfer-Encoding" in (headers or {}),
        )  # fmt: skip
        reply = connection.getresponse()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def chat(text: str, **more) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], **more}).encode()


def assert_error(reply, status: int, code: str | None = None) -> dict:
    got, headers, body = reply
    assert got == status, body
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert code is None or error["code"] == code, error
    return error


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"messages": NaN}', "invalid_json"),
        (b'{"temperature": 1e999, "messages": [{"role":"user","content":"x"}]}', None),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, None),
        (b"1" * 10_000, "invalid_json"),
        (b"[]", None),
        (b'"text"', None),
        (b"null", None),
        (b"{}", "missing_required_parameter"),
        (b'{"messages": 3}', "invalid_type"),
        (b'{"messages": [3]}', "invalid_type"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "invalid_type"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": "2"}', "invalid_type"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 1.5}', "invalid_type"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', None),
    ],
)
def test_malformed_bodies(fake, body, code):
    assert_error(ask(fake.url, "POST", CHAT, body), 400, code)


def test_a_lone_surrogate_is_text(fake):
    body = b'{"messages": [{"role": "user", "content": "say \\ud800!"}], "user": "\\udfff"}'
    status, _, reply = ask(fake.url, "POST", CHAT, body)
    assert status == 200
    assert json.loads(reply)["choices"][0]["message"]["content"] == "\ufffd!"


def test_paths_and_methods(fake):
    assert_error(ask(fake.url, "GET", "/nothing"), 404, "unknown_url")
    assert_error(ask(fake.url, "GET", "/v1/../etc/passwd"), 404, "unknown_url")
    assert_error(ask(fake.url, "GET", "/web/../server.py"), 404, "unknown_url")
    assert_error(ask(fake.url, "GET", "/web/%2e%2e/server.py"), 404, "unknown_url")
    assert "classifier" in assert_error(
        ask(fake.url, "POST", "/v1/moderations", b"{}"), 404, "unknown_url"
    )["message"]  # fmt: skip
    assert_error(ask(fake.url, "POST", "/v1/responses", b"{}"), 404)
    assert_error(ask(fake.url, "POST", "/v1/embeddings", b"{}"), 404)
    reply = ask(fake.url, "GET", CHAT)
    assert_error(reply, 405, "method_not_allowed")
    assert reply[1]["allow"] == "POST"
    assert_error(ask(fake.url, "DELETE", "/v1/models"), 405)
    assert ask(fake.url, "HEAD", "/v1/models")[::2] == (200, b"")


def test_only_json_is_taken(fake):
    headers = {"Content-Type": "text/plain"}
    assert_error(ask(fake.url, "POST", CHAT, chat("say x"), headers), 415)
    good = {"Content-Type": "application/json; charset=utf-8"}
    assert ask(fake.url, "POST", CHAT, chat("say x"), good)[0] == 200


def test_hosts(fake):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        assert_error(ask(fake.url, "GET", "/health", headers={"Host": host}), 403)
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST:8000"):
        assert ask(fake.url, "GET", "/health", headers={"Host": host})[0] == 200
    assert host_name("[::1]:80") == "::1" and host_name("A.b:1") == "a.b"


def test_other_origins(fake):
    for origin in ("http://evil.example", "null", "https://localhost.evil"):
        headers = {"Origin": origin}
        assert_error(ask(fake.url, "POST", CHAT, chat("say x"), headers), 403)
    headers = {"Origin": fake.url}
    status, got, _ = ask(fake.url, "POST", CHAT, chat("say x"), headers)
    assert status == 200 and "access-control-allow-origin" not in got
    assert_error(ask(fake.url, "OPTIONS", CHAT, headers=headers), 405)


def test_security_headers(fake):
    for path in ("/health", "/nothing", "/"):
        headers = ask(fake.url, "GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def test_body_limit(toy):
    with fake_server(toy, Settings(limits=Limits(body_bytes=2000))).server as server:
        assert ask(server.url, "POST", CHAT, chat("say x"))[0] == 200
        assert_error(ask(server.url, "POST", CHAT, chat("x" * 3000)), 413, "request_too_large")

        def chunked():
            for _ in range(50):
                yield b"x" * 100

        reply = ask(server.url, "POST", CHAT, chunked(), {"Transfer-Encoding": "chunked",
                    "Content-Type": "application/json"})  # fmt: skip
        assert_error(reply, 413)


def test_limits_of_lists(fake):
    many = [{"role": "user", "content": "x"}] * 513
    body = json.dumps({"messages": many}).encode()
    assert assert_error(ask(fake.url, "POST", CHAT, body), 400)["param"] == "messages"
    body = json.dumps({"prompt": ["x"] * 65}).encode()
    assert assert_error(ask(fake.url, "POST", "/v1/completions", body), 400)["param"] == "prompt"
    wrong = json.dumps({"prompt": [-1] * 300_000}).encode()
    began = time.monotonic()
    assert_error(ask(fake.url, "POST", "/v1/completions", wrong), 400)
    assert time.monotonic() - began < 5  # not one error for each of them


# -- keys ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(toy, tmp_path_factory):
    import hashlib

    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    hashed = hashlib.sha256(b"another-secret-of-mine").hexdigest()
    path.write_text(f"# keys\nalice {SECRET}\nbob sha256:{hashed}  # hashed\n")
    made = fake_server(toy, Settings(limits=Limits(key_requests=1)), keys=load_keys(path))
    with made.server:
        yield made


def test_keys(keyed):
    bearer = {"Authorization": f"Bearer {SECRET}"}
    assert_error(ask(keyed.url, "GET", "/v1/models"), 401, "invalid_api_key")
    for wrong in ("Bearer nope", f"Basic {SECRET}", "Bearer ", "Bearer \xff", SECRET):
        reply = ask(keyed.url, "GET", "/v1/models", headers={"Authorization": wrong})
        assert_error(reply, 401, "invalid_api_key")
        assert reply[1]["www-authenticate"] == "Bearer"
    assert ask(keyed.url, "GET", "/v1/models", headers=bearer)[0] == 200
    other = {"Authorization": "bearer another-secret-of-mine"}
    assert ask(keyed.url, "GET", "/v1/models", headers=other)[0] == 200
    assert_error(ask(keyed.url, "GET", "/metrics"), 401)
    for path in ("/health", "/livez", "/version"):
        assert ask(keyed.url, "GET", path)[0] == 200


def test_a_key_has_its_share_only(keyed):
    keyed.gate.clear()
    bearer = {"Authorization": f"Bearer {SECRET}"}
    thread = threading.Thread(target=ask, args=(keyed.url, "POST", CHAT, chat("say x"), bearer))
    thread.start()
    try:
        wait_until(lambda: keyed.pool.running == 1)
        reply = ask(keyed.url, "POST", CHAT, chat("say y"), bearer)
        error = assert_error(reply, 429, "too_many_requests")
        assert reply[1]["retry-after"] == "1" and "rate limit" not in error["message"].lower()
    finally:
        keyed.gate.set()
        thread.join()
    other = {"Authorization": "Bearer another-secret-of-mine"}
    assert ask(keyed.url, "POST", CHAT, chat("say z"), other)[0] == 200


def test_keys_without_any_are_open():
    assert len(Keys()) == 0 and Keys().name_of(SECRET) is None


# -- broken and slow clients ---------------------------------------------------------------------


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head_of(body: bytes, *, length: int | None = None) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode()


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def test_not_http(fake):
    for junk in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
                 b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
                 b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                 b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n"):  # fmt: skip
        with connect(fake.url) as sock:
            sock.sendall(junk)
            reply = read_all(sock)
        head, _, body = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400"), junk[:40]
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_one_byte_at_a_time(fake):
    body = chat("say slow")
    with connect(fake.url) as sock:
        for byte in head_of(body) + body:
            sock.send(bytes([byte]))
        reply = sock.recv(65536)
    assert reply.startswith(b"HTTP/1.1 200")


def test_slow_headers_and_bodies_are_dropped(toy):
    limits = Limits(header_seconds=0.3, body_seconds=0.3)
    with fake_server(toy, Settings(limits=limits)).server as server:
        with connect(server.url) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: local")
            assert read_all(sock) == b""
        with connect(server.url) as sock:
            sock.sendall(head_of(b"", length=100) + b"{")
            assert sock.recv(65536).startswith(b"HTTP/1.1 408")
        with connect(server.url) as sock:  # says nothing at all
            assert read_all(sock) == b""
        # a connection that was used already is no different
        with connect(server.url) as sock:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = sock.recv(65536)
            while not answer.endswith(b"}"):  # head and body may come apart
                answer += sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            sock.sendall(b"GET /livez HT")
            assert read_all(sock) == b""


def test_leaving_at_any_time_frees_the_row(toy):
    fake = fake_server(toy, slots=64, delay=0.002)
    with fake.server:
        whole = head_of(chat("count 500", stream=True)) + chat("count 500", stream=True)
        before = open_files()
        for cut in range(0, len(whole) + 1, 13):
            with connect(fake.url) as sock:
                sock.sendall(whole[:cut])
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        socks = []
        for _ in range(30):
            sock = connect(fake.url)
            sock.sendall(whole)
            socks.append(sock)
        wait_until(lambda: fake.engine.in_flight >= 20)
        for i, sock in enumerate(socks):
            if i % 3 == 0:
                sock.recv(50)
            elif i % 3 == 1:
                sock.shutdown(socket.SHUT_WR)  # half-closed: as good as gone
            sock.close()
        wait_until(lambda: fake.engine.in_flight == 0 and fake.pool.running == 0)
        wait_until(lambda: open_files() <= before + 2)
        assert ask(fake.url, "POST", CHAT, chat("say well"))[0] == 200


def test_a_reader_that_never_reads_is_dropped_and_harms_nobody(toy):
    limits = Limits(stall_seconds=0.5)
    # a pace, because an engine without one leaves the event loop no turn on a busy machine
    fake = fake_server(toy, Settings(limits=limits), context=1 << 20, slots=8, delay=0.0005)
    with fake.server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", fake.server.port))
        body = chat("count 100000", stream=True, logprobs=True, top_logprobs=3)
        sock.sendall(head_of(body) + body)
        wait_until(lambda: fake.engine.in_flight == 1)
        # meanwhile others are served
        assert ask(fake.url, "POST", CHAT, chat("say fine"))[0] == 200
        wait_until(lambda: fake.pool.running == 0, 90)
        wait_until(lambda: not fake.server.server.server_state.connections, 30)
        assert fake.engine.cancelled  # before its end
        sock.close()


def test_pipelined_requests(fake):
    body = chat("say one")
    request = head_of(body) + body
    with connect(fake.url) as sock:
        sock.sendall(request * 3 + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
                     b"Connection: close\r\n\r\n")  # fmt: skip
        reply = read_all(sock)
    assert reply.count(b"HTTP/1.1 200") == 4


def test_health_and_version(fake):
    status, _, body = ask(fake.url, "GET", "/health")
    health = json.loads(body)
    assert status == 200 and health["status"] == "ok"
    assert health["models"] == {"fake": "ready", "other": "ready"}
    assert json.loads(ask(fake.url, "GET", "/livez")[2]) == {"status": "alive"}
    assert json.loads(ask(fake.url, "GET", "/version")[2])["version"]


def test_pings_keep_a_silent_stream_open(toy):
    fake = fake_server(toy, Settings(limits=Limits(ping_seconds=0.1)))
    with fake.server:
        fake.gate.clear()
        body = chat("say late", stream=True)
        with connect(fake.url) as sock:
            sock.sendall(head_of(body) + body)
            data = b""
            while data.count(b": ping\n\n") < 3:
                data += sock.recv(4096)
            fake.gate.set()
            while b"[DONE]" not in data:
                data += sock.recv(4096)
        assert b'"late"' in data or b'"content":"l' in data


def test_metrics_page(fake):
    ask(fake.url, "POST", CHAT, chat("say x"))
    status, headers, body = ask(fake.url, "GET", "/metrics")
    text = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/plain")
    for name in ("vllm:num_requests_running", "vllm:time_to_first_token_seconds_bucket",
                 "vllm:e2e_request_latency_seconds_sum", "vllm:request_success_total",
                 "vllm:prompt_tokens_total", "fledge:http_requests_total"):  # fmt: skip
        assert f"\n{name}" in text, name
    assert "say x" not in text


def test_an_unfinished_answer_goes_on(fake):
    """continue_final_message: the prompt ends inside the assistant's turn."""
    messages = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "ab"}]
    body = {"messages": messages, "continue_final_message": True}
    status, _, _ = ask(fake.url, "POST", "/v1/chat/completions", json.dumps(body))
    prompt = list(fake.engine.requests.values())[-1].prompt
    assert status == 200
    assert fake.engine.tokenizer.decode(prompt).endswith("<|assistant_start|>ab")
    wrong = {**body, "messages": messages[:1]}
    status, _, reply = ask(fake.url, "POST", "/v1/chat/completions", json.dumps(wrong))
    assert (status, json.loads(reply)["error"]["param"]) == (400, "continue_final_message")


def test_the_oldest_exchanges_are_left_out_where_that_is_asked(toy):
    made = fake_server(toy, context=120)
    messages = [{"role": "system", "content": "S"}]
    for i in range(6):
        messages += [{"role": "user", "content": f"say number {i}"},
                     {"role": "assistant", "content": f"number {i}"}]  # fmt: skip
    messages.append({"role": "user", "content": "say now"})
    with made.server:

        def send(**more):
            body = json.dumps({"messages": messages, **more})
            status, _, reply = ask(made.url, "POST", "/v1/chat/completions", body)
            return status, json.loads(reply)

        assert send()[1]["error"]["code"] == "context_length_exceeded"
        assert send(truncation="disabled")[0] == 400
        assert send(truncation="sometimes")[0] == 400
        status, reply = send(truncation="auto")
        prompt = list(made.engine.requests.values())[-1].prompt
        text = made.engine.tokenizer.decode(prompt)
        assert status == 200 and reply["usage"]["dropped_messages"] % 2 == 0
        assert text.startswith("<|bos|><|system_start|>S") and "number 0" not in text
        assert "number 5" in text and text.endswith("say now<|user_end|><|assistant_start|>")
        assert len(prompt) <= 120 - 120 // 3
        status, reply = send(truncation="auto", max_tokens=2)
        longer = list(made.engine.requests.values())[-1].prompt
        assert len(prompt) < len(longer) <= 118  # a short answer leaves more room to what was said
        messages[-1]["content"] = "x" * 200
        assert send(truncation="auto")[1]["error"]["code"] == "context_length_exceeded"
    short = fake_server(toy)
    with short.server:
        body = json.dumps({"messages": messages[-1:], "truncation": "auto"})
        _, _, reply = ask(short.url, "POST", "/v1/chat/completions", body)
        assert json.loads(reply)["usage"]["dropped_messages"] == 0
