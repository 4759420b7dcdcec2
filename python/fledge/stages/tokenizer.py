"""The first stage: learn the BPE merges from the training documents and write the tokenizer."""

from __future__ import annotations

from typing import Any

from fledge import files
from fledge.stages.context import StageContext
from fledge.tokenizer import Tokenizer


def run(ctx: StageContext, *, resume: bool) -> None:
    """Trains the tokenizer on the first bytes of the training documents (nothing to resume)."""
    section: Any = ctx.recipe.tokenizer  # Any: a planned section has no absent values
    limit: int = section.train_bytes
    ctx.progress.stage("tokenizer", limit, "bytes", log=ctx.run.log_file("tokenizer"))
    seen = 0

    def counted():
        nonlocal seen
        for text in ctx.material.tokenizer_texts(limit):
            seen += len(text.encode("utf-8"))
            ctx.stop.raise_if_requested("tokenizer")
            ctx.progress.update(min(seen, limit))
            yield text

    tokenizer = Tokenizer.train(counted(), vocab_size=section.vocab_size, pattern=section.pattern)
    tokenizer.save(ctx.run.tokenizer_dir)
    sample = "\n".join(ctx.material.tokenizer_texts(min(seen, 200_000)))
    size, tokens = len(sample.encode("utf-8")), len(tokenizer.encode(sample))
    files.write_json(
        ctx.run.tokenizer_stats_file,
        {
            "vocab_size": tokenizer.vocab_size,
            "pattern": section.pattern,
            "train_bytes": seen,
            "bytes_per_token": size / max(1, tokens),
        },
    )
    ctx.progress.note(
        f"tokenizer: {tokenizer.vocab_size} tokens, {size / max(1, tokens):.2f} bytes per token"
    )
