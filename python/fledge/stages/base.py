"""Pretraining: the model learns language and facts from raw text."""

from __future__ import annotations

from fledge import files
from fledge.engine import SamplingParams
from fledge.model import Transformer
from fledge.stages.context import StageContext
from fledge.stages.inference import stage_engine
from fledge.stages.training import run_training, write_samples

SAMPLE_TOKENS = 48


def run(ctx: StageContext, *, resume: bool) -> None:
    """Trains from fresh weights on the material's documents, measured in bits per byte."""
    bound = ctx.material.entropy_per_byte()
    if bound is not None and ctx.world.leads:
        files.write_json(ctx.run.entropy_file, {"bits_per_byte": bound})
        ctx.progress.note(f"base: the text's own entropy is at most {bound:.4f} bits per byte")
    model = run_training(
        ctx,
        "base",
        documents=ctx.material.texts("train", ctx.tokenizer),
        validation=ctx.material.texts("val", ctx.tokenizer),
        split=True,
        resume=resume,
    )
    if not ctx.world.leads:
        return
    write_samples(ctx, "base", "What base writes on its own", continuations(ctx, model))


def continuations(ctx: StageContext, model: Transformer) -> list[tuple[str, str]]:
    """Greedy continuations of raw text; a prompt longer than half the context is cut short."""
    model.eval()
    engine, tokenizer = stage_engine(model, ctx.tokenizer), ctx.tokenizer
    prompts, room = ctx.material.sample_prompts(), model.config.max_position_embeddings // 2
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)][:room] for prompt in prompts]
    done = engine.generate(ids, SamplingParams(max_tokens=SAMPLE_TOKENS))
    return [
        (prompt, prompt + tokenizer.decode([i for i in reply.ids if i not in engine.stop_ids]))
        for prompt, (reply,) in zip(prompts, done, strict=True)
    ]
