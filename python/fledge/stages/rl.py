"""Reinforcement: the model tries problems with its tool and learns from its right answers."""

from __future__ import annotations

from typing import Any

from fledge.engine import SamplingParams
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.model import Transformer
from fledge.stages.chats import write_replies
from fledge.stages.context import StageContext
from fledge.stages.inference import stage_engine
from fledge.stages.material import HELD_OUT_PROBLEMS
from fledge.stages.training import TrainedStage
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import answer_text, split_parts
from fledge.train.rl import RlConfig, train_rl

VALIDATION_PROBLEMS = 128
MOST_TRIES = 50  # problems to look at for one that fits the context
TRY_STRIDE = 100_003  # a prime: far from the problems that other steps take


def run(ctx: StageContext, *, resume: bool) -> None:
    """GRPO on the material's problems, from sft's model."""
    section: Any = ctx.recipe.rl  # Any: a planned section has no absent values
    tokenizer, room = ctx.tokenizer, ctx.run.model.max_position_embeddings

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

    def evaluate(model: Transformer) -> dict[str, float]:
        model.eval()
        held = [problem(HELD_OUT_PROBLEMS + i) for i in range(VALIDATION_PROBLEMS)]
        params = SamplingParams(max_tokens=section.max_new_tokens)
        done = stage_engine(model, tokenizer).generate(
            [prompt for _, prompt in held], params, tools
        )
        right = sum(
            reward(item, completion.ids)
            for (item, _), (completion,) in zip(held, done, strict=True)
        )
        return {"validation_reward": right / len(held)}

    with (
        Tools() as tools,
        TrainedStage(ctx, "rl", steps=section.steps, resume=resume, evaluate=evaluate) as training,
    ):
        train_rl(
            training.job,
            engine=stage_engine(training.job.model, tokenizer),
            tools=tools,
            problem=problem,
            reward=reward,
            config=RlConfig(
                section.prompts_per_step,
                section.samples_per_prompt,
                section.max_new_tokens,
                section.temperature,
                section.seed,
            ),
        )
    write_replies(ctx, "rl", training.job.model)
