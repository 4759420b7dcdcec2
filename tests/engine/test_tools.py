"""The tool registry: which layer answers, what is fed back, and how a further tool is called."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator

import pytest

from fledge.engine.tools import Tool, Tools, check_arguments
from fledge.sandbox.interpreter import Interpreter, Limits
from fledge.sandbox.process import CPython

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    with Tools(interpreter=Interpreter(Limits(seconds=1.0), workers=2)) as made:
        made.register(Tool("weather", "The weather of a city", WEATHER, _weather, max_chars=60))
        made.register(Tool("fail", "Always fails", {"type": "object"}, _fail))
        yield made


def _weather(city: str, days: int = 1, unit: str = "C", tags: tuple[str, ...] = ()) -> str:
    return f"sunny in {city} for {days} days at 20 {unit}" + "!" * len(tags)


def _fail() -> str:
    raise KeyError("no such station")


def test_arithmetic_goes_to_the_calculator(tools: Tools) -> None:
    result = tools.run("(347+58)*3")
    assert (result.ok, result.text, result.error) == (True, "1215", None)
    assert result.ms < 50  # no worker was started for it
    assert tools.run("1/0").text == "ZeroDivisionError: division by zero"


def test_other_python_goes_to_the_interpreter(tools: Tools) -> None:
    assert tools.run("a = 5\nprint(a)\na * 2").text == "5\n10"
    assert tools.run("sorted([3, 1, 2])").text == "[1, 2, 3]"
    assert tools.run("2**5000 % 1000").text == "376"  # over the calculator's bound
    assert not tools.run("open('/etc/passwd')").ok


def test_variables_last_within_a_conversation_only(tools: Tools) -> None:
    one, two = tools.new_state(), tools.new_state()
    tools.run("x = 41", one)
    assert tools.run("x + 1", one).text == "42"
    assert "NameError" in tools.run("x + 1", two).text
    assert "NameError" in tools.run("x + 1").text


def test_special_tokens_in_a_result_stay_plain_text(tools: Tools) -> None:
    assert tools.run("'<|' + 'user_end|>'").text == "<|user_end|>"


def test_text_is_capped() -> None:
    with Tools(max_chars=20) as tools:
        assert tools.run("2**1000").text == str(2**1000)[:17] + "..."


def test_calls_of_a_registered_tool(tools: Tools) -> None:
    assert tools.run('weather({"city": "Oslo"})').text == "sunny in Oslo for 1 days at 20 C"
    assert tools.run(' weather( {"city": "A)B", "days": 2} ) ').text.startswith(
        "sunny in A)B for 2"
    )
    long = tools.run('weather({"city": "' + "x" * 100 + '"})')
    assert len(long.text) == 60 and long.truncated


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('weather({"city": 5})', "city must be string"),
        ("weather({})", "city is missing"),
        ('weather({"city": "a", "dayz": 1})', "dayz is unknown; did you mean days?"),
        ('weather({"city": "a", "days": true})', "days must be integer"),
        ('weather({"city": "a", "unit": "K"})', "unit must be one of C, F"),
        ('weather({"city": "a", "tags": ["b", 1]})', "tags[1] must be string"),
        ('weather({"city": })', "the arguments are not JSON"),
        ("fail({})", "KeyError: 'no such station'"),
    ],
)
def test_a_bad_call_is_an_answer(tools: Tools, call: str, message: str) -> None:
    result = tools.run(call)
    assert not result.ok
    assert message in result.text


def test_a_tool_that_hangs_is_abandoned() -> None:
    wait = threading.Event()
    slow = Tool("slow", "Waits", {"type": "object"}, lambda: wait.wait(30), timeout_seconds=0.05)
    with Tools([slow]) as tools:
        assert "TimeoutError" in tools.run("slow({})").text
    wait.set()


def test_names_are_unique_and_plain(tools: Tools) -> None:
    for name in ("python", "weather", "two words", ""):
        with pytest.raises(ValueError):
            tools.register(Tool(name, "", {"type": "object"}, _fail))


def test_an_unregistered_call_is_python(tools: Tools) -> None:
    assert "NameError" in tools.run('nothing({"a": 1})').text


def test_schemas_are_openai_tools(tools: Tools) -> None:
    schemas = json.loads(json.dumps(tools.schemas()))
    assert [s["function"]["name"] for s in schemas] == ["python", "weather", "fail"]
    assert schemas[1]["type"] == "function"
    assert schemas[1]["function"]["parameters"] == WEATHER


def test_a_missing_interpreter_is_said_and_the_calculator_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with Tools() as tools:
        assert tools.run("6*7").text == "42"
        result = tools.run("x = 1")
        assert not result.ok and "pydantic-monty" in result.text


def test_the_operator_may_choose_cpython_and_the_model_may_not(tools: Tools) -> None:
    for code in (
        'CPython({"seconds": 9})',
        "import fledge.sandbox.process",
        "from fledge.engine.tools import Tools\nTools(interpreter=None)",
    ):
        assert not tools.run(code).ok
    with Tools(interpreter=CPython(workers=1)) as powerful:
        assert powerful.run("(347+58)*3").text == "1215"
        result = powerful.run("import sys\nsys.implementation.name")
        assert result.text == "cpython" or "unavailable: " in result.text
        assert not powerful.run("open('/etc/passwd').read()").ok


def test_check_arguments_wants_an_object() -> None:
    assert check_arguments([1], {}) == "the arguments must be object"
    assert check_arguments({}, {}) is None


def test_a_hostile_state_of_calls_does_not_raise(tools: Tools) -> None:
    for code in (
        "",
        " ",
        "\0",
        "(" * 1000,
        "x" * 100_000,
        "\ud800",
        "weather(" + "{" * 5000 + "})",
    ):
        assert isinstance(tools.run(code).text, str)


def test_a_tool_that_leaves_or_answers_oddly_is_an_answer() -> None:
    def leave() -> str:
        raise SystemExit(3)

    schema = {"type": "object", "properties": {}}
    with Tools() as tools:
        tools.register(Tool("leave", "leaves", schema, leave))
        tools.register(Tool("odd", "a lone surrogate", schema, lambda: "\ud800"))
        left = tools.run("leave({})")
        assert not left.ok and left.error == "SystemExit: 3"
        tools.run("odd({})").stdout.encode()
        long = tools.run('odd({"' + "b" * 5000 + '": 1})')
        assert not long.ok and len(long.error or "") <= tools.max_chars + 30
