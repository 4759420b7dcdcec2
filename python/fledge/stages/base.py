"""Pretraining: the model learns language and facts from raw text."""

from __future__ import annotations

from fledge import files
from fledge.stages.context import StageContext
from fledge.stages.training import continuations, run_training, write_samples


def run(ctx: StageContext, *, resume: bool) -> None:
    """Trains from fresh weights on the material's documents, measured in bits per byte."""
    tokenizer = ctx.tokenizer()
    bound = ctx.material.entropy_per_byte()
    if bound is not None:
        files.write_json(ctx.run.entropy_file, {"bits_per_byte": bound})
        ctx.progress.note(f"base: the text's own entropy is at most {bound:.4f} bits per byte")
    model = run_training(
        ctx,
        "base",
        section=ctx.recipe.base,
        documents=ctx.material.texts("train", tokenizer),
        validation=ctx.material.texts("val", tokenizer),
        split=True,
        previous=None,
        resume=resume,
    )
    pairs = continuations(model, tokenizer, ctx.material.sample_prompts())
    write_samples(ctx.run.samples_file("base"), "What base writes on its own", pairs)
