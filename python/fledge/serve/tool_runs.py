"""The engine's tools for one request: what it may run, and a record of what was run.

The engine runs a row's python part through `Tools.run` when it closes. A part that calls a function
of the client is not ours to run: the server ends that row as soon as it sees the closing token, so
the answer given here is never read. Everything else goes to the shared `Tools` (its sandbox), and
its outcome is kept for the reply's `tool_events`. Made by `serve.chat_api`; engine threads call it.
"""

from __future__ import annotations

import threading
from typing import Any

from fledge.engine.tools import ToolResult, Tools, ToolState
from fledge.serve.metrics import Metrics
from fledge.serve.reply import CALL


class RequestTools:
    """Looks like `Tools` to the engine."""

    def __init__(self, tools: Tools, functions: frozenset[str], metrics: Metrics) -> None:
        self._tools = tools
        self._functions = functions
        self._metrics = metrics
        self._lock = threading.Lock()
        self._runs: list[tuple[str, ToolResult]] = []

    def new_state(self) -> ToolState:
        """The memory of one choice."""
        return self._tools.new_state()

    def run(self, code: str, state: ToolState | None = None) -> ToolResult:
        """The result of a python part; never raises for what the model wrote."""
        call = CALL.fullmatch(code)
        if "python" in self._functions or (call and call.group(1) in self._functions):
            return ToolResult(ok=True, stdout="")
        result = self._tools.run(code, state)
        with self._lock:
            self._runs.append((code, result))
        outcome = (("ok", str(result.ok).lower()),)
        self._metrics.add("fledge:tool_runs", outcome)
        return result

    def outcome(self, code: str, output: str) -> dict[str, Any]:
        """{ok, ms, truncated} of the run that gave `output` for `code`; each is told once."""
        with self._lock:
            same = [i for i, (ran, _) in enumerate(self._runs) if ran == code]
            # the same code in two choices: the output tells them apart
            exact = [i for i in same if self._runs[i][1].text == output]
            if not same:
                return {}
            _, result = self._runs.pop((exact or same)[0])
        return {"ok": result.ok, "ms": round(result.ms, 3), "truncated": result.truncated}
