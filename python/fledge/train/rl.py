"""Reinforcement: GRPO on problems whose answer can be checked, with tool calls in the rollout.

Each step samples a group of answers to every problem, rewards them, and raises the probability of
the better ones: the advantage of a sample is its reward minus the mean of its group, and the loss
is summed over all sampled tokens of the step and divided by their number (Dr. GRPO,
arXiv 2503.20783, with DAPO's global token count, arXiv 2503.14476). One update per batch of
rollouts, so the policy ratio is 1 and needs no clipping. Tool output is read, never trained on; the
end token is trained, so that stopping is learnt. Called by `stages.rl`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fledge.engine import Completion, Engine, SamplingParams
from fledge.engine.scheduler import pad_right
from fledge.engine.tools import Tools
from fledge.model import Transformer
from fledge.train.loop import Job

MICRO_TOKENS = 4096  # padded tokens in one forward-backward pass

Reward = Callable[[dict[str, Any], list[int]], float]  # (problem, sampled ids) -> reward


@dataclass(frozen=True)
class RlConfig:
    """Shape of one step."""

    prompts_per_step: int
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: the whole row, which of its tokens were sampled, and its reward."""

    ids: list[int]
    sampled: list[bool]  # same length as ids; the prompt is False
    reward: float
    advantage: float
    finished: bool


def train_rl(
    job: Job,
    *,
    engine: Engine,
    tools: Tools,
    problem: Callable[[int], tuple[dict[str, Any], list[int]]],
    reward: Reward,
    config: RlConfig,
) -> None:
    """Runs GRPO steps; `problem(i)` gives (item, prompt ids) of problem i."""
    for step in range(job.start, job.schedule.steps):
        began = time.perf_counter()
        job.optimizers.follow(job.schedule, step)
        first = step * config.prompts_per_step
        items = [problem(first + i) for i in range(config.prompts_per_step)]
        job.model.eval()
        rollouts = sample_rollouts(engine, tools, items, reward, config, seed_step=step)
        sampling_seconds = time.perf_counter() - began
        job.model.train()
        loss = policy_gradient(job.model, rollouts)
        useful = sum(1 for r in rollouts if r.advantage != 0)
        if useful:
            job.optimizers.step()
            engine.weights_changed()
        sampled_tokens = sum(sum(r.sampled) for r in rollouts)
        job.end_step(
            {
                "step": step + 1,
                "reward": sum(r.reward for r in rollouts) / len(rollouts),
                "policy_loss": loss,
                "useful_fraction": useful / len(rollouts),
                "finished_fraction": sum(r.finished for r in rollouts) / len(rollouts),
                "sampled_tokens": sampled_tokens,
                "lr_factor": job.schedule.factor(step),
                "seconds": time.perf_counter() - began,
                "sampling_seconds": sampling_seconds,
                "tokens_per_second": sampled_tokens / sampling_seconds,
            }
        )


def sample_rollouts(
    engine: Engine,
    tools: Tools,
    items: list[tuple[dict[str, Any], list[int]]],
    reward: Reward,
    config: RlConfig,
    *,
    seed_step: int,
) -> list[Rollout]:
    """`samples_per_prompt` rewarded answers to every problem, group by group."""
    params = SamplingParams(
        max_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed * 1_000_003 + seed_step,
        n=config.samples_per_prompt,
    )
    groups = engine.generate([prompt for _, prompt in items], params, tools)
    rollouts: list[Rollout] = []
    for (item, prompt), group in zip(items, groups, strict=True):
        rewards = [reward(item, completion.ids) for completion in group]
        rollouts += group_rollouts(prompt, group, rewards)
    return rollouts


def group_rollouts(
    prompt: list[int], group: list[Completion], rewards: list[float]
) -> list[Rollout]:
    """Rollouts of one problem; a group of equal rewards has advantage exactly 0."""
    mean = sum(rewards) / len(rewards)
    equal = len(set(rewards)) == 1
    return [
        Rollout(
            ids=prompt + completion.ids,
            sampled=[False] * len(prompt) + completion.sampled_mask,
            reward=r,
            advantage=0.0 if equal else r - mean,
            finished=completion.finish_reason == "stop",
        )
        for completion, r in zip(group, rewards, strict=True)
    ]


def policy_gradient(model: Transformer, rollouts: list[Rollout]) -> float:
    """Gradients of -sum(advantage * log p) / (sampled tokens of the step); returns that loss.

    Rows without advantage add nothing to the gradient and are left out of the passes, but their
    tokens count in the normaliser, so the result does not depend on the micro-batch split.
    """
    tokens = sum(sum(r.sampled) for r in rollouts)
    rows = sorted((r for r in rollouts if r.advantage != 0), key=lambda r: -len(r.ids))
    device = model.cos.device
    total = 0.0
    while rows:
        count = max(1, MICRO_TOKENS // len(rows[0].ids))
        micro, rows = rows[:count], rows[count:]
        ids, _ = pad_right([r.ids for r in micro])
        weights = torch.zeros(ids.shape)
        for i, r in enumerate(micro):
            weights[i, : len(r.ids)] = torch.tensor(r.sampled).float() * (r.advantage / tokens)
        ids, weights = ids.to(device), weights.to(device)
        loss = model.loss_sum(ids[:, :-1], ids[:, 1:], weights[:, 1:])
        loss.backward()
        total += loss.item()
    return total
