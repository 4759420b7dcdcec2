"""The verb `data`: small tools around worlds and text.

Called by `fledge.cli` only. Each sub-verb reads its words, calls one function and prints.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fledge.cli import Parser, positive, run_sub_verb
from fledge.errors import EXIT_DONE, EXIT_USER_ERROR, UserError


def data(words: list[str]) -> int:
    """`fledge data ...`."""
    choices = {
        "list": _list,
        "download": _download,
        "make": _make,
        "check": _check,
        "show": _show,
        "overlap": _overlap,
        "stats": _stats,
    }
    return run_sub_verb("data", words, choices)


def _list(words: list[str]) -> int:
    parser = Parser("data list", "the built-in worlds, and the data found on this machine")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    root = os.environ.get("FLEDGE_DATA")
    held = {name: bool(root) and (Path(root or "") / name).is_dir() for name in _TASK_FOLDERS}
    found = {"worlds": _WORLDS, "root": root, "tasks": held}
    if args.json:
        print(json.dumps(found, indent=2))
        return EXIT_DONE
    print("worlds (data.world):")
    for name, what in _WORLDS.items():
        print(f"  {name:<10} {what}")
    print("your own facts: `fledge data make world --csv FACTS.csv --out DIR`")
    print("your own text: --data.source PATH (.txt .md .jsonl .parquet, also .gz .zst)")
    print("corpora of the hub: --data.source fineweb-edu, climbmix, or hub:OWNER/NAME")
    print(f"task files (data.root or FLEDGE_DATA): {root or 'FLEDGE_DATA is not set'}")
    for name, is_there in held.items():
        print(f"  {name:<10} {'found' if is_there else 'not found'}")
    return EXIT_DONE


_TASK_FOLDERS = ("gsm8k", "mmlu", "arc", "humaneval", "sft")
_WORLDS = {
    "almanac": "real facts: countries, elements, planets, animals, calendar, units, inventions",
    "village": "invented people and places, new for every seed; for measuring",
}


def _download(words: list[str]) -> int:
    parser = Parser("data download", "fetch the first shards of a corpus of the Hugging Face hub")
    parser.add_argument("source", help="fineweb-edu, climbmix, or hub:OWNER/NAME[/FOLDER][@REV]")
    parser.add_argument("--shards", type=positive, default=4, help="training shards (default 4)")
    args = parser.parse_args(words)
    from fledge.data.sources import download

    for path in download(args.source, args.shards):
        print(path, flush=True)
    print(f"to train on it: fledge run laptop --data.source {args.source}", file=sys.stderr)
    return EXIT_DONE


def _make(words: list[str]) -> int:
    parser = Parser("data make", "write a world's text, conversations and exams as files")
    parser.add_argument("world", help="almanac, village, or world with --csv")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--csv", type=Path, help="a table of your own facts")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--documents", type=positive, default=2000, help="pages of prose")
    parser.add_argument("--conversations", type=positive, default=2000, help="of each stage")
    args = parser.parse_args(words)
    if args.csv is None and args.world == "world":
        raise UserError("which facts?", "`data make world` needs a table", "add --csv FACTS.csv")
    from fledge.data.worlds.make import make_world

    made = make_world(
        str(args.csv or args.world),
        args.seed,
        args.out,
        n_documents=args.documents,
        n_conversations=args.conversations,
    )
    print(json.dumps(made, indent=2, ensure_ascii=False, default=str))
    return EXIT_DONE


def _check(words: list[str]) -> int:
    parser = Parser("data check", "is every line of a JSONL file a conversation to train on?")
    parser.add_argument("file", type=Path)
    args = parser.parse_args(words)
    _require_file(args.file)
    from fledge.data.conversations import check_file

    problems = check_file(args.file)
    for problem in problems:
        print(problem)
    print(f"{args.file}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return EXIT_USER_ERROR if problems else EXIT_DONE


def _show(words: list[str]) -> int:
    parser = Parser(
        "data show",
        "rows as a stage of a run is trained on them: what is learnt is green (or in [+ +])",
    )
    parser.add_argument("run", type=Path, help="a run that has its tokenizer")
    parser.add_argument("--stage", choices=("mid", "sft"), default="sft")
    parser.add_argument("--rows", type=positive, default=10)
    parser.add_argument("--colour", choices=("auto", "ansi", "marks", "html"), default="auto")
    args = parser.parse_args(words)
    from fledge.run import Run
    from fledge.stages import mixture
    from fledge.tokenizer import Tokenizer

    run = Run.read(args.run)
    tokenizer, context = Tokenizer.load(run.tokenizer_dir), run.model.max_position_embeddings
    colour = args.colour
    if colour == "auto":
        colour = "ansi" if sys.stdout.isatty() else "marks"
    rows = mixture.rows_of(run.recipe, tokenizer, args.stage, context=context, count=args.rows)
    for number, (ids, mask) in enumerate(rows, start=1):
        head = f"row {number}: {len(ids)} of {context + 1} tokens, {sum(mask)} of them learnt"
        text = mixture.as_text(tokenizer, ids, mask, colour=colour)
        print(f"<p>{head}</p>\n<pre>{text}</pre>" if colour == "html" else f"{head}\n{text}\n")
    return EXIT_DONE


def _stats(words: list[str]) -> int:
    parser = Parser("data stats", "documents, bytes and kinds of a folder or file of text")
    parser.add_argument("path", type=Path)
    args = parser.parse_args(words)
    from fledge.data.sources import describe

    print(json.dumps(describe(args.path), indent=2, ensure_ascii=False, default=str))
    return EXIT_DONE


def _overlap(words: list[str]) -> int:
    parser = Parser(
        "data overlap",
        "which exam questions stand word for word in training text; of a run: in the text it was\n"
        "trained on, and the result goes into its report",
    )
    parser.add_argument("text", type=Path, nargs="+", help="a run, or files or folders of text")
    parser.add_argument("--tasks", help="names with commas between (default: all, CORE too)")
    parser.add_argument("--words", type=positive, default=13, help="length of a run that counts")
    parser.add_argument("--data-root", help="folder with task files (default: FLEDGE_DATA)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    from fledge.stages import overlap

    table = overlap.measure(
        args.text,
        tuple(args.tasks.split(",")) if args.tasks else None,
        data_root=args.data_root,
        words=args.words,
    )
    print(json.dumps(table, indent=2, ensure_ascii=False) if args.json else overlap.text(table))
    return EXIT_DONE


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"there is no file {path}", "nothing to check", "mind the spelling")
