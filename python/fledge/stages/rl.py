"""Reinforcement: the model tries problems with its tool and learns from its right answers.

Several ranks share the problems of a step and of a measurement; `train.rl` makes one step of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fledge.engine import Completion, SamplingParams
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals.rewards import Reply, Rewards
from fledge.model import Transformer
from fledge.model.precision import without_gradients
from fledge.stages.chats import write_replies
from fledge.stages.context import StageContext
from fledge.stages.inference import stage_engine
from fledge.stages.own_files import HELD_OUT_PROBLEMS
from fledge.stages.training import TrainedStage
from fledge.tokenizer.chat import render_prompt
from fledge.train.rl import Graded, RlConfig, train_rl

VALIDATION_PROBLEMS = 128
MOST_TRIES = 50  # problems to look at for one that fits the context
TRY_STRIDE = 100_003  # a prime: far from the problems that other steps take


def run(ctx: StageContext, *, resume: bool) -> None:
    """The GRPO family on the material's problems, from sft's model."""
    section: Any = ctx.recipe.rl  # Any: a planned section has no absent values
    world = ctx.world
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

    def reward(item: dict[str, Any], answer: Completion) -> Graded:
        parts = rewards.parts(item, Reply.of(tokenizer, answer.ids))
        # right by the first reward that is named: a length or a style is no answer
        return Graded(rewards.total(parts), parts[rewards.names[0]] >= 1.0, parts)

    def evaluate(model: Transformer) -> dict[str, float]:
        model.eval()
        held = [problem(HELD_OUT_PROBLEMS + i) for i in world.strided(VALIDATION_PROBLEMS)]
        params = SamplingParams(max_tokens=section.max_new_tokens)
        done = stage_engine(model, tokenizer).generate(
            [prompt for _, prompt in held], params, tools
        )
        found = [reward(item, answer) for (item, _), (answer,) in zip(held, done, strict=True)]
        world.wait()  # however long the slowest of the ranks talks
        total = world.sum_number(sum(graded.reward for graded in found), model.cos.device)
        return {"validation_reward": total / VALIDATION_PROBLEMS}

    with (
        Tools() as tools,
        Rewards(section.rewards) as rewards,
        TrainedStage(ctx, "rl", steps=section.steps, resume=resume, evaluate=evaluate) as training,
    ):
        names = rewards.names if len(rewards.names) > 1 else ()
        shared = {f.name for f in dataclasses.fields(RlConfig)} - {"reward_names"}
        known: dict[str, Any] = {name: getattr(section, name) for name in shared}
        train_rl(
            training.job,
            engine=stage_engine(training.job.model, tokenizer),
            tools=tools,
            problem=problem,
            reward=reward,
            config=RlConfig(**known, reward_names=names),
            reference=_reference(ctx) if section.kl_beta else None,
        )
    if world.leads:
        write_replies(ctx, "rl", training.job.model)


def _reference(ctx: StageContext) -> Transformer:
    """The model that rl began with; it stays as it is."""
    folder = ctx.run.latest_checkpoint("sft")
    assert folder is not None
    model = Transformer.load(folder, device=ctx.device).eval()
    return model.compute_in(without_gradients(ctx.recipe.hardware.dtype or "float32"))
