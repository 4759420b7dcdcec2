"""A server under load: concurrency 1 to 128, clients that leave, tools, and twice too many.

    .venv/bin/python benchmarks/serve_load.py [--seconds 10] [--concurrency 1,4,16,64,128]

A server process of its own holds two models: `fake`, whose engine answers what it is told at a
fixed pace (so that every byte of every answer can be checked, and the server's own cost shows), and
`small`, a random model of 4 layers behind the real engine. One client process, raw sockets. Of the
requests 20 % leave in the middle of the stream and 10 % make the model run Python in the sandbox.
Every answer that was not left must be whole: text, finish and [DONE]. Then twice the capacity
arrives at a small queue: what is shed must be shed fast, and the rest must not suffer. The table
goes to benchmarks/serve_load.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]
RESULTS = Path(__file__).with_suffix(".md")
STEP_SECONDS = 0.01  # of the fake engine: 100 tokens per second and row
SLOTS = 64
CANCELS, TOOLS = 0.2, 0.1
SPREAD = 0.3  # seconds over which the clients of a level arrive


# -- the server process --------------------------------------------------------------------------


def serve(waiting: int) -> None:
    """Runs the two models until SIGTERM; prints the port."""
    from tests.helpers_model import tiny_tokenizer
    from tests.serve.fake import FakeEngine

    from fledge.engine import Engine
    from fledge.engine.tools import Tools
    from fledge.model import ModelConfig, Transformer
    from fledge.serve.context import Context
    from fledge.serve.metrics import Metrics
    from fledge.serve.models import Models, ServedModel
    from fledge.serve.server import LiveServer
    from fledge.serve.settings import Limits, Settings
    from fledge.serve.worker import Pool

    class Forgetful(FakeEngine):
        """The tests' engine keeps every request for them to look at; a long load must not."""

        def step(self) -> list:
            events = super().step()
            running = {row.request_id for row in self.rows}
            self.requests = {i: r for i, r in self.requests.items() if i in running}
            self.cancelled.clear()
            return events

    tok = tiny_tokenizer()
    limits, metrics = Limits(waiting_rows=waiting), Metrics()

    def fake() -> FakeEngine:
        engine = Forgetful(tok, slots=SLOTS, delay=STEP_SECONDS)
        engine.gate.set()
        return engine

    def small() -> Engine:
        config = ModelConfig(tok.vocab_size, 256, 4, 4, 4, 64, 768, 1024)
        return Engine(Transformer(config, seed=0).eval(), tok, slots=SLOTS)

    models = [
        ServedModel(name, tok, 1024, Pool(name, [build], limits=limits, metrics=metrics))
        for name, build in (("fake", fake), ("small", small))
    ]
    context = Context(Models(models), Settings(limits=limits), metrics, Tools())
    live = LiveServer(context)
    print(live.port, flush=True)
    live.server.run(sockets=[live._listener])


# -- the client ----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened at one level."""

    done: int = 0
    left: int = 0
    tools: int = 0
    shed: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    shed_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Until the last answer was whole: what was begun in time is waited for."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


async def one(port: int, model: str, rng: random.Random, tally: Tally, *, mixed: bool) -> None:
    """One streamed request, read to its end or left in the middle; checks what came."""
    leaves = mixed and rng.random() < CANCELS
    tool = mixed and not leaves and model == "fake" and rng.random() < TOOLS / (1 - CANCELS)
    number = rng.randrange(20, 60)
    text = f"python {number}*3" if tool else f"count {number}"
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True,
             "max_tokens": 200, "stream_options": {"include_usage": True}}  # fmt: skip
    if model == "small":
        asked |= {"max_tokens": number, "ignore_eos": True, "python_tool": False}
    body = json.dumps(asked).encode()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        status = int((await reader.readline()).split()[1])
        headers = await reader.readuntil(b"\r\n\r\n")
        if status in (429, 503):
            tally.shed += 1
            tally.shed_seconds.append(time.monotonic() - began)
            if b"retry-after" not in headers:
                tally.wrong.append("shed without Retry-After")
            return
        if status != 200:
            tally.wrong.append(f"status {status}")
            return
        await read_stream(reader, began, tally, leaves=leaves, tool=tool, number=number,
                          model=model)  # fmt: skip
    finally:
        writer.close()


async def read_stream(
    reader: asyncio.StreamReader, began: float, tally: Tally, *,
    leaves: bool, tool: bool, number: int, model: str,
) -> None:  # fmt: skip
    """Reads events to [DONE] and checks the whole."""
    said, reason, output, ended, usage, last = "", None, "", False, 0, 0.0
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            ended = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            tally.wrong.append(event["error"]["code"])
            return
        if event.get("usage"):
            usage = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            piece = choice["delta"].get("content") or ""
            output += "".join(e.get("output", "") for e in choice["delta"].get("tool_events", ()))
            reason = choice["finish_reason"] or reason
            if piece:
                now = time.monotonic()
                if said:
                    tally.gaps.append(now - last)
                else:
                    tally.first.append(now - began)
                last = now
                said += piece
        if leaves and len(said) > 20:
            tally.left += 1
            return
    tally.tokens += usage
    if model == "fake" and tool:
        whole = said == "so:  done" and output == str(number * 3) and reason == "stop"
        tally.tools += 1
    elif model == "fake":
        whole = said == " ".join(str(i + 1) for i in range(number)) and reason == "stop"
    else:
        whole = usage == number and reason == "length"
    if whole and ended:
        tally.done += 1
    else:
        tally.wrong.append(f"not whole: {said[-30:]!r} {reason} [DONE]={ended} {usage}")


async def closed_loop(
    port: int, model: str, concurrency: int, seconds: float, *, mixed: bool = True
) -> Tally:
    """`concurrency` clients, each of which asks again as soon as it has its answer."""
    tally, began = Tally(), time.monotonic()
    until = began + seconds

    async def client(i: int) -> None:
        rng = random.Random(1000 * concurrency + i)
        await asyncio.sleep(rng.random() * SPREAD)
        while time.monotonic() < until:
            shed = tally.shed
            await one(port, model, rng, tally, mixed=mixed)
            if tally.shed > shed:
                # politer clients would wait the second or more of Retry-After
                await asyncio.sleep(0.2 * rng.uniform(0.5, 1.5))

    await asyncio.gather(*map(client, range(concurrency)))
    tally.seconds = time.monotonic() - began
    return tally


def resources(pid: int) -> tuple[float, int, int]:
    """(resident MB, descriptors, threads) of the server."""
    status = Path(f"/proc/{pid}/status").read_text()
    field_of = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(field_of["VmRSS"].split()[0]) / 1024, descriptors, int(field_of["Threads"])


def rows_in_use(port: int) -> str:
    """What the server's own figures say is still running or waiting."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    values = [float(line.split()[-1]) for line in lines if line.startswith(names)]
    return f"{sum(values):g}"


def cpu_seconds(pid: int) -> float:
    """Processor time that the server has used, all its threads."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(values: list[float]) -> str:
    """p50 / p95 / p99 in ms."""
    if not values:
        return "-"
    ordered = sorted(values)
    picks = (ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.95, 0.99))
    return " / ".join(f"{1e3 * value:.1f}" for value in picks)


class Server:
    """The process, started and ended."""

    def __init__(self, waiting: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(waiting)], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def levels(server: Server, args: argparse.Namespace) -> list[str]:
    """A line for each model and concurrency."""
    lines = []
    for model in ("fake", "small"):
        for concurrency in args.concurrency:
            used = cpu_seconds(server.process.pid)
            tally = asyncio.run(closed_loop(server.port, model, concurrency, args.seconds))
            used = cpu_seconds(server.process.pid) - used
            memory, descriptors, threads = resources(server.process.pid)
            cost = 1e3 * used / max(tally.tokens, 1)
            lines.append(
                f"| {model} | {concurrency} | {tally.done} | {tally.left} | {tally.tools} | "
                f"{tally.shed} | {len(tally.wrong)} | {tally.tokens_per_second:,.0f} | "
                f"{percentiles(tally.first)} | {percentiles(tally.gaps)} | {cost:.2f} | "
                f"{memory:.0f} | {descriptors} | {threads} |"
            )
            print(lines[-1], *tally.wrong[:5], flush=True)
    return lines


def overload(args: argparse.Namespace) -> list[str]:
    """Peak goodput at a load that fits, then twice as many clients at a queue of 16."""
    with Server(16) as server:
        asyncio.run(closed_loop(server.port, "fake", 4, 1, mixed=False))
        rows = []
        for clients in (SLOTS, 2 * SLOTS, 4 * SLOTS):
            tally = asyncio.run(
                closed_loop(server.port, "fake", clients, args.seconds, mixed=False)
            )
            rows.append((clients, tally))
    peak = rows[0][1].tokens_per_second
    return [
        f"| {clients} | {t.done} | {t.shed} | {len(t.wrong)} | {t.tokens_per_second:,.0f} | "
        f"{t.tokens_per_second / peak:.0%} | {percentiles(t.shed_seconds)} | "
        f"{percentiles(t.first)} | {percentiles(t.gaps)} |"
        for clients, t in rows
    ]


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description="load on a server of its own")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--concurrency", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 16, 64, 128]
    )
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    with Server(256) as server:
        before = resources(server.process.pid)
        asyncio.run(closed_loop(server.port, "fake", 8, 2))
        # every row once: a cache's memory is there from its first use on
        asyncio.run(closed_loop(server.port, "small", 2 * SLOTS, args.seconds))
        warm = resources(server.process.pid)
        table = levels(server, args)
        time.sleep(1)
        after = resources(server.process.pid)
        left = rows_in_use(server.port)
    shed = overload(args)
    lines = [
        "# The server under load", "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}; `benchmarks/serve_load.py --seconds {args.seconds:g}`. The "
        "clients run on the same CPUs. Load average of the machine over five minutes at the end, "
        f"others' work included: {os.getloadavg()[1]:.1f}. `fake` gives "
        f"a token per row every {STEP_SECONDS * 1e3:g} ms; `small` is a random model (4 layers, "
        "256 wide) behind the "
        f"real engine; both have {SLOTS} rows. {CANCELS:.0%} of the requests leave in the middle, "
        f"{TOOLS:.0%} run Python. The clients of a level arrive within {SPREAD} s, and come back "
        "0.1 to 0.3 s after they were shed. Times in ms: p50 / p95 / p99.", "",
        "| model | clients | whole | left | with tool | shed | lost or cut | tokens/s | "
        "first token | gap | CPU ms a token | MB | descriptors | threads |",
        "|" + " --- |" * 14, *table, "",
        f"Resident memory, descriptors, threads: {before[0]:.0f} MB, {before[1]}, {before[2]} at "
        f"the start; {warm[0]:.0f} MB, {warm[1]}, {warm[2]} when warm; {after[0]:.0f} MB, "
        f"{after[1]}, {after[2]} a second after the last request, when the sum of running, waiting "
        f"and cache in use in its /metrics was {left}. Exit code after SIGTERM: "
        f"{server.code}.", "",
        f"## Overload: {SLOTS} rows, a queue of 16", "",
        "| clients | whole | shed | lost or cut | tokens/s | of peak | shed after | first token | "
        "gap |",
        "|" + " --- |" * 9, *shed, "",
    ]  # fmt: skip
    RESULTS.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
