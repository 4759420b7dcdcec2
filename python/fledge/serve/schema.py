"""What a client may send, as pydantic models, and the way from bytes to them.

`parse` turns a body into a model or raises an `ApiError` that names the first wrong field, in
OpenAI's shape. Numbers must be finite and in range, lists are bounded by `settings.Limits`, a
Boolean is no number. Fields that nobody knows are ignored, because front ends send their own
(open-webui does); `unknown_fields` lists them for a header. A field that OpenAI knows and this
server does not serve is refused only where ignoring it would change the meaning of the reply.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
)

from fledge.serve.api_errors import ApiError, bad_value, unsupported
from fledge.serve.settings import Limits

INT64 = (1 << 63) - 1


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not a Boolean")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False, strict=True)]
Count = Annotated[StrictInt, Field(ge=0, le=1 << 31)]
Seed = Annotated[StrictInt, Field(ge=-INT64 - 1, le=INT64)]
# a million wrong ids must not become a million errors
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, le=1 << 31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Loose(BaseModel):
    """A model that ignores fields it does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True, str_max_length=4 << 20)


class StreamOptions(Loose):
    """What a stream shows beside its text."""

    include_usage: bool = False


class Sampling(Loose):
    """What both kinds of completion share."""

    model: str | None = Field(None, max_length=512)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: str | Texts | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    max_tokens: Count | None = None
    user: str | None = Field(None, max_length=512)
    # extensions: vLLM's, and of llama.cpp's dry_* the multiplier alone (the other dry_* are not
    # read); open-webui and others send top_k 0 or -1 for "off"
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    dry_multiplier: Annotated[Number, Field(ge=0, le=100)] | None = None
    ignore_eos: bool = False

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class Part(Loose):
    """A part of a message's content. python and output are the assistant's, an extension."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Loose):
    """The function of a tool call in the history."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    arguments: str = ""


class ToolCall(Loose):
    """A tool call of the assistant in the history."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Loose):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Loose):
    """A function that a client offers."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")
    description: str | None = Field(None, max_length=8192)
    parameters: dict[str, Any] | None = None


class ToolDeclaration(Loose):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(Loose):
    """The function that a tool_choice names."""

    name: str


class NamedChoice(Loose):
    """A tool_choice that names a function."""

    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(Loose):
    """The form that a reply must have; only text is served."""

    type: Literal["text", "json_object", "json_schema"]


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[ToolDeclaration] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = Field(None, max_length=512)
    python_tool: bool | None = None
    """Extension: false keeps the server from running the model's python parts."""
    continue_final_message: bool | None = None
    """Extension, named as vLLM has it: the last message is the assistant's, and goes on."""
    truncation: Literal["auto", "disabled"] | None = None
    """Extension, named as in OpenAI's Responses: auto leaves out the oldest exchanges that do not
    fit the context beside an answer; usage.dropped_messages tells how many messages that were."""


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = ""
    echo: bool | None = None
    logprobs: Annotated[Count, Field(le=5)] | None = None
    suffix: str | None = None
    best_of: StrictInt | None = None


class TokenizeRequest(Loose):
    """The body of POST /tokenize: as vLLM has it, and lm-eval asks for it."""

    model: str | None = Field(None, max_length=512)
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Loose):
    """The body of POST /detokenize."""

    model: str | None = Field(None, max_length=512)
    tokens: TokenIds


M = TypeVar("M", bound=BaseModel)


def parse(body: bytes, kind: type[M], limits: Limits) -> tuple[M, list[str]]:
    """(the model, the names of its unknown fields) of a request's body, or ApiError."""
    table = read_json(body, limits)
    if not isinstance(table, dict):
        raise bad_value(None, f"The body must be a JSON object, not {_json_kind(table)}.")
    try:
        model = kind.model_validate(table)
    except ValidationError as error:
        raise _first_error(error) from None
    except RecursionError:
        raise bad_value(None, "The body is nested too deeply.") from None
    if isinstance(model, Sampling):
        _check_bounds(model, limits)
    return model, sorted(str(name) for name in table if name not in kind.model_fields)


def read_json(body: bytes, limits: Limits) -> Any:
    """The JSON value of a body; NaN, Infinity, deep nesting and broken UTF-8 are refused."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_value(
            None, f"The body is not UTF-8 (byte {error.start}).", code="invalid_json"
        ) from None
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise bad_value(None, f"The body is not valid JSON{where}.", code="invalid_json") from None
    if not _depth_within(value, limits.json_depth):
        raise bad_value(None, f"The body is nested deeper than {limits.json_depth} levels.")
    return _without_surrogates(value) if b"\\u" in body else value


def _without_surrogates(value: Any) -> Any:
    """`value` with U+FFFD for lone surrogates, which JSON can spell and UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(v) for key, v in value.items()}
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _depth_within(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return True
    return False


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a Boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _first_error(error: ValidationError) -> ApiError:
    """The first problem that pydantic found, as OpenAI would name its place."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ""
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif str(step).isidentifier() and str(step) not in ("str", "int", "float", "bool"):
            # names of the alternatives of a union are capitalised or hold brackets
            path += "" if str(step)[0].isupper() else f".{step}" if path else str(step)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    if first["type"] not in ("missing",) and not first["type"].endswith("_type"):
        code = "invalid_value"
    name = path or "the body"
    return ApiError(400, f"{first['msg']} ({name})", param=path or None, code=code)


def _check_bounds(request: Sampling, limits: Limits) -> None:
    stops = request.stops()
    if len(stops) > limits.stops:
        raise bad_value("stop", f"At most {limits.stops} stop strings are allowed.")
    if any(not stop or len(stop) > limits.stop_chars for stop in stops):
        raise bad_value("stop", f"A stop string has 1 to {limits.stop_chars} characters.")
    if request.n is not None and request.n > limits.n:
        raise bad_value("n", f"n is at most {limits.n} here.")
    if request.logit_bias is not None and len(request.logit_bias) > limits.logit_bias:
        raise bad_value("logit_bias", f"At most {limits.logit_bias} biases are allowed.")
    if request.stream_options is not None and not request.stream:
        raise bad_value("stream_options", "stream_options needs stream: true.")
    if isinstance(request, ChatRequest):
        _check_chat(request, limits)
    elif isinstance(request, CompletionRequest):
        _check_completion(request, limits)


def _check_chat(request: ChatRequest, limits: Limits) -> None:
    if len(request.messages) > limits.messages:
        raise bad_value("messages", f"At most {limits.messages} messages are allowed.")
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise bad_value("top_logprobs", "top_logprobs needs logprobs: true.")
        if request.top_logprobs > limits.top_logprobs:
            raise bad_value("top_logprobs", f"top_logprobs is at most {limits.top_logprobs}.")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported(
            "response_format", "Only plain text replies are served; ask for JSON in the prompt."
        )
    tools = request.tools or []
    names = [tool.function.name for tool in tools]
    if len(names) > limits.tools:
        raise bad_value("tools", f"At most {limits.tools} tools are allowed.")
    if len(set(names)) < len(names):
        raise bad_value("tools", "Two tools have the same name.")
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise bad_value(
            "continue_final_message", "The last message is not the assistant's: nothing to go on."
        )
    choice = request.tool_choice
    if choice not in (None, "none") and not tools:
        raise bad_value("tool_choice", "tool_choice needs tools.")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise bad_value("tool_choice", "tool_choice names a function that is not among the tools.")
    for i, message in enumerate(request.messages):
        _check_message(message, f"messages[{i}]")


def _check_message(message: Message, where: str) -> None:
    if message.role == "function":
        raise unsupported(f"{where}.role", "The role function is obsolete; use tool.")
    if message.tool_calls is not None and message.role != "assistant":
        raise bad_value(f"{where}.tool_calls", "Only the assistant calls tools.")
    if message.content is None and not (message.role == "assistant"):
        raise bad_value(f"{where}.content", f"A message of {message.role} needs content.")
    if not isinstance(message.content, list):
        return
    known = ["text", "python", "output", "refusal"] if message.role == "assistant" else ["text"]
    for j, part in enumerate(message.content):
        if part.type not in known:
            raise bad_value(
                f"{where}.content[{j}].type",
                f"A part is {' or '.join(known)} here; images and sound are not understood.",
            )
        if part.text is None and part.refusal is None:
            raise bad_value(f"{where}.content[{j}].text", "A part needs a string text.")


def _check_completion(request: CompletionRequest, limits: Limits) -> None:
    if request.suffix:
        raise unsupported("suffix", "suffix is not served: the models read from left to right.")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "best_of is not served; ask for n and choose.")
    if isinstance(request.prompt, list) and request.prompt:
        if not isinstance(request.prompt[0], int) and len(request.prompt) > limits.prompts:
            raise bad_value("prompt", f"At most {limits.prompts} prompts are allowed.")
        if any(prompt == [] for prompt in request.prompt):
            raise bad_value("prompt", "A prompt of token ids is empty.")
    elif request.prompt == []:
        raise bad_value("prompt", "The list of prompts is empty.")
    prompts = 1 if isinstance(request.prompt, str) or isinstance(request.prompt[0], int) else 0
    if (prompts or len(request.prompt)) * (request.n or 1) > limits.prompts * 2:
        raise bad_value("n", f"prompts times n is at most {limits.prompts * 2} here.")
    if request.echo and request.stream and request.logprobs is not None:
        raise unsupported("echo", "echo with logprobs is not served as a stream.")
