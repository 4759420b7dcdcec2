"""A server under the same load for a long time: does its memory grow, does it lose anything?

    python benchmarks/serve_soak.py [--minutes 20] [--clients 24]     results: serve_soak.md

The server and the clients of serve_load.py: half of the clients ask the scripted engine (20 % of
their requests leave in the middle, 10 % run Python), half the real one. Twice a minute the server's
resident memory, descriptors and threads are read. Speed is not measured: other work on the machine
does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import time
from pathlib import Path

import numpy as np
from serve_load import SLOTS, Server, Tally, closed_loop, resources, rows_in_use

RESULTS = Path(__file__).with_suffix(".md")
WARM_SHARE = 0.25  # of the time: caches fill, the allocator finds its size
SAMPLE_SECONDS = 30.0


async def soak(server: Server, minutes: float, clients: int) -> tuple[list[Tally], list[tuple]]:
    """Tallies of the two models, and (minutes, MB, descriptors, threads) of every sample."""
    began, samples = time.monotonic(), []

    async def watch() -> None:
        while True:
            await asyncio.sleep(min(SAMPLE_SECONDS, 6 * minutes))
            passed = (time.monotonic() - began) / 60
            samples.append((passed, *resources(server.process.pid)))
            print(f"{passed:5.1f} min  {samples[-1][1]:.0f} MB {samples[-1][2:]}", flush=True)

    watching = asyncio.create_task(watch())
    loads = [
        closed_loop(server.port, model, clients // 2, 60 * minutes) for model in ("fake", "small")
    ]
    tallies = await asyncio.gather(*loads)
    watching.cancel()
    return list(tallies), samples


def main() -> None:
    """Runs it and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=24)
    args = parser.parse_args()
    with Server(256) as server:
        # every row of the cache once: its memory is there from its first use on
        asyncio.run(closed_loop(server.port, "small", 2 * SLOTS, 10))
        tallies, samples = asyncio.run(soak(server, args.minutes, args.clients))
        time.sleep(1)
        after, left = resources(server.process.pid), rows_in_use(server.port)
    # what comes after the time is the end of the last requests, one by one
    late = np.array([s for s in samples if WARM_SHARE * args.minutes <= s[0] <= args.minutes])
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] if len(late) > 2 else float("nan")
    answers = sum(t.done for t in tallies)
    lines = [
        "# The server under a long load", "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} CPUs; "
        f"`benchmarks/serve_soak.py --minutes {args.minutes:g} --clients {args.clients}`.", "",
        f"{answers:,} whole answers, {sum(t.left for t in tallies):,} left in the middle, "
        f"{sum(t.tools for t in tallies):,} with Python, {sum(t.shed for t in tallies)} shed, "
        f"{sum(len(t.wrong) for t in tallies)} lost or cut; "
        f"{sum(t.tokens for t in tallies):,} tokens.", "",
        f"Resident memory after the first quarter of the time: {late[0, 1]:.0f} MB at first, "
        f"{late[:, 1].min():.0f} to {late[:, 1].max():.0f}, {late[-1, 1]:.0f} at last; a straight "
        f"line through the samples rises {slope:.2f} MB a minute. Descriptors "
        f"{late[:, 2].min():.0f} to {late[:, 2].max():.0f}, threads {late[:, 3].min():.0f} to "
        f"{late[:, 3].max():.0f}. A second after the last request {after[0]:.0f} MB, "
        f"{after[1]} descriptors, and running, waiting and cache in use summed up to {left}. "
        f"Exit code after SIGTERM: {server.code}.",
        "",
    ]  # fmt: skip
    for tally in tallies:
        lines += [f"- {text}" for text in tally.wrong[:10]]
    RESULTS.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
