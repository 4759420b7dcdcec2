"""The verb `tok`: the tokenizer by itself.

Called by `fledge.cli` only. Each sub-verb reads its words, calls one function and prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.cli import Parser, positive, run_sub_verb
from fledge.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from fledge.data.text_files import SourceFile
    from fledge.tokenizer import Tokenizer
    from fledge.tokenizer.compare import Domain

PATTERNS = ("qwen2", "llama3", "gpt4-2", "o200k")
_BENCH_PARTS = ("train", "document", "loop", "batch", "decode", "hostile")
_DOMAIN_FIELDS = ("name", "lang", "language", "source", "domain")  # of a line of .jsonl


def tok(words: list[str]) -> int:
    """`fledge tok ...`."""
    choices = {
        "train": _train,
        "eval": _eval,
        "encode": _encode,
        "decode": _decode,
        "bench": _bench,
    }
    return run_sub_verb("tok", words, choices)


def _train(words: list[str]) -> int:
    parser = Parser(
        "tok train",
        "learn a tokenizer from text; stopped (Ctrl-C, kill) and run again, it goes on",
    )
    parser.add_argument("text", type=Path, nargs="+", help="files or folders of text")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=32768, help="a multiple of 128")
    parser.add_argument(
        "--pattern", default="qwen2",
        help=f"how text is split: {', '.join(PATTERNS)}, or regex:REGEX (slower); default qwen2",
    )  # fmt: skip
    parser.add_argument(
        "--marks", choices=("letters",),
        help="combining marks count as letters: keeps words of Hindi, Tamil, Thai whole",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, help="default: all cores")
    args = parser.parse_args(words)
    from fledge.progress import Progress
    from fledge.tokenizer.training import Shard, train_from_shards

    shards = [Shard(str(file.path), file.path, _reader(file)) for file in _files(args.text)]
    stages = {"count": "bytes", "merge": "merges"}
    with Progress() as progress:

        def report(phase: str, done: float, total: float) -> None:
            if phase in stages:
                progress.stage(phase, total, stages.pop(phase))
            progress.update(done)

        tokenizer = train_from_shards(
            shards,
            args.out,
            vocab_size=args.vocab_size,
            pattern=args.pattern + ("+marks" if args.marks else ""),
            threads=args.threads,
            report=report,
            note=progress.note,
        )
    print(f"{tokenizer.vocab_size:,} tokens written to {args.out}")
    return EXIT_DONE


def _reader(file: SourceFile) -> Callable[[], Iterator[str]]:
    return lambda: (text for _, text in _documents(file))


def _eval(words: list[str]) -> int:
    parser = Parser(
        "tok eval",
        "how well a tokenizer compresses text, domain by domain, beside others found here:\n"
        "GPT-2, GPT-4 and GPT-4o from tiktoken's cache, and what lies in FLEDGE_HOME/tokenizers",
    )
    parser.add_argument("tokenizer", type=Path, help="a run, a checkpoint or a tokenizer folder")
    parser.add_argument("text", type=Path, nargs="+", help="files or folders of text")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="FILE",
        help="also measure this tokenizer.json or .tiktoken file (may be given again)",
    )  # fmt: skip
    parser.add_argument(
        "--pattern", default="llama3",
        help="how a .tiktoken file of unknown name splits (default llama3, which is GPT-4's)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    from fledge.plan.hardware import fledge_home
    from fledge.tokenizer import compare

    tokenizer = _load(args.tokenizer)
    others, notes = compare.find_others(fledge_home(), args.beside, pattern=args.pattern)
    wrong = 0

    def texts() -> Iterator[tuple[str, str]]:
        nonlocal wrong
        for file in _files(args.text):
            for domain, text in _documents(file):
                wrong += tokenizer.decode(tokenizer.encode(text)) != text
                yield domain, text

    domains = compare.measure(texts(), {"fledge": tokenizer.count} | others)
    whole = compare.total(domains)
    if args.json:
        print(json.dumps(_eval_facts(tokenizer, domains, whole, wrong), indent=2))
        return EXIT_DONE
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{tokenizer.vocab_size:,} tokens; {whole.documents:,} documents, {whole.bytes:,} bytes")
    print("bytes per token (more is better) and tokens per word (fewer is better)\n")
    names = ["fledge", *others]
    width = max([len(name) for name in domains] + [8])
    print(f"{'':<{width}} " + " ".join(f"{name:>14.14}" for name in names))
    for name, domain in [*sorted(domains.items()), ("together", whole)]:
        cells = []
        for encoder in names:
            fertility = domain.fertility(encoder)
            words_part = "     -" if fertility is None else f"{fertility:6.2f}"
            cells.append(f"{domain.bytes_per_token(encoder):7.2f} {words_part}")
        print(f"{name:<{width}} " + " ".join(f"{cell:>14}" for cell in cells))
    print(f"\ndocuments changed by a round trip: {wrong}")
    return EXIT_DONE


def _eval_facts(
    tokenizer: Tokenizer, domains: dict[str, Domain], whole: Domain, wrong: int
) -> dict[str, Any]:
    def facts(domain: Domain) -> dict[str, Any]:
        return {
            "documents": domain.documents,
            "bytes": domain.bytes,
            "words": domain.words,
            "tokens": domain.tokens,
            "bytes_per_token": {n: round(domain.bytes_per_token(n), 4) for n in domain.tokens},
            "tokens_per_word": {n: domain.fertility(n) for n in domain.tokens},
        }

    return {
        "vocab_size": tokenizer.vocab_size,
        "documents_changed_by_a_round_trip": wrong,
        "together": facts(whole) if domains else None,
        "domains": {name: facts(domain) for name, domain in domains.items()},
    }


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


def _bench(words: list[str]) -> int:
    parser = Parser(
        "tok bench",
        "training, encoding, decoding and hostile text beside the peers that are installed\n"
        "(rustbpe, tokenizers, gigatoken, tiktoken, fastokens, kitoken), each in fresh processes",
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", help="files or folders (default: the almanac's prose)"
    )
    parser.add_argument("--mb", type=positive, default=100, help="megabytes to train on")
    parser.add_argument("--vocab-size", type=positive, default=32768)
    parser.add_argument("--runs", type=positive, default=5, help="rounds; a ratio is their median")
    parser.add_argument("--threads", type=positive, default=2, help="for training and batches")
    parser.add_argument("--parts", nargs="+", choices=_BENCH_PARTS, default=_BENCH_PARTS)
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME",
        help='only beside these, such as gigatoken "HF tokenizers" (default: all that are here)',
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(words)
    from fledge.bench import tok as bench_tok

    settings = bench_tok.Settings(
        train_mb=args.mb,
        vocab_size=args.vocab_size,
        runs=args.runs,
        threads=args.threads,
        parts=tuple(args.parts),
        peers=bench_tok.PEERS if args.peers is None else tuple(args.peers),
    )
    unknown = set(settings.peers) - set(bench_tok.PEERS)
    if unknown:
        raise UserError(
            f"there is no peer {min(unknown)!r}",
            "the bench does not know how to load it",
            f"give some of {', '.join(map(repr, bench_tok.PEERS))}",
        )
    texts = bench_tok.almanac_prose() if args.text is None else documents(args.text)
    rows = bench_tok.run(texts, settings, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({"results": rows}, indent=2) if args.json else bench_tok.table(rows))
    return EXIT_DONE


def _load(path: Path) -> Tokenizer:
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


def _files(paths: list[Path]) -> Iterator[SourceFile]:
    """The readable files of `paths`; what is passed over is said on standard error."""
    from fledge.data import text_files

    for path in paths:
        found, notes = text_files.find_files(path)
        for note in notes:
            print(note, file=sys.stderr)
        yield from found


def documents(paths: list[Path]) -> Iterator[str]:
    """The texts of files and folders, one after the other."""
    return (text for file in _files(paths) for _, text in _documents(file))


def _documents(file: SourceFile) -> Iterator[tuple[str, str]]:
    """(domain, text) of a file: a line's name, language or source, else the name of the file."""
    from fledge.data import text_files

    stem = Path(file.relative).name.partition(".")[0]
    if file.format == "jsonl":
        for number, line in text_files.json_lines(file):
            labels = (line.get(name) for name in _DOMAIN_FIELDS)
            domain = next((str(label) for label in labels if label), stem)
            yield domain, text_files.text_of(line, file, number)
        return
    read = text_files.parquet_texts if file.format == "parquet" else text_files.text_documents
    for text in read(file):
        yield stem, text
