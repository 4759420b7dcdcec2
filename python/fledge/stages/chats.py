"""Training on conversations, the common body of mid and sft: mixture, masks, samples."""

from __future__ import annotations

from fledge import files
from fledge.engine import SamplingParams
from fledge.engine.tools import Tools
from fledge.model import Transformer
from fledge.stages import mixture, on_the_way
from fledge.stages.context import StageContext
from fledge.stages.inference import stage_engine
from fledge.stages.own_files import ChatStage
from fledge.stages.training import run_training, write_samples
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import split_parts

SAMPLE_TOKENS = 96


def run_chats(ctx: StageContext, stage: ChatStage, *, resume: bool) -> None:
    """Trains `stage` on its mixture of conversations; only assistant tokens are trained on."""
    room = ctx.run.model.max_position_embeddings
    documents, _ = ctx.material.chats(stage, "train", ctx.tokenizer, max_tokens=room)
    validation, _ = ctx.material.chats(stage, "val", ctx.tokenizer, max_tokens=room)
    if ctx.world.leads:
        _tell_mixture(ctx, stage, room)
    model = run_training(
        ctx,
        stage,
        documents=documents,
        validation=validation,
        split=False,
        resume=resume,
        also=on_the_way.looks(ctx, stage),
    )
    if ctx.world.leads:
        write_replies(ctx, stage, model)


def _tell_mixture(ctx: StageContext, stage: ChatStage, room: int) -> None:
    """What the stage is about to read, printed and stored; on documents of its own."""
    tokens = getattr(ctx.recipe, stage).tokens
    assert tokens is not None
    sample, shares = ctx.material.chats(stage, "train", ctx.tokenizer, max_tokens=room)
    table = mixture.measure(sample, shares, tokens)
    files.write_json(ctx.run.mixture_file(stage), mixture.as_json(table))
    ctx.progress.note(f"{stage}: what it is about to read, by kind of conversation")
    for line in mixture.lines(table):
        ctx.progress.note(line)


def write_replies(ctx: StageContext, stage: str, model: Transformer) -> None:
    """samples.md: greedy answers, tool traces in brackets; a question too long is left out."""
    model.eval()
    asked = {
        question: render_prompt(ctx.tokenizer, [{"role": "user", "content": question}])
        for question in ctx.material.sample_questions()
    }
    room = model.config.max_position_embeddings
    asked = {question: prompt for question, prompt in asked.items() if len(prompt) < room}
    params = SamplingParams(max_tokens=SAMPLE_TOKENS)
    with Tools() as tools:
        done = stage_engine(model, ctx.tokenizer).generate(list(asked.values()), params, tools)
    pairs = []
    for question, (completion,) in zip(asked, done, strict=True):
        parts = split_parts(ctx.tokenizer, completion.ids)
        said = [p["text"] if p["type"] == "text" else f"[{p['type']}: {p['text']}]" for p in parts]
        pairs.append((question, " ".join(said)))
    write_samples(ctx, stage, f"What {stage} answers", pairs)
