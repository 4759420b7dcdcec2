"""Pretraining: the model learns language and facts from raw text."""

from __future__ import annotations

from typing import Any

from fledge import files
from fledge.data.loader import Documents
from fledge.data.shards import ShardedTexts
from fledge.engine import SamplingParams
from fledge.model import Transformer
from fledge.stages.context import StageContext
from fledge.stages.inference import stage_engine
from fledge.stages.training import run_training, write_samples
from fledge.train import checkpoint

SAMPLE_TOKENS = 48


def run(ctx: StageContext, *, resume: bool) -> None:
    """Trains from fresh weights on the material's documents, measured in bits per byte."""
    bound = ctx.material.entropy_per_byte()
    if bound is not None and ctx.world.leads:
        files.write_json(ctx.run.entropy_file, {"bits_per_byte": bound})
        ctx.progress.note(f"base: the text's own entropy is at most {bound:.4f} bits per byte")
    documents = ctx.material.texts("train", ctx.tokenizer)
    if ctx.world.leads:
        files.write_json(ctx.run.corpus_file, ctx.material.corpus())
    model = run_training(
        ctx,
        "base",
        documents=documents,
        validation=ctx.material.texts("val", ctx.tokenizer),
        split=True,
        resume=resume,
    )
    if not ctx.world.leads:
        return
    files.write_json(ctx.run.corpus_file, ctx.material.corpus() | _read(ctx, documents))
    write_samples(ctx, "base", "What base writes on its own", continuations(ctx, model))


def _read(ctx: StageContext, documents: Documents) -> dict[str, Any]:
    """How often the training went through a corpus in shards.

    Of text in memory the report counts passes by bytes: the packer cuts long documents, and of a
    small corpus all that it took may still wait in parts.
    """
    order = getattr(documents, "text", None)
    if not isinstance(order, ShardedTexts):
        return {}
    latest = ctx.run.latest_checkpoint("base")
    assert latest is not None, "base ends with a checkpoint"
    loader = checkpoint.read_state(latest)["loader"]
    taken = max(0, loader["cursor"] - len(loader["buffer"]))
    return {"documents_read": taken, "passes": order.passes(taken)}


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
