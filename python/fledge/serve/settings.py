"""Every number by which the server protects itself, and what an operator chooses.

One place, so that a reader sees all limits at once and a test can tighten them. `cli_serve` fills
`Settings` from flags; nothing here reads files or starts anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Upper bounds on what one request, one key and one server may hold.

    n and the others without a name of their own come from accidents of other servers: an unbounded
    n ran vLLM's API process out of memory (CVE-2026-34756).
    """

    body_bytes: int = 2 << 20
    json_depth: int = 64
    messages: int = 512
    prompts: int = 64
    n: int = 16
    stops: int = 8
    stop_chars: int = 128
    logit_bias: int = 1024
    top_logprobs: int = 20
    tools: int = 64
    waiting_rows: int = 256  # rows in the queue of one model
    key_requests: int = 128  # requests in flight of one API key
    connections: int = 1024
    header_seconds: float = 10.0  # from the first byte of a request to the end of its headers
    body_seconds: float = 30.0
    queue_seconds: float = 30.0
    request_seconds: float = 600.0
    stall_seconds: float = 60.0  # a reader that takes nothing for so long is dropped
    ping_seconds: float = 10.0  # a comment in a silent stream, so that proxies keep it open
    heartbeat_seconds: float = 5.0
    grace_seconds: float = 30.0  # for requests in flight after SIGTERM
    crashes: int = 3  # so many within crash_window_seconds end the server
    crash_window_seconds: float = 60.0
    template_seconds: float = 2.0
    template_chars: int = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How a server runs: limits, who may reach it, what it shows."""

    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    """Names beside localhost and plain addresses that a Host header may carry; "*" is any."""
    openapi: bool = False
    """Whether /openapi.json answers."""
    python_tool: bool = True
    """Whether the model's python parts are run (in the sandbox)."""
