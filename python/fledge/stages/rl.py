"""Reinforcement: the model tries problems with its tool and learns from its right answers."""

from __future__ import annotations

from typing import Any

from fledge.engine import Engine, SamplingParams
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.stages.chats import replies
from fledge.stages.context import StageContext
from fledge.stages.material import HELD_OUT_PROBLEMS
from fledge.stages.training import (
    TrainingHooks,
    save_checkpoint,
    schedule_of,
    start_or_resume,
    write_samples,
)
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import answer_text, split_parts
from fledge.train.rl import RlConfig, train_rl

VALIDATION_PROBLEMS = 128
MOST_TRIES = 50  # problems to look at for one that fits the context
TRY_STRIDE = 100_003  # a prime: far from the problems that other steps take


def run(ctx: StageContext, *, resume: bool) -> None:
    """GRPO on the material's problems, from sft's model."""
    section = ctx.recipe.rl
    tokenizer = ctx.tokenizer()
    assert section.steps is not None and section.lr_scale is not None
    config = _config(ctx)
    start = start_or_resume(
        ctx,
        "rl",
        resume=resume,
        previous="sft",
        lr_scale=section.lr_scale,
        save_every=config.save_every,
    )
    engine = Engine(start.model, tokenizer)

    room = ctx.run.model.max_position_embeddings

    def problem(index: int) -> tuple[dict[str, Any], list[int]]:
        # one that leaves no room for an answer gives way to the next of a fixed sequence
        for at in range(index, index + MOST_TRIES * TRY_STRIDE, TRY_STRIDE):
            item = ctx.material.problem(at)
            assert item is not None
            prompt = render_prompt(tokenizer, item["messages"])
            if len(prompt) < room:
                return item, prompt
        raise UserError(
            f"{MOST_TRIES} problems in a row are longer than the model can read",
            f"it reads at most {room} tokens, problem and answer together",
            "raise model.max_seq_len and train again, or leave rl out with --rl.steps 0",
        )

    def reward(item: dict[str, Any], ids: list[int]) -> float:
        text = answer_text(split_parts(tokenizer, ids))
        stopped = bool(ids) and ids[-1] == tokenizer.eos_id
        return 1.0 if stopped and ctx.material.grade(item, text) else 0.0

    with Tools() as tools:

        def evaluate() -> dict[str, float]:
            start.model.eval()
            held = [problem(HELD_OUT_PROBLEMS + i) for i in range(VALIDATION_PROBLEMS)]
            params = SamplingParams(max_tokens=config.max_new_tokens)
            done = engine.generate([prompt for _, prompt in held], params, tools)
            right = sum(
                reward(item, completion.ids)
                for (item, _), (completion,) in zip(held, done, strict=True)
            )
            return {"validation_reward": right / len(held)}

        def save(step: int) -> None:
            save_checkpoint(
                ctx,
                "rl",
                step,
                model=start.model,
                optimizers=start.optimizers,
                tokenizer=tokenizer,
                state={},
                save_every=config.save_every,
            )

        log = ctx.run.log_file("rl")
        with TrainingHooks(ctx, "rl", evaluate=evaluate, save=save) as hooks:
            hooks.metrics.truncate_after(start.step)
            ctx.progress.stage("rl", section.steps, "steps", done=start.step, log=log)
            train_rl(
                model=start.model,
                engine=engine,
                tools=tools,
                optimizers=start.optimizers,
                problem=problem,
                reward=reward,
                schedule=schedule_of(section, steps=section.steps),
                config=config,
                hooks=hooks,
                start=start.step,
            )
    pairs = replies(start.model, tokenizer, ctx.material.sample_questions())
    write_samples(ctx.run.samples_file("rl"), "What rl answers", pairs)


def _config(ctx: StageContext) -> RlConfig:
    section = ctx.recipe.rl
    assert section.prompts_per_step is not None and section.samples_per_prompt is not None
    assert section.max_new_tokens is not None and section.temperature is not None
    assert section.eval_every is not None and section.save_every is not None
    return RlConfig(
        prompts_per_step=section.prompts_per_step,
        samples_per_prompt=section.samples_per_prompt,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        seed=section.seed,
        eval_every=section.eval_every,
        save_every=section.save_every,
    )
