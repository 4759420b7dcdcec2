"""The verbs `data` and `tok`: small tools around worlds, text and tokenizers.

Called by `fledge.cli` only. Each sub-verb reads its words, calls one function and prints.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fledge.cli import VERBS, Parser, positive
from fledge.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

SubVerb = Callable[[list[str]], int]


def data(words: list[str]) -> int:
    """`fledge data ...`."""
    return _choose("data", words, {"list": _list, "make": _make, "check": _check, "stats": _stats})


def tok(words: list[str]) -> int:
    """`fledge tok ...`."""
    return _choose(
        "tok", words, {"train": _train, "eval": _eval, "encode": _encode, "decode": _decode}
    )


def _choose(verb: str, words: list[str], choices: dict[str, SubVerb]) -> int:
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


# -- data ----------------------------------------------------------------------------------------


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
    print(f"task files (data.root or FLEDGE_DATA): {root or 'FLEDGE_DATA is not set'}")
    for name, is_there in held.items():
        print(f"  {name:<10} {'found' if is_there else 'not found'}")
    return EXIT_DONE


_TASK_FOLDERS = ("gsm8k", "mmlu", "arc", "humaneval", "sft")
_WORLDS = {
    "almanac": "real facts: countries, elements, planets, animals, calendar, units, inventions",
    "village": "invented people and places, new for every seed; for measuring",
}


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


def _stats(words: list[str]) -> int:
    parser = Parser("data stats", "documents, bytes and kinds of a folder or file of text")
    parser.add_argument("path", type=Path)
    args = parser.parse_args(words)
    from fledge.data.sources import describe

    print(json.dumps(describe(args.path), indent=2, ensure_ascii=False, default=str))
    return EXIT_DONE


# -- tok -----------------------------------------------------------------------------------------


def _train(words: list[str]) -> int:
    parser = Parser("tok train", "learn a tokenizer from text")
    parser.add_argument("text", type=Path, nargs="+", help="files or folders of text")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=32768, help="a multiple of 128")
    parser.add_argument("--pattern", choices=("qwen2", "llama3", "gpt4-2"), default="qwen2")
    args = parser.parse_args(words)
    from fledge.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(_texts(args.text), vocab_size=args.vocab_size, pattern=args.pattern)
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size:,} tokens written to {args.out}")
    return EXIT_DONE


def _eval(words: list[str]) -> int:
    parser = Parser("tok eval", "how well a tokenizer compresses text")
    parser.add_argument("tokenizer", type=Path, help="a run, a checkpoint or a tokenizer folder")
    parser.add_argument("text", type=Path, nargs="+", help="files or folders of text")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    tokenizer = _load(args.tokenizer)
    documents = size = tokens = wrong = 0
    for text in _texts(args.text):
        ids = tokenizer.encode(text)
        documents, size, tokens = documents + 1, size + len(text.encode()), tokens + len(ids)
        wrong += tokenizer.decode(ids) != text
    result = {
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": round(size / max(1, tokens), 4),
        "documents_changed_by_a_round_trip": wrong,
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(f"{key.replace('_', ' ')}: {value:,}" for key, value in result.items()))
    return EXIT_DONE


def _encode(words: list[str]) -> int:
    parser = Parser("tok encode", "text to token ids")
    parser.add_argument("tokenizer", type=Path, help="a run, a checkpoint or a tokenizer folder")
    parser.add_argument("text", nargs="?", help="default: standard input")
    args = parser.parse_args(words)
    text = sys.stdin.read() if args.text is None else args.text
    print(" ".join(map(str, _load(args.tokenizer).encode(text))))
    return EXIT_DONE


def _decode(words: list[str]) -> int:
    parser = Parser("tok decode", "token ids to text")
    parser.add_argument("tokenizer", type=Path, help="a run, a checkpoint or a tokenizer folder")
    parser.add_argument("ids", nargs="*", help="default: standard input")
    args = parser.parse_args(words)
    tokenizer = _load(args.tokenizer)
    given = args.ids or sys.stdin.read().split()
    try:
        ids = [int(word) for word in given]
    except ValueError as error:
        raise UserError("that is not a list of token ids", str(error), "give numbers") from None
    bad = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if bad:
        raise UserError(
            f"there is no token {bad[0]}",
            f"this tokenizer has {tokenizer.vocab_size} tokens",
            f"give numbers from 0 to {tokenizer.vocab_size - 1}",
        )
    print(tokenizer.decode(ids))
    return EXIT_DONE


def _load(path: Path) -> Any:
    from fledge.run import Run
    from fledge.tokenizer import Tokenizer

    folder = Run.read(path).tokenizer_dir if Run.is_run(path) else path
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{path} holds no tokenizer",
            "there is no tokenizer.json in it",
            "give a run directory, a checkpoint or a folder that `fledge tok train` wrote",
        )
    return Tokenizer.load(folder)


def _texts(paths: list[Path]) -> Iterator[str]:
    from fledge.data import sources

    readers = {
        "jsonl": sources.jsonl_texts,
        "parquet": sources.parquet_texts,
        "text": sources.text_documents,
    }
    for path in paths:
        found, notes = sources.find_files(path)
        for note in notes:
            print(note, file=sys.stderr)
        for file in found:
            yield from readers[file.format](file)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"there is no file {path}", "nothing to check", "mind the spelling")
