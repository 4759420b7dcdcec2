"""One measurement of the tokenizer bench, in its own process: `python -m fledge.bench.tok_jobs`.

`fledge.bench.tok` starts it with a job as JSON and reads what it prints: seconds and bytes of a
training, or MB/s of every form that the contender has. A contender is a folder's tokenizer loaded
by its own library; `LOADERS` and `TRAIN` are all that is known of each. Nothing here compares.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fledge.tokenizer import Tokenizer, reference

MB = 1_000_000
SHORT_BYTES = 2048
WARM_PASSES = 5
SLOW_SECONDS = 1.0  # a pass that takes longer is measured once more and not five times


def read_documents(path: Path) -> list[str]:
    """The texts that `fledge.bench.tok` wrote for its jobs."""
    return json.loads(path.read_text(encoding="utf-8"))


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What a job measures."""
    if job["what"] == "train":
        return work_train(job)
    import numpy  # noqa: F401  # for all alike: some import it in their first call

    folder = Path(job["folder"])
    forms = LOADERS[job["name"]](folder / "tokenizer", job.get("threads", 1))
    if job["what"] == "hostile":
        texts = read_documents(folder / "hostile.json")
        encode = forms.get("numpy") or forms["list"]
        rates = {}
        for kind, text in zip(job["kinds"], texts, strict=True):
            try:
                seconds = seconds_of(lambda text=text: encode(text))
            except Exception:  # a peer that gives up on such text; ours must not
                if job["name"] == "fledge":
                    raise
                seconds = math.inf
            rates[kind] = len(text.encode()) / MB / seconds
        return {"rates": rates}
    documents = read_documents(folder / "held_out.json")
    return {"rates": RATES[job["what"]](forms, documents)}


def work_train(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak resident bytes of one training."""
    folder, name, size = Path(job["folder"]), job["name"], job["size"]
    if name == "gigatoken":  # GPT-2's pattern, from a file: the only form it has
        gigatoken = importlib.import_module("gigatoken")

        source = gigatoken.TextFileSource([str(folder / "train.txt")])
        forget_peak()
        seconds = seconds_of(lambda: gigatoken.train_bpe(source, size, []))
    else:
        texts = read_documents(folder / "train.json")
        train = TRAIN[name](texts, size, job["threads"])
        forget_peak()
        seconds = seconds_of(train)
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def _train_fledge(texts: list[str], size: int, threads: int) -> Callable[[], object]:
    return lambda: Tokenizer.train(texts, size, threads=threads)


def _train_rustbpe(texts: list[str], size: int, threads: int) -> Callable[[], object]:
    rustbpe = importlib.import_module("rustbpe")

    trainer = rustbpe.Tokenizer()
    pattern = reference.PATTERNS["qwen2"]
    return lambda: trainer.train_from_iterator(iter(texts), size, pattern=pattern)


def _train_hf(texts: list[str], size: int, threads: int) -> Callable[[], object]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(reference.PATTERNS["qwen2"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return lambda: tokenizer.train_from_iterator(texts, trainer)


TRAIN = {"fledge": _train_fledge, "rustbpe": _train_rustbpe, "HF tokenizers": _train_hf}

Forms = dict[str, Callable[..., Any]]  # list, numpy, batch_list, batch_numpy, decode


def _load_fledge(folder: Path, threads: int) -> Forms:
    tok = Tokenizer.load(folder)
    return {
        "list": tok.encode,
        "numpy": tok.encode_to_numpy,
        "batch_list": lambda docs: tok.encode_batch(docs, threads),
        "batch_numpy": lambda docs: tok.encode_to_numpy(docs, threads=threads),
        "decode": tok.decode,
    }


def _load_tiktoken(folder: Path, threads: int) -> Forms:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    encoding = tiktoken.Encoding(
        "bench",
        pat_str=reference.PATTERNS["qwen2"],
        mergeable_ranks=load_tiktoken_bpe(str(folder / "vocab.tiktoken")),
        special_tokens={},
    )
    return {
        "list": encoding.encode_ordinary,
        "numpy": lambda text: encoding.encode_to_numpy(text, disallowed_special=()),
        "batch_list": lambda docs: encoding.encode_ordinary_batch(docs, num_threads=threads),
        "decode": encoding.decode,
    }


def _load_hf(folder: Path, threads: int) -> Forms:
    import tokenizers

    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def batch(docs: list[str]) -> list[list[int]]:
        return [e.ids for e in other.encode_batch_fast(docs, add_special_tokens=False)]

    return {
        "list": lambda text: other.encode(text, add_special_tokens=False).ids,
        "batch_list": batch,
        "decode": lambda ids: other.decode(ids, skip_special_tokens=False),
    }


def _load_gigatoken(folder: Path, threads: int) -> Forms:
    gigatoken = importlib.import_module("gigatoken")

    other = gigatoken.Tokenizer(str(folder / "tokenizer.json"))
    parallel = threads > 1
    return {
        "list": lambda text: other.encode(text).tolist(),
        "numpy": other.encode,
        "batch_list": lambda docs: other.encode_batch_list(docs, parallel=parallel),
        "batch_numpy": lambda docs: other.encode_batch(docs, parallel=parallel),
        "decode": lambda ids: other.decode(ids).decode("utf-8", "replace"),
    }


def _load_fastokens(folder: Path, threads: int) -> Forms:
    fastokens = importlib.import_module("fastokens")

    other = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {
        "list": lambda text: list(other.encode_ordinary(text).ids),
        "decode": lambda ids: other.decode(ids),
    }


def _load_kitoken(folder: Path, threads: int) -> Forms:
    kitoken = importlib.import_module("kitoken")

    other = kitoken.Kitoken.from_tokenizers_file(str(folder / "tokenizer.json"))
    return {
        "list": lambda text: other.encode(text, False),
        "batch_list": lambda docs: other.encode_all(docs, False),
        "decode": lambda ids: other.decode(ids, False),
    }


LOADERS: dict[str, Callable[[Path, int], Forms]] = {
    "fledge": _load_fledge,
    "tiktoken": _load_tiktoken,
    "HF tokenizers": _load_hf,
    "gigatoken": _load_gigatoken,
    "fastokens": _load_fastokens,
    "kitoken": _load_kitoken,
}


def _rates_document(forms: Forms, documents: list[str]) -> dict[str, float]:
    """One long document: the first pass of the process, then warm ones, in each form."""
    text = "\n".join(documents)
    megabytes = len(text.encode()) / MB
    fast = forms.get("numpy") or forms["list"]
    cold = seconds_of(lambda: fast(text))
    rates = {"cold": megabytes / cold}
    if "numpy" in forms:
        rates["warm, numpy"] = megabytes / warm_seconds(lambda: forms["numpy"](text))
    rates["warm, list"] = megabytes / warm_seconds(lambda: forms["list"](text))
    return rates


def _rates_loop(forms: Forms, documents: list[str]) -> dict[str, float]:
    """2 KB documents, one call each, on one thread."""
    docs = short_documents(documents)
    megabytes = sum(len(d.encode()) for d in docs) / MB
    rates = {}
    for form in ("numpy", "list"):
        if form in forms:
            encode = forms[form]
            rates[form] = megabytes / warm_seconds(lambda encode=encode: [encode(d) for d in docs])
    return rates


def _rates_batch(forms: Forms, documents: list[str]) -> dict[str, float]:
    """2 KB documents in one call, on the given threads."""
    docs = short_documents(documents)
    megabytes = sum(len(d.encode()) for d in docs) / MB
    rates = {}
    for form in ("batch_numpy", "batch_list"):
        if form in forms:
            encode = forms[form]
            rates[form[6:]] = megabytes / warm_seconds(lambda encode=encode: encode(docs))
    return rates


def _rates_decode(forms: Forms, documents: list[str]) -> dict[str, float]:
    """Lists of ids back to text: of one long document, and of 2 KB documents, one call each.

    0 for a contender that does not give the text back. Half the time of a long document with an
    emoji in it is Python's, which makes a string of four bytes a character of it.
    """
    text, docs = "\n".join(documents), short_documents(documents)
    ids, ids_of_docs = forms["list"](text), [forms["list"](doc) for doc in docs]
    decode = forms["decode"]
    if decode(ids) != text or [decode(ids) for ids in ids_of_docs] != docs:
        return {"document": 0.0, "loop": 0.0}
    megabytes = len(text.encode()) / MB
    return {
        "document": megabytes / warm_seconds(lambda: decode(ids)),
        "loop": megabytes / warm_seconds(lambda: [decode(ids) for ids in ids_of_docs]),
    }


RATES = {
    "document": _rates_document,
    "loop": _rates_loop,
    "batch": _rates_batch,
    "decode": _rates_decode,
}


def short_documents(documents: list[str]) -> list[str]:
    """The same text in pieces of about 2 KB."""
    text = "\n".join(documents)
    return [text[at : at + SHORT_BYTES] for at in range(0, len(text), SHORT_BYTES)]


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call; what it returns is dropped outside the clock."""
    began = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - began
    del result
    return seconds


def warm_seconds(function: Callable[[], object]) -> float:
    """The median of a few calls after one that warms up."""
    passes = 1 if seconds_of(function) > SLOW_SECONDS else WARM_PASSES
    return statistics.median(seconds_of(function) for _ in range(passes))


def forget_peak() -> None:
    """Lets the peak begin anew, so that reading the documents is not in it; Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Peak resident memory of this process since `forget_peak`; what is read stays in it."""
    import resource

    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
