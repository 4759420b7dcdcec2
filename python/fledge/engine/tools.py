"""The tools a model may call, behind one interface: code in, `ToolResult` out.

The engine (`fledge.engine.engine`) pauses a row at the end of a python part, calls `Tools.run` with
the part's text and forces `result.text` back between output_start and output_end. The default tool
is Python: a single arithmetic expression goes to the calculator (L0), everything else to the Monty
interpreter (L1), or to what the operator's code hands in as `interpreter`, such as
`sandbox.process.CPython()` (L2). A further tool is called by a python part `NAME(<JSON object>)`
and registered so:

    def weather(city: str) -> str:
        return "sunny in " + city

    tools = Tools()
    tools.register(
        Tool(
            name="weather",
            description="The weather of a city",
            parameters={
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
            function=weather,
            timeout_seconds=1.0,
            max_chars=200,
        )
    )

`tools.schemas()` is what the `tools` field of the HTTP interface and the chat format show. Text
that looks like a special token stays in a result as it is; `Tokenizer.encode` reads it as plain
text.
This module never runs model code in this process and never lets a tool's error end the engine.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fledge.sandbox import arithmetic
from fledge.sandbox.arithmetic import NotArithmetic
from fledge.sandbox.interpreter import Interpreter, InterpreterState
from fledge.sandbox.result import Python, ToolError, ToolResult, shorten

__all__ = ["Tool", "ToolError", "ToolResult", "ToolState", "Tools"]

PYTHON = "python"
MAX_RESULT_CHARS = 1000
MAX_CODE_CHARS = 64 * 1024

_CALL = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*\((\s*\{.*\}\s*)\)\s*", re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """A tool of your own: what the model is told of it, the function, and its limits.

    `function` is trusted code of the operator; it gets the JSON object as keyword arguments and
    returns text or something that JSON can write. It runs in a thread: after `timeout_seconds` the
    model is told so and the thread is abandoned, so let long calls have time-outs of their own.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]
    timeout_seconds: float = 5.0
    max_chars: int = MAX_RESULT_CHARS


@dataclass
class ToolState:
    """What the tools remember of one conversation."""

    python: InterpreterState = field(default_factory=InterpreterState)


class Tools:
    """The registry; one per engine, shared by all conversations, closed at the end."""

    def __init__(
        self,
        extra: Iterable[Tool] = (),
        *,
        interpreter: Python | None = None,
        max_chars: int = MAX_RESULT_CHARS,
    ) -> None:
        self._tools: dict[str, Tool] = {}
        self._interpreter: Python = interpreter or Interpreter()
        self.max_chars = max_chars
        for tool in extra:
            self.register(tool)

    def __enter__(self) -> Tools:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers of the interpreter."""
        self._interpreter.close()

    def register(self, tool: Tool) -> None:
        """Adds a tool; a name is taken once."""
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", tool.name):
            raise ValueError(f"{tool.name!r} is no name for a tool")
        if tool.name == PYTHON or tool.name in self._tools:
            raise ValueError(f"there is already a tool called {tool.name!r}")
        self._tools[tool.name] = tool

    def schemas(self) -> list[dict[str, Any]]:
        """All tools as OpenAI's `tools` field lists them, python first."""
        python = {
            "name": PYTHON,
            "description": "Runs Python (no files, no network); gives prints and the last value.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}},
                "required": ["code"],
            },
        }
        functions = [python] + [
            {"name": t.name, "description": t.description, "parameters": t.parameters}
            for t in self._tools.values()
        ]
        return [{"type": "function", "function": f} for f in functions]

    def new_state(self) -> ToolState:
        """The empty memory of a new conversation; it holds no process and needs no closing."""
        return ToolState()

    def run(self, code: str, state: ToolState | None = None) -> ToolResult:
        """The result of one python part; never raises for what the model wrote.

        `code` is a call `NAME(<JSON object>)` of a registered tool, or Python. With a `state`,
        Python's variables last from call to call of the conversation.
        """
        if len(code) > MAX_CODE_CHARS:
            result = ToolResult(ok=False, error=f"longer than {MAX_CODE_CHARS} characters")
            return dataclasses.replace(result, max_chars=self.max_chars)
        called = self._called_tool(code)
        if called is not None:
            return _call(*called, max_chars=self.max_chars)
        return dataclasses.replace(self._python(code, state), max_chars=self.max_chars)

    def _called_tool(self, code: str) -> tuple[Tool, str] | None:
        """The registered tool that `code` calls and the text of its JSON object."""
        match = _CALL.fullmatch(code) if self._tools else None
        tool = self._tools.get(match.group(1)) if match else None
        return (tool, match.group(2)) if tool and match else None

    def _python(self, code: str, state: ToolState | None) -> ToolResult:
        started = time.perf_counter()
        calculator_error = None
        try:
            value = arithmetic.evaluate(code)
            return ToolResult(ok=True, stdout=value, ms=(time.perf_counter() - started) * 1e3)
        except NotArithmetic as error:
            calculator_error = str(error)
        except ToolError as error:
            return ToolResult(ok=False, error=str(error), ms=(time.perf_counter() - started) * 1e3)
        result = self._interpreter.run(code, state.python if state is not None else None)
        if not result.ok and self._interpreter.why_unavailable() is not None:
            return dataclasses.replace(result, error=f"{calculator_error}; {result.error}")
        return result


def _call(tool: Tool, text: str, *, max_chars: int) -> ToolResult:
    """Parses and checks the arguments, then runs the tool's function in a thread."""
    started = time.perf_counter()
    limit = min(max_chars, tool.max_chars)

    def done(*, ok: bool, stdout: str = "", error: str | None = None) -> ToolResult:
        stdout = stdout.encode(errors="backslashreplace").decode()  # lone surrogates
        return ToolResult(
            ok=ok,
            stdout=shorten(stdout, limit),
            error=shorten(error, limit) if error else None,
            ms=(time.perf_counter() - started) * 1e3,
            truncated=len(stdout) > limit,
            max_chars=limit,
        )

    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        return done(ok=False, error=f"{tool.name}: the arguments are not JSON: {error}")
    problem = check_arguments(arguments, tool.parameters)
    if problem is not None:
        return done(ok=False, error=f"{tool.name}: {problem}")
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            value = tool.function(**arguments)
            outcome["text"] = value if isinstance(value, str) else json.dumps(value)
        except BaseException as error:  # the tool's own failure, or its exit, is an answer
            outcome["error"] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=work, name=f"tool-{tool.name}", daemon=True)
    thread.start()
    thread.join(tool.timeout_seconds)
    if thread.is_alive():
        return done(ok=False, error=f"TimeoutError: {tool.name} took over {tool.timeout_seconds} s")
    if "error" in outcome:
        return done(ok=False, error=outcome["error"])
    return done(ok=True, stdout=outcome["text"])


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def check_arguments(arguments: Any, schema: dict[str, Any]) -> str | None:
    """What is wrong with `arguments` in words, or None.

    Understands the part of JSON Schema that tool descriptions use: type, properties, required,
    enum, items. An argument that the schema does not name is an error, with the nearest name.
    """
    return _check(arguments, {"type": "object", **schema}, where="the arguments")


def _check(value: Any, schema: dict[str, Any], *, where: str) -> str | None:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    if kinds and not any(_is_a(value, kind) for kind in kinds):
        return f"{where} must be {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, item in enumerate(value):
            problem = _check(item, schema["items"], where=f"{where}[{i}]")
            if problem is not None:
                return problem
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        for name in schema.get("required", []):
            if name not in value:
                return f"{name} is missing"
        for name, item in value.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                return f"{name} is unknown" + (f"; did you mean {near[0]}?" if near else "")
            problem = _check(item, known[name], where=name)
            if problem is not None:
                return problem
    return None


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, (object,)))
