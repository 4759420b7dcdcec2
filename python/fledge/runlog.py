"""What a stage leaves behind while it works, and how it is asked to stop.

`MetricsLog` writes metrics.jsonl, the truth from which every view is made; `TIMING_KEYS` names what
in a run may differ between two equal runs; `StopRequest` turns signals into a flag that loops poll.
Used by the stages. It never decides when to log or to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from fledge import files
from fledge.errors import Interrupted

TIMING_KEYS = frozenset(
    {"seconds", "data_seconds", "sampling_seconds", "ms", "time", "eta", "tokens_per_second"}
    | {"training_tokens_per_second", "chatcore_seconds"}
    | {"started", "finished", "created", "attempts", "mfu", "peak_memory_bytes", "command"}
)
"""Keys whose values depend on the clock, the machine or the words of the command line (which folder
a run is in, say); all else in a run is reproducible."""


def without_timing(value: Any) -> Any:
    """The value with every TIMING_KEYS entry taken out, at any depth: what must be reproducible."""
    if isinstance(value, dict):
        return {k: without_timing(v) for k, v in value.items() if k not in TIMING_KEYS}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


class MetricsLog:
    """metrics.jsonl of one stage: one JSON object per line, each with its `step`.

    After a resume, `truncate_after(step)` drops the rows that the lost steps wrote, so that the
    file ends up as in an uninterrupted run (but for TIMING_KEYS).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one row; it reaches the system at once, and the disk at `sync`."""
        with files.refusals(self.path):
            self._file.write(json.dumps(_finite(dict(record))) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the rows to the disk; done before a checkpoint becomes the latest."""
        with files.refusals(self.path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Keep only the rows up to and including `step` (-1 keeps none)."""
        rows = [r for r in read_metrics(self.path) if r.get("step", 0) <= step]
        self._file.close()
        files.write_text(self.path, "".join(json.dumps(r) + "\n" for r in rows))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics(MetricsLog):
    """A log that keeps nothing: of the ranks that do not lead."""

    def __init__(self) -> None:
        pass

    def append(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def truncate_after(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float) and value - value != 0.0:
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


class StopRequest:
    """While in force, SIGTERM, SIGUSR1 and the first Ctrl-C only set `requested`.

    Loops poll it after each step, save, and raise Interrupted by `raise_if_requested`. The second
    Ctrl-C raises KeyboardInterrupt at once. Outside the main thread no signal arrives here.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def raise_if_requested(self, where: str) -> None:
        """Raise Interrupted if a stop was asked for; call it when everything is saved."""
        if self.requested:
            raise Interrupted(where)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
