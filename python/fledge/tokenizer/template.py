"""chat_template.jinja rendered by plain Jinja, as transformers and vLLM render it.

Jinja itself does not know the tag `{% generation %}`, by which transformers finds the tokens to
train on; `GenerationTag` teaches it that tag. The tests hold the result equal to that of
`chat.render_text`, by which fledge itself renders. Nothing on the core path imports this.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - how Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    add_generation_prompt: bool = False,
) -> str:
    """What the template `source` makes of `messages`. Raises jinja2.TemplateError."""
    return compile_template(source).render(
        messages=messages, bos_token=bos_token, add_generation_prompt=add_generation_prompt
    )


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> Template:
    """The template in Jinja's immutable sandbox, with the filters that chat templates expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
