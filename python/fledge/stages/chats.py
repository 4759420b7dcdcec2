"""Training on conversations, the common body of mid and sft: mixture, masks, samples."""

from __future__ import annotations

from fledge import files
from fledge.engine import Engine, SamplingParams
from fledge.engine.tools import Tools
from fledge.model import Transformer
from fledge.stages.context import StageContext
from fledge.stages.material import ChatStage
from fledge.stages.training import run_training, write_samples
from fledge.tokenizer import Tokenizer
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import split_parts


def run_chats(ctx: StageContext, stage: ChatStage, *, previous: str, resume: bool) -> None:
    """Trains `stage` on its mixture of conversations; only assistant tokens are trained on."""
    tokenizer = ctx.tokenizer()
    room = ctx.run.model.max_position_embeddings
    documents, shares = ctx.material.chats(stage, "train", tokenizer, max_tokens=room)
    validation, _ = ctx.material.chats(stage, "val", tokenizer, max_tokens=room)
    files.write_json(ctx.run.mixture_file(stage), shares)
    table = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    ctx.progress.note(f"{stage}: mixture by conversations: {table}")
    model = run_training(
        ctx,
        stage,
        section=getattr(ctx.recipe, stage),
        documents=documents,
        validation=validation,
        split=False,
        previous=previous,
        resume=resume,
    )
    pairs = replies(model, tokenizer, ctx.material.sample_questions())
    write_samples(ctx.run.samples_file(stage), f"What {stage} answers", pairs)


def replies(
    model: Transformer, tokenizer: Tokenizer, questions: list[str]
) -> list[tuple[str, str]]:
    """Greedy answers with tools, tool traces in brackets; a question too long is left out."""
    model.eval()
    engine = Engine(model, tokenizer)
    asked = {
        question: render_prompt(tokenizer, [{"role": "user", "content": question}])
        for question in questions
    }
    room = model.config.max_position_embeddings
    asked = {question: prompt for question, prompt in asked.items() if len(prompt) < room}
    with Tools() as tools:
        done = engine.generate(list(asked.values()), SamplingParams(max_tokens=96), tools)
    shown = []
    for question, (completion,) in zip(asked, done, strict=True):
        parts = split_parts(tokenizer, completion.ids)
        text = " ".join(
            part["text"] if part["type"] == "text" else f"[{part['type']}: {part['text']}]"
            for part in parts
        )
        shown.append((question, text))
    return shown
