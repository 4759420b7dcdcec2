"""The command line: one verb, one function; errors in three parts; exit codes 0, 1, 2 and 75.

`main` looks a verb up in VERBS and calls its function with the remaining words. Nothing heavy is
imported before a verb needs it, so that `fledge --help` is instant. This module decides nothing
about training; it reads words, calls one function and prints what comes back.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import fledge
from fledge import files
from fledge.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    FledgeError,
    Interrupted,
    UserError,
)


@dataclass(frozen=True)
class Verb:
    """One word after `fledge`: its function, how it is called, what it does."""

    function: Callable[[list[str]], int]
    usage: str
    summary: str


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, with the nearest flag, instead of leaving the program."""

    def __init__(self, verb: str, summary: str) -> None:
        super().__init__(
            prog=f"fledge {verb}",
            description=summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown.group(1), flags, n=1) if unknown else []
        raise UserError(
            f"{self.prog}: {message}",
            "these words do not make a command",
            f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if words[:1] == ["--debug"]:
        del words[0]
    # GNU OpenMP reads this when torch is loaded. Its threads wait for each other by spinning, by
    # default for milliseconds, and then take from each other the cores that another program left
    # them: with two such programs one step took 0.73 s and at times 5.6; with this 0.68, always.
    # Alone on the machine there is no difference (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(f"error: {error}", debug=debug)
        return error.exit_code
    except Interrupted as error:
        _complain(f"{error}; run the same command again to go on", debug=False)
        return error.exit_code
    except FledgeError as error:
        _complain(f"error: {error}", debug=debug)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("stopped; run the same command again to go on from the last save", debug=False)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has enough; keep Python from complaining once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_USER_ERROR
    except Exception as error:
        told = files.disk_full(error)
        if told is not None:
            _complain(f"error: {told}", debug=debug)
            return told.exit_code
        _complain(
            f"error: fledge itself failed with {type(error).__name__}: {error}\n"
            "  why: this is a bug, not a mistake of yours\n"
            "  fix: run it again with --debug and send us what it prints",
            debug=debug,
        )
        return EXIT_BUG


def _complain(text: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_DONE
    if words[0] in ("--version", "version"):
        print(f"fledge {fledge.__version__}")
        return EXIT_DONE
    verb = VERBS.get(words[0])
    if verb is None:
        near = difflib.get_close_matches(words[0], VERBS, n=1)
        raise UserError(
            f"there is no command {words[0]!r}",
            f"the commands are {', '.join(VERBS)}",
            f"did you mean `fledge {near[0]}`?" if near else "see `fledge --help`",
        )
    return verb.function(words[1:])


def help_text() -> str:
    """What `fledge --help` prints."""
    lines = [
        "fledge: raise a language model from raw text to a chat assistant, and own all of it",
        "",
    ]
    for name, verb in VERBS.items():
        lines += [f"  fledge {name} {verb.usage}", f"      {verb.summary}"]
    lines += [
        "",
        "start here: `fledge run quickstart`, then `fledge chat runs/quickstart`",
        "`fledge VERB --help` explains a verb; --debug shows tracebacks; exit codes: 0 done,",
        "1 your error, 2 our bug, 75 interrupted (the same command goes on).",
    ]
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """The one JSON object of --json."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


# -- run and plan: section overrides -------------------------------------------------------------


def verb_run(words: list[str]) -> int:
    """`fledge run`: carry a recipe through its stages."""
    from fledge import cli_run

    parser = _recipe_parser("run")
    cli_run.add_flags(parser)
    args, name, recipe = _recipe_of(parser, words)
    if args.nproc > 1:
        return cli_run.launch(args.nproc, words)
    return cli_run.run(args, name, recipe, words)


def verb_plan(words: list[str]) -> int:
    """`fledge plan`: what a recipe would do here, or elsewhere, and what it would cost."""
    from fledge.config import DataSection, ModelSection, Recipe
    from fledge.plan import hardware, planner, show

    parser = _recipe_parser("plan")
    parser.add_argument("--depth", type=int, help="plan a depth on real text instead of a recipe")
    parser.add_argument("--hardware", help='what it runs on, for example "8xh100" (default: here)')
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    start: tuple[str, Recipe] | None = None
    if "--depth" in words or any(word.startswith("--depth=") for word in words):
        # argparse will read it again; here it only decides what the overrides apply to
        start = ("", Recipe(data=DataSection(world=planner.NO_WORLD)))
    args, name, recipe = _recipe_of(parser, words, start=start)
    if args.depth is not None:
        import dataclasses

        recipe = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model or ModelSection(), depth=args.depth)
        )
        name = f"depth {args.depth}"
    where = hardware.parse(args.hardware) if args.hardware else hardware.detect()
    plan = planner.resolve(recipe, where)
    if args.json:
        print_json({"name": name, **plan.to_dict()})
    else:
        print(show.plan_text(name, plan), end="")
    return EXIT_DONE


def _recipe_parser(verb: str) -> Parser:
    parser = Parser(verb, VERBS[verb].summary)
    parser.add_argument("recipe", nargs="?", help="a built-in recipe or a .toml file")
    parser.epilog = (
        "every key of the recipe can be given as --section.key VALUE (None = the planner decides)"
    )
    return parser


def _recipe_of(
    parser: Parser, words: list[str], *, start: tuple[str, Any] | None = None
) -> tuple[argparse.Namespace, str, Any]:
    """(own flags, recipe name, recipe with the overrides of the command line)."""
    from fledge import config
    from fledge.cli_overrides import override, print_settings, split_overrides

    own, overrides = split_overrides(words)
    if any(word in ("-h", "--help") for word in own):
        names = ", ".join(config.builtin_recipes())
        parser.epilog = f"built-in recipes: {names}\n{parser.epilog}"
        parser.print_help()
        if parser.prog == "fledge run":
            print()
            print_settings()
        raise SystemExit(EXIT_DONE)
    args = parser.parse_args(own)
    if start is None and args.recipe is None:
        raise UserError(
            "which recipe?",
            "a recipe says what to build",
            f"the built-in ones are {', '.join(config.builtin_recipes())}: `{parser.prog} tiny`",
        )
    name, recipe = start or config.load_recipe(args.recipe)
    return args, name, override(recipe, overrides)


# -- the other verbs -----------------------------------------------------------------------------


def verb_doctor(words: list[str]) -> int:
    """`fledge doctor`: what this machine has and what is missing."""
    parser = Parser("doctor", VERBS["doctor"].summary)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    from fledge import doctor

    findings = doctor.examine()
    if args.json:
        print_json(findings)
    else:
        print(doctor.findings_text(findings), end="")
    return EXIT_DONE


def verb_eval(words: list[str]) -> int:
    """`fledge eval`: give a model its exams."""
    from fledge.cli_eval import evaluate

    return evaluate(words)


def verb_chat(words: list[str]) -> int:
    """`fledge chat`: talk to a model."""
    from fledge import chat

    parser = Parser("chat", VERBS["chat"].summary)
    parser.add_argument("model", type=Path, help="a run directory or a checkpoint folder")
    parser.add_argument("-p", "--prompt", help="ask once and leave; - reads standard input")
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 = nothing is left to chance"
    )
    parser.add_argument(
        "--dry-multiplier", type=float, default=chat.CHAT_DRY_MULTIPLIER,
        help="how firmly going round in circles is held back; 0 = not at all (default 0.8)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--max-tokens", type=positive, default=256, help="longest answer")
    parser.add_argument(
        "--sample-conversation", action="store_true", help="ask five fitting questions and leave"
    )
    args = parser.parse_args(words)
    require_folder(args.model)
    settings = chat.Settings(
        temperature=args.temperature,
        dry_multiplier=args.dry_multiplier,
        seed=args.seed,
        max_tokens=args.max_tokens,
        system=args.system,
    )
    if args.sample_conversation:
        return chat.sample_conversation(args.model, settings)
    if args.prompt is not None:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        return chat.one_shot(args.model, prompt, settings)
    from fledge.chat_terminal import talk

    return talk(args.model, settings)


def verb_bench(words: list[str]) -> int:
    """`fledge bench`: measure this machine."""
    from fledge import bench

    parser = Parser("bench", VERBS["bench"].summary)
    parser.add_argument("what", choices=sorted(bench.BENCHES), help="what to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    measured = bench.measure(args.what)
    if args.json:
        print_json(measured)
    else:
        print(bench.results_text(args.what, measured), end="")
    return EXIT_DONE


def verb_report(words: list[str]) -> int:
    """`fledge report`: render the report again, or two runs side by side."""
    parser = Parser("report", VERBS["report"].summary)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("other", type=Path, nargs="?", help="another one to compare with")
    parser.add_argument(
        "--row", action="store_true", help="print the run as a row of docs/leaderboard.md"
    )
    args = parser.parse_args(words)
    from fledge import report, report_row
    from fledge.run import Run

    run = Run.read(args.run)
    if args.row:
        others = [run] if args.other is None else [run, Run.read(args.other)]
        rows = [report_row.row(one, report.gather(one)) for one in others]
        print(report_row.header() + "".join(rows), end="")
        return EXIT_DONE
    if args.other is not None:
        print(report.compare(run, Run.read(args.other)), end="")
        return EXIT_DONE
    report.render(run)
    print(run.report_file("md").read_text(encoding="utf-8"), end="")
    return EXIT_DONE


def run_sub_verb(
    verb: str, words: list[str], choices: dict[str, Callable[[list[str]], int]]
) -> int:
    """Calls the sub-verb that `words` begins with; UserError with the nearest name otherwise."""
    if words and words[0] in choices:
        return choices[words[0]](words[1:])
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: fledge {verb} {VERBS[verb].usage}\n\n{VERBS[verb].summary}")
        print(f"`fledge {verb} {next(iter(choices))} --help` explains one")
        return EXIT_DONE
    near = difflib.get_close_matches(words[0], choices, n=1)
    raise UserError(
        f"there is no `fledge {verb} {words[0]}`",
        f"it knows {', '.join(choices)}",
        f"did you mean {near[0]}?" if near else f"see `fledge {verb} --help`",
    )


def verb_data(words: list[str]) -> int:
    """`fledge data`: make, check, list and describe data."""
    from fledge.cli_data import data

    return data(words)


def verb_tok(words: list[str]) -> int:
    """`fledge tok`: train, measure and use a tokenizer."""
    from fledge.cli_tok import tok

    return tok(words)


def verb_sweep(words: list[str]) -> int:
    """`fledge sweep`: a grid of runs and their scaling law."""
    from fledge.cli_sweep import sweep

    return sweep(words)


def verb_serve(words: list[str]) -> int:
    """`fledge serve`: the OpenAI-compatible server."""
    from fledge.cli_serve import serve

    return serve(words)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be 1 or more")
    return number


def require_folder(path: Path) -> None:
    """UserError unless `path` can hold a model."""
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}",
            "a model is a run directory or a checkpoint folder",
            "train one with `fledge run quickstart`, or mind the spelling",
        )


VERBS: dict[str, Verb] = {
    "run": Verb(
        verb_run,
        "RECIPE [--rehearse] [--nproc N] [--out DIR] [--until STAGE] [--restart STAGE]\n"
        "      [--section.key VALUE ...]",
        "train through every stage: finishes what is unfinished, skips what is done",
    ),
    "plan": Verb(
        verb_plan,
        "RECIPE|--depth N [--hardware 8xh100] [--json]",
        "every derived number with its rule, and time, memory and dollars",
    ),
    "doctor": Verb(
        verb_doctor, "[--json]", "what this machine has, what will be used, what is missing"
    ),
    "data": Verb(
        verb_data,
        "list | download SOURCE | make WORLD --out DIR [--csv FACTS.csv] [--seed N] | check FILE\n"
        "      | show RUN | overlap RUN|TEXT... | stats PATH",
        "worlds and your own text",
    ),
    "tok": Verb(verb_tok, "train|eval|encode|decode|bench ...", "the tokenizer by itself"),
    "eval": Verb(
        verb_eval,
        "MODEL [--tasks core,mmlu,...] [--max-examples N] [--compare OTHER] [--json]",
        "exams of a run's last stage or of a checkpoint folder, with intervals",
    ),
    "chat": Verb(verb_chat, "MODEL [-p PROMPT]", "talk to a model"),
    "serve": Verb(
        verb_serve,
        "MODEL [--host 127.0.0.1] [--port 8000] [--api-keys FILE]",
        "the OpenAI-compatible server and the web page",
    ),
    "report": Verb(verb_report, "RUN [RUN2]", "render the report again; two runs side by side"),
    "sweep": Verb(
        verb_sweep,
        "RECIPE --grid SECTION.KEY=A,B,... [--grid ...] [--seeds N] [--out DIR]",
        "a grid of runs up to the end of base, and the scaling law they tell",
    ),
    "bench": Verb(
        verb_bench, "infer|sandbox|tok [--json]", "measure this machine, each figure with a peer"
    ),
}
