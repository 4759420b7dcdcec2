"""Counters, gauges and histograms in Prometheus' text format, under vLLM's names.

Dashboards made for vLLM work unchanged. Written by the engine threads and by the event loop, read
by GET /metrics; one lock guards all, and one observation costs about a microsecond. No prompt text
and no client ever becomes a label.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0, 600.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

# name -> (kind, help, buckets)
FAMILIES: dict[str, tuple[str, str, Sequence[float] | None]] = {
    "vllm:num_requests_running": ("gauge", "Requests that the engine works on.", None),
    "vllm:num_requests_waiting": ("gauge", "Requests in the queue.", None),
    "vllm:kv_cache_usage_perc": ("gauge", "Share of the cache slots in use, 0 to 1.", None),
    "vllm:prefix_cache_queries": ("counter", "Prompt tokens looked up in the prefix cache.", None),
    "vllm:prefix_cache_hits": ("counter", "Prompt tokens found in the prefix cache.", None),
    "vllm:prompt_tokens": ("counter", "Prompt tokens read.", None),
    "vllm:generation_tokens": ("counter", "Tokens generated.", None),
    "vllm:request_success": ("counter", "Finished requests by reason.", None),
    "vllm:time_to_first_token_seconds": ("histogram", "From arrival to the first token.", SECONDS),
    "vllm:inter_token_latency_seconds": ("histogram", "Between two tokens of a row.", SECONDS),
    "vllm:time_per_output_token_seconds": ("histogram", "The same, its older name.", SECONDS),
    "vllm:e2e_request_latency_seconds": ("histogram", "From arrival to the end.", SECONDS),
    "vllm:request_queue_time_seconds": ("histogram", "Time in the queue.", SECONDS),
    "vllm:request_prefill_time_seconds": ("histogram", "From the queue to a token.", SECONDS),
    "vllm:request_decode_time_seconds": ("histogram", "From first to last token.", SECONDS),
    "vllm:request_prompt_tokens": ("histogram", "Prompt tokens of a request.", TOKENS),
    "vllm:request_generation_tokens": ("histogram", "Generated tokens of a request.", TOKENS),
    "fledge:http_requests": ("counter", "HTTP requests by path and status.", None),
    "fledge:engine_crashes": ("counter", "Times that an engine failed and was rebuilt.", None),
    "fledge:cancelled_requests": ("counter", "Requests whose client went away.", None),
    "fledge:tool_runs": ("counter", "Tool calls that the server ran, by outcome.", None),
}

Labels = tuple[tuple[str, str], ...]


@dataclass
class Histogram:
    """Counts per bucket (the last is +Inf), and the sum."""

    counts: list[int]
    total: float = 0.0


@dataclass
class Metrics:
    """All figures of one server."""

    values: dict[str, dict[Labels, float]] = field(default_factory=dict)
    histograms: dict[str, dict[Labels, Histogram]] = field(default_factory=dict)
    gauges: list[Callable[[], dict[str, dict[Labels, float]]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, labels: Labels, amount: float = 1) -> None:
        """Raises a counter."""
        with self.lock:
            family = self.values.setdefault(name, {})
            family[labels] = family.get(labels, 0) + amount

    def observe(self, name: str, labels: Labels, value: float, times: int = 1) -> None:
        """Adds `value` to a histogram, `times` over."""
        bounds = FAMILIES[name][2]
        assert bounds is not None, name
        with self.lock:
            family = self.histograms.setdefault(name, {})
            found = family.get(labels)
            if found is None:
                found = family[labels] = Histogram([0] * (len(bounds) + 1))
            found.counts[bisect.bisect_left(bounds, value)] += times
            found.total += value * times

    def text(self) -> str:
        """The page of GET /metrics."""
        lines: list[str] = []
        with self.lock:
            values = {name: dict(family) for name, family in self.values.items()}
            histograms = {
                name: {labels: Histogram(list(h.counts), h.total) for labels, h in family.items()}
                for name, family in self.histograms.items()
            }
        for read in self.gauges:
            for name, family in read().items():
                values.setdefault(name, {}).update(family)
        for name, (kind, about, bounds) in FAMILIES.items():
            suffix = "_total" if kind == "counter" else ""
            lines += [f"# HELP {name}{suffix} {about}", f"# TYPE {name}{suffix} {kind}"]
            for labels, value in values.get(name, {}).items():
                lines.append(f"{name}{suffix}{_braces(labels)} {value:.15g}")
            for labels, histogram in histograms.get(name, {}).items():
                lines += _histogram_lines(name, labels, histogram, bounds or ())
        return "\n".join(lines) + "\n"


def _histogram_lines(
    name: str, labels: Labels, histogram: Histogram, bounds: Sequence[float]
) -> list[str]:
    lines, running = [], 0
    for bound, count in zip((*map(str, bounds), "+Inf"), histogram.counts, strict=True):
        running += count
        lines.append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {running}")
    lines.append(f"{name}_sum{_braces(labels)} {histogram.total:.9g}")
    lines.append(f"{name}_count{_braces(labels)} {running}")
    return lines


def _braces(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{escaped(value)}"' for key, value in labels) + "}"
