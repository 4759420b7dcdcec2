"""Reinforcement: the GRPO family on problems whose answer can be checked, with tools at hand.

Each step samples a group of answers to every problem, rewards them, and raises the probability of
the better ones. An answer's advantage is its reward minus the mean of its group; with p the new
probability of a sampled token, r = p / (its probability when the step began), and A the advantage:

    loss       of a token                    advantage   divided by
    reinforce  -w A log p                    r - mean    all sampled tokens of the step
    grpo       -w min(r A, clip(r) A)        / std       its answer's tokens, then the answers
    dr_grpo    -w min(r A, clip(r) A)        r - mean    answers x max_new_tokens
    dapo       -w min(r A, clip(r) A)        / std       all sampled tokens of the step
    cispo      -w stop(min(r, high)) A log p / std       all sampled tokens of the step

clip(r) is between 1 - eps_low and high = 1 + eps_high. (grpo: DeepSeekMath, arXiv 2402.03300;
dr_grpo: arXiv 2503.20783; dapo: arXiv 2503.14476; cispo: MiniMax-M1, arXiv 2506.13585.) w is the
truncated importance weight: what the trainer thinks of the token over what the sampler thought when
it drew it, at most `importance_cap`; for reinforce the trainer's newest opinion, so it needs no r.
`kl_beta` adds k3 = e^d - d - 1, d = log reference - log p (Schulman 2020, "Approximating KL
divergence"). Divisors are those of the whole step, over all ranks, whatever the micro-batches.

Of several processes each samples, rewards and learns from every n-th problem of a step; what they
decide and log is of all of them. An answer depends on its problem's number alone, so that any
number of processes sees the same answers.

Tool output is read, never trained on; the end token is trained, so that stopping is learnt. Called
by `stages.rl`, which says what a problem and a reward are; this file knows neither runs nor tasks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fledge.engine import Completion, Engine, SamplingParams
from fledge.engine.scheduler import pad_right
from fledge.engine.tools import Tools
from fledge.model import Transformer
from fledge.train.loop import Job, recover
from fledge.train.metrics import Row
from fledge.train.watch import Verdict

MICRO_TOKENS = 4096  # padded tokens in one forward-backward pass
STD_FLOOR = 1e-4  # added to a group's deviation, as TRL does

Loss = Literal["reinforce", "grpo", "dr_grpo", "dapo", "cispo"]
BY_DEVIATION = ("grpo", "dapo", "cispo")  # whose advantages are divided by the group's deviation


@dataclass(frozen=True)
class Graded:
    """What an answer earned: the number that is learnt from, whether it is right, and the parts."""

    reward: float
    right: bool
    parts: dict[str, float] = field(default_factory=dict)


Item = dict[str, Any]  # a problem; only `Grader` looks into it
Grader = Callable[[Item, Completion], Graded]


@dataclass(frozen=True)
class RlConfig:
    """Shape of one step; the keys of [rl] in a recipe say more."""

    prompts_per_step: int
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    seed: int
    loss: Loss = "reinforce"
    eps_low: float = 0.2
    eps_high: float = 0.2
    kl_beta: float = 0.0
    importance_cap: float = 2.0
    updates_per_batch: int = 1
    refill_rounds: int = 0
    overlong: Literal["count", "mask"] = "count"
    reward_names: tuple[str, ...] = ()  # the parts of a reward that are logged by name


@dataclass(eq=False)
class Rollout:
    """One sampled answer: the whole row, which of its tokens were sampled, and what it earned."""

    ids: list[int]
    sampled: list[bool]  # same length as ids; the prompt and tool output are False
    logprobs: list[float]  # the sampler's, of the sampled tokens
    graded: Graded
    advantage: float
    finished: bool
    old: Tensor | None = None  # the trainer's log-probabilities before the step's first update
    reference: Tensor | None = None  # the frozen model's

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True)
class Batch:
    """The rollouts of a step: those that are learnt from, and all that were sampled, by group."""

    learnt: list[Rollout]
    groups: list[list[Rollout]]


# --------------------------------------------------------------------------------------- the losses


def token_losses(
    config: RlConfig, logprobs: Tensor, old: Tensor, sampler: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss of every sampled token [N], whether clipping or capping held it back [N]).

    All arguments are [N]; only `logprobs` is differentiated.
    """
    if config.loss == "reinforce":
        weight = (logprobs.detach() - sampler).exp()
        held = weight > config.importance_cap
        return -weight.clamp(max=config.importance_cap) * advantages * logprobs, held
    weight = (old - sampler).exp().clamp(max=config.importance_cap)
    ratio = (logprobs - old).exp()
    low, high = 1.0 - config.eps_low, 1.0 + config.eps_high
    if config.loss == "cispo":
        held = ratio.detach() > high
        return -weight * ratio.detach().clamp(max=high) * advantages * logprobs, held
    plain, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    return -weight * torch.minimum(plain, clipped), (clipped < plain).detach()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Of every token, an estimate of the divergence from the reference; never negative."""
    d = reference - logprobs
    return d.exp() - d - 1.0


def advantages(rewards: Sequence[float], loss: Loss) -> list[float]:
    """Of one group; exactly 0 where all rewards are equal."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    scale = statistics.stdev(rewards) + STD_FLOOR if loss in BY_DEVIATION else 1.0
    return [(reward - mean) / scale for reward in rewards]


def shares(config: RlConfig, rollouts: Sequence[Rollout], counts: tuple[int, int]) -> list[float]:
    """What each rollout's tokens are multiplied by; counts: (answers, tokens) of the whole step."""
    answers, tokens = map(float, counts)
    if config.loss == "grpo":
        return [1.0 / (answers * r.tokens) for r in rollouts]
    if config.loss == "dr_grpo":
        return [1.0 / (answers * config.max_new_tokens) for _ in rollouts]
    return [1.0 / tokens for _ in rollouts]


# ---------------------------------------------------------------------------------------- gradients


@dataclass
class Totals:
    """Sums over what the passes of one update saw, on this rank."""

    loss: float = 0.0
    tokens: int = 0
    held: int = 0
    kl: float = 0.0
    log_ratio: float = 0.0  # |trainer - sampler| in log-probability
    largest_log_ratio: float = 0.0


def policy_gradient(
    model: Transformer,
    rollouts: Sequence[Rollout],
    config: RlConfig,
    counts: tuple[int, int] | None = None,
    *,
    scale: float = 1.0,
) -> Totals:
    """Adds the gradients of `scale` x the step's loss.

    Rows that cannot contribute are left out of the passes, but count in the divisors: the result
    does not depend on the micro-batch split. `counts` is the whole step's where this is a part.
    """
    counts = counts or (len(rollouts), sum(r.tokens for r in rollouts))
    rows = [
        (rollout, share)
        for rollout, share in zip(rollouts, shares(config, rollouts, counts), strict=True)
        if rollout.advantage != 0 or config.kl_beta
    ]
    rows.sort(key=lambda row: -len(row[0].ids))
    totals = Totals()
    while rows:
        count = max(1, MICRO_TOKENS // len(rows[0][0].ids))
        micro, rows = rows[:count], rows[count:]
        _micro_gradient(model, micro, config, totals, scale)
    return totals


def _micro_gradient(
    model: Transformer,
    micro: list[tuple[Rollout, float]],
    config: RlConfig,
    totals: Totals,
    scale: float,
) -> None:
    rollouts = [rollout for rollout, _ in micro]
    lengths, device = [r.tokens for r in rollouts], model.cos.device

    def per_token(values: Sequence[float]) -> Tensor:
        each = torch.tensor(values, dtype=torch.float64)
        return each.repeat_interleave(torch.tensor(lengths)).to(device)

    share, advantage = per_token([s for _, s in micro]), per_token([r.advantage for r in rollouts])
    sampler = torch.tensor([x for r in rollouts for x in r.logprobs], dtype=torch.float64)
    sampler = sampler.to(device)

    def slopes(logprobs: Tensor) -> Tensor:
        logprobs = logprobs.double()
        if rollouts[0].old is None:  # the first pass of a step: nothing was updated yet
            for rollout, own in zip(rollouts, logprobs.split(lengths), strict=True):
                rollout.old = own.clone()
        old = torch.cat([r.old for r in rollouts if r.old is not None])
        logprobs.requires_grad_()
        each, held = token_losses(config, logprobs, old, sampler, advantage)
        if config.kl_beta:
            reference = torch.cat([r.reference for r in rollouts if r.reference is not None])
            divergence = k3(logprobs, reference)
            totals.kl += divergence.sum().item()
            each = each + config.kl_beta * divergence
        loss = (each * share).sum()
        apart = (old - sampler).abs()
        totals.loss += loss.item()
        totals.tokens += len(logprobs)
        totals.held += int(held.sum())
        totals.log_ratio += apart.sum().item()
        totals.largest_log_ratio = max(totals.largest_log_ratio, apart.max().item())
        return torch.autograd.grad(loss * scale, logprobs)[0]

    ids, targets, trained = padded(rollouts, device)
    model.add_policy_gradients(ids, targets, trained, slopes, temperature=config.temperature)


def padded(rollouts: Sequence[Rollout], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and which targets were sampled, each [rows, longest - 1]."""
    ids, _ = pad_right([r.ids for r in rollouts])
    trained = torch.zeros(ids.shape, dtype=torch.bool)
    for i, r in enumerate(rollouts):
        trained[i, : len(r.ids)] = torch.tensor(r.sampled)
    ids, trained = ids.to(device), trained.to(device)
    return ids[:, :-1], ids[:, 1:], trained[:, 1:]


@torch.no_grad()
def add_reference(model: Transformer, rollouts: Sequence[Rollout], temperature: float) -> None:
    """Fills in what the frozen model thinks of the sampled tokens."""
    for start in range(0, len(rollouts), 16):
        part = rollouts[start : start + 16]
        ids, targets, trained = padded(part, model.cos.device)
        for r, row, states, kept in zip(part, targets, model.hidden(ids), trained, strict=True):
            logits = model.lm_head(states[kept]).double() / temperature
            r.reference = logits.log_softmax(-1).gather(1, row[kept, None])[:, 0]


# ----------------------------------------------------------------------------------------- rollouts


def sample_groups(
    engine: Engine,
    tools: Tools,
    items: Sequence[tuple[Item, list[int]]],
    reward: Grader,
    config: RlConfig,
    *,
    numbers: Sequence[int],
) -> list[list[Rollout]]:
    """`samples_per_prompt` rewarded answers to each problem; `numbers` are the problems' own."""
    # each problem draws its own numbers: with one seed for all they would explore alike
    params = [
        SamplingParams(
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed * 1_000_003 + number,
            n=config.samples_per_prompt,
            logprobs_at_temperature=True,
        )
        for number in numbers
    ]
    groups = engine.generate([prompt for _, prompt in items], params, tools)
    return [
        group_rollouts(prompt, group, [reward(item, c) for c in group], config.loss)
        for (item, prompt), group in zip(items, groups, strict=True)
    ]


def group_rollouts(
    prompt: list[int], group: Sequence[Completion], graded: Sequence[Graded], loss: Loss
) -> list[Rollout]:
    """Rollouts of one problem."""
    found = advantages([g.reward for g in graded], loss)
    return [
        Rollout(
            ids=prompt + c.ids,
            sampled=[False] * len(prompt) + c.sampled_mask,
            logprobs=[x for x, s in zip(c.logprobs, c.sampled_mask, strict=True) if s],
            graded=g,
            advantage=a,
            finished=c.finish_reason == "stop",
        )
        for c, g, a in zip(group, graded, found, strict=True)
    ]


def collect(
    job: Job,
    step: int,
    sample: Callable[[Sequence[int]], list[list[Rollout]]],
    config: RlConfig,
) -> Batch:
    """The rollouts of a step, refilled where that is asked for.

    `sample(numbers of the problems)`. Without refill, groups of equal rewards stay among what is
    learnt from: they add nothing, but count in the divisors. With it they are dropped and replaced
    by new problems, at most `refill_rounds` times. Of several ranks each samples its share of the
    problems; how many are still missing is counted over all.
    """
    rounds = 1 + config.refill_rounds
    groups: list[list[Rollout]] = []
    missing = config.prompts_per_step
    for round_ in range(rounds):
        first = (step * rounds + round_) * config.prompts_per_step
        groups += sample([first + i for i in job.world.strided(missing)])
        useful = sum(any(r.advantage for r in group) for group in groups)
        job.world.wait()  # however long the slowest of them talks
        missing = config.prompts_per_step - round(
            job.world.sum_number(useful, job.model.cos.device)
        )
        if missing <= 0:
            break
    kept = groups
    if config.refill_rounds:
        kept = [group for group in groups if any(r.advantage for r in group)]
    learnt = [r for g in kept for r in g if r.finished or config.overlong == "count"]
    return Batch(learnt, groups)


# --------------------------------------------------------------------------------------------- loop


def train_rl(
    job: Job,
    *,
    engine: Engine,
    tools: Tools,
    problem: Callable[[int], tuple[Item, list[int]]],
    reward: Grader,
    config: RlConfig,
    reference: Transformer | None = None,
) -> None:
    """Runs the steps; `problem(i)` gives (item, prompt ids) of problem i of an endless order.

    `reference` is needed where `kl_beta` is above 0. A step whose loss or gradient is not a finite
    number is skipped; what follows is `train.loop.recover`'s business.
    """

    def sample(numbers: Sequence[int]) -> list[list[Rollout]]:
        items = [problem(i) for i in numbers]
        return sample_groups(engine, tools, items, reward, config, numbers=numbers) if items else []

    for step in range(job.start, job.schedule.steps):
        began = time.perf_counter()
        job.optimizers.follow(job.schedule, step)
        job.model.eval()
        batch = collect(job, step, sample, config)
        sampling_seconds = time.perf_counter() - began
        job.model.train()
        if config.kl_beta:
            assert reference is not None
            add_reference(reference, batch.learnt, config.temperature)
        row: Row = {"step": step + 1, **_update(job, batch, config, engine, step + 1)}
        row |= sampling_row(job, batch, config.reward_names)
        seconds = time.perf_counter() - began
        row |= {
            "lr_factor": job.schedule.factor(step),
            "seconds": seconds,
            "sampling_seconds": sampling_seconds,
            "tokens_per_second": row["sampled_tokens"] / sampling_seconds,
            "training_tokens_per_second": row["trained_tokens"] / (seconds - sampling_seconds),
        }
        recover(job, row, key="policy_loss")
        if "rolled_back_to" in row:
            engine.weights_changed()
        job.end_step(row)


def _update(job: Job, batch: Batch, config: RlConfig, engine: Engine, step: int) -> Row:
    """The optimizer steps of one batch of rollouts, and what was seen on the way."""
    world, device = job.world, job.model.cos.device
    counts = (
        round(world.sum_number(len(batch.learnt), device)),
        round(world.sum_number(sum(r.tokens for r in batch.learnt), device)),
    )
    row: Row = {"policy_loss": 0.0, "gradient_norm": 0.0, "trained_tokens": 0}
    for update in range(config.updates_per_batch):
        found = None
        while found is None:
            totals = policy_gradient(job.model, batch.learnt, config, counts, scale=job.scale.value)
            tokens = round(world.sum_number(totals.tokens, device))
            found = job.finish_gradients(totals.loss, tokens, step)
        if not tokens:
            break  # no group has an advantage: nothing to learn, and nothing to skip
        loss, norm = found
        # a policy's loss has no level of its own: only its being finite is judged
        finite = math.isfinite(loss)
        good = job.watch.judge(0.0 if finite else loss, norm) is Verdict.GOOD
        if good:
            job.optimizers.step()
            job.scale.good_step()
            engine.weights_changed()
        else:
            job.optimizers.zero_grad()
        row |= {"policy_loss": loss, "gradient_norm": norm, "trained_tokens": tokens}
        row["clip_fraction"] = world.sum_number(totals.held, device) / tokens
        if config.kl_beta:
            row["kl"] = world.sum_number(totals.kl, device) / tokens
        if update == 0:
            row["log_ratio"] = world.sum_number(totals.log_ratio, device) / tokens
            row["log_ratio_max"] = world.max_number(totals.largest_log_ratio, device)
        if not good:
            row["skipped"] = 1
            break
    return row


def sampling_row(job: Job, batch: Batch, names: Sequence[str]) -> Row:
    """What is logged of the answers themselves: over all that were sampled, on all ranks."""
    every = [r for group in batch.groups for r in group]
    sums: dict[str, float] = {
        "answers": len(every),
        "groups": len(batch.groups),
        "tokens": sum(r.tokens for r in every),
        "reward": sum(r.graded.reward for r in every),
        "right": sum(r.graded.right for r in every),
        "solved": sum(any(r.graded.right for r in group) for group in batch.groups),
        "equal": sum(not any(r.advantage for r in group) for group in batch.groups),
        "useful": sum(r.advantage != 0 for r in every),
        "finished": sum(r.finished for r in every),
        "surprise": -sum(sum(r.logprobs) for r in every),
    }
    for name in names:
        sums[f"reward_{name}"] = sum(r.graded.parts[name] for r in every)
    device = job.model.cos.device
    total = {name: job.world.sum_number(value, device) for name, value in sums.items()}
    return {
        "reward": total["reward"] / total["answers"],
        **{n: v / total["answers"] for n, v in total.items() if n.startswith("reward_")},
        "pass_at_1": total["right"] / total["answers"],
        "pass_at_k": total["solved"] / total["groups"],  # k = samples_per_prompt
        "zero_variance_fraction": total["equal"] / total["groups"],
        "useful_fraction": total["useful"] / total["answers"],
        "finished_fraction": total["finished"] / total["answers"],
        # -log p of what was drawn: its mean is the entropy of the next token, in nats
        "entropy": total["surprise"] / total["tokens"],
        "length": total["tokens"] / total["answers"],
        "length_max": job.world.max_number(max((r.tokens for r in every), default=0), device),
        "sampled_tokens": total["tokens"],
    }
