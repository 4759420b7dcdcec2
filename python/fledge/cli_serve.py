"""`fledge serve`: words of the command line into settings; `fledge.serve` does the rest."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from fledge.cli import VERBS, Parser, positive
from fledge.errors import UserError


def parser() -> Parser:
    """The flags of `fledge serve`."""
    made = Parser("serve", VERBS["serve"].summary)
    made.add_argument(
        "model", nargs="+", help="run directory or checkpoint folder; NAME=PATH names it"
    )
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: loopback)"
    )
    made.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")
    made.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="one `KEY` or `NAME KEY` a line"
    )
    made.add_argument(
        "--insecure-no-keys", action="store_true", help="open to other machines without keys"
    )
    made.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a further name in Host headers; * allows all",
    )  # fmt: skip
    made.add_argument("--no-python", action="store_true", help="never run the model's python parts")
    made.add_argument("--openapi", action="store_true", help="show /openapi.json")
    made.add_argument("--quiet", action="store_true", help="no line per request")
    made.add_argument("--replicas", type=positive, default=1, help="engines per model, one per GPU")
    made.add_argument(
        "--max-waiting", type=positive, default=256, help="rows that may queue (default: 256)"
    )
    made.add_argument(
        "--request-seconds", type=positive, default=600, help="longest request (default: 600)"
    )
    made.add_argument(
        "--grace-seconds", type=positive, default=30, help="to finish after SIGTERM (default: 30)"
    )
    return made


def serve(words: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    args = parser().parse_args(words)
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("pydantic") is None:
        raise UserError(
            "the server needs two more libraries",
            "uvicorn and pydantic are not installed",
            'install them with `pip install "fledge[serve]"`',
        )
    if not 0 <= args.port <= 65535:
        raise UserError(f"there is no port {args.port}", "ports go from 0 to 65535", "choose one")
    from fledge.serve.keys import load_keys
    from fledge.serve.server import serve as run
    from fledge.serve.settings import Limits, Settings

    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.WARNING if args.quiet else logging.INFO,
        format="%(asctime)s %(message)s",
    )
    limits = Limits(
        waiting_rows=args.max_waiting,
        request_seconds=args.request_seconds,
        grace_seconds=args.grace_seconds,
    )
    settings = Settings(
        limits=limits,
        host=args.host,
        allowed_hosts=tuple(name.lower() for name in args.allowed_host),
        openapi=args.openapi,
        python_tool=not args.no_python,
    )
    return run(
        args.model,
        settings,
        load_keys(args.api_keys),
        port=args.port,
        insecure=args.insecure_no_keys,
        replicas=args.replicas,
    )
