"""The child process of `serve.templates`: renders one foreign chat template, again and again.

    python -m fledge.serve.template_child MEMORY_BYTES MAX_CHARS

Standard input: the template as a JSON string on the first line, then one JSON object of variables a
line. Standard output: `{"ready": true}`, then `{"text": ...}` or `{"error": ...}` a line. It limits
its own memory; time is the parent's business, which kills it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jinja2 import Template

from fledge.tokenizer.template import compile_template


def limit_memory(size: int) -> None:
    """No more than `size` bytes of address space; nothing where the system has no such limit."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def render(template: Template, variables: dict[str, Any], max_chars: int) -> str:
    """The text; ValueError as soon as it is longer than `max_chars`."""
    pieces, size = [], 0
    for piece in template.generate(**variables, add_generation_prompt=True):
        size += len(piece)
        if size > max_chars:
            raise ValueError(f"more than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    """Serves the parent until its end of the pipe closes."""
    limit_memory(int(sys.argv[1]))
    max_chars = int(sys.argv[2])
    source = json.loads(sys.stdin.readline())
    print('{"ready": true}', flush=True)
    for line in sys.stdin:
        try:
            # compiled here, because Jinja computes constants then, and 9**(9**9) is one
            answer = {"text": render(compile_template(source), json.loads(line), max_chars)}
        except Exception as error:  # whatever a template does is its own fault, and told as such
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
