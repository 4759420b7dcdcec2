"""From a recipe and a machine to a plan: a value and a rule for every key, and what it will cost.

`resolve` fills every absent key. Numeric values depend on the recipe alone, so that a run can move
to another machine and mean the same; only execution keys (rows per device, threads, device) and the
estimates look at the hardware. Called by `fledge plan` and, once per run, by the pipeline. It reads
no data and trains nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fledge.config import ModelConfig, Recipe, recipe_to_dict
from fledge.errors import UserError
from fledge.plan import estimate, scaling
from fledge.plan.defaults import DEFAULTS
from fledge.plan.hardware import Hardware
from fledge.plan.memory import rows_that_fit

GIVEN = "given in the recipe"
STANDARD = "fledge's default"
NO_WORLD = "none"
"""data.world of a recipe that is made for real text."""


@dataclass(frozen=True)
class Plan:
    """Everything that was derived: JSON-able by `to_dict`."""

    model: ModelConfig
    values: dict[str, Any]
    """ "section.key" -> value, for every key of the recipe."""
    rules: dict[str, str]
    """ "section.key" -> why it has that value."""
    estimates: dict[str, Any]
    """parameters, memory, disk, and per stage tokens, flops, seconds, dollars; see estimate.py."""
    hardware: Hardware

    def replan(self, recipe: Recipe) -> Plan:
        """The plan of another recipe on the same hardware."""
        return resolve(recipe, self.hardware)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, for resolved.json and `fledge plan --json`."""
        return {
            "model": dataclasses.asdict(self.model),
            "values": self.values,
            "rules": self.rules,
            "estimates": self.estimates,
            "hardware": self.hardware.to_dict(),
        }


def stage_seconds(plan: Plan) -> dict[str, float]:
    """Estimated seconds of each stage: the weights of the progress bar."""
    return {name: stage["seconds"] for name, stage in plan.estimates["stages"].items()}


def require_text(recipe: Recipe) -> None:
    """Raise UserError if the recipe is made for real text and none is given."""
    if recipe.data.source is None and recipe.data.world == NO_WORLD:
        raise UserError(
            "data.source is missing",
            "this recipe trains on real text and brings none",
            "add --data.source PATH, a folder of .txt, .md, .jsonl or .parquet files",
        )


def resolve(recipe: Recipe, hardware: Hardware) -> Plan:
    """The plan of a recipe on a machine. Raises UserError for values that cannot work."""
    draft = _Draft(recipe)
    model = _plan_model(draft)
    _plan_base(draft, model)
    _plan_chat(draft, "mid")
    _plan_chat(draft, "sft")
    _plan_rl(draft)
    _plan_evaluate(draft)
    _plan_execution(draft, model, hardware)
    draft.fill_rest()
    _check(draft.values)
    return Plan(
        model=model,
        values=draft.values,
        rules=draft.rules,
        estimates=estimate.estimates(model, draft.values, hardware),
        hardware=hardware,
    )


_ABSENT = {
    "data.source": "absent means the world, no text of your own",
    "data.root": "absent means FLEDGE_DATA",
    "data.max_bytes": "absent means all of it",
}


class _Draft:
    """The values and rules found so far."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.given = {
            f"{section}.{key}": value
            for section, table in recipe_to_dict(recipe).items()
            for key, value in table.items()
        }
        self.values: dict[str, Any] = {}
        self.rules: dict[str, str] = {}
        self.standard = {
            f"{section}.{key}": value
            for section, table in recipe_to_dict(Recipe()).items()
            for key, value in table.items()
        }
        self.is_world = recipe.data.source is None and recipe.data.world != NO_WORLD

    def put(self, key: str, value: Any, rule: str) -> Any:
        """The user's value of a key, or else the planner's with its rule."""
        chosen = self.given.get(key)
        self.values[key] = value if chosen is None else chosen
        self.rules[key] = rule if chosen is None else self._origin(key)
        return self.values[key]

    def _origin(self, key: str) -> str:
        return STANDARD if self.given[key] == self.standard.get(key) else GIVEN

    def fill_rest(self) -> None:
        """Keys that no rule touched: what the recipe says, or absent."""
        for field in dataclasses.fields(self.recipe):
            section = getattr(self.recipe, field.name)
            for key in (f.name for f in dataclasses.fields(section)):
                name = f"{field.name}.{key}"
                if name not in self.values:
                    value = self.given.get(name)
                    self.values[name] = value
                    self.rules[name] = _ABSENT[name] if value is None else self._origin(name)
        order = [
            f"{f.name}.{k.name}"
            for f in dataclasses.fields(self.recipe)
            for k in dataclasses.fields(getattr(self.recipe, f.name))
        ]
        self.values = {key: self.values[key] for key in order}
        self.rules = {key: self.rules[key] for key in order}


def _plan_model(draft: _Draft) -> ModelConfig:
    section = draft.recipe.model
    if section.depth < 1:
        raise UserError(
            f"model.depth = {section.depth}", "a network has at least one layer", "give 1 or more"
        )
    for key in ("max_seq_len", "hidden_size", "head_dim", "intermediate_size"):
        _positive(draft.given, f"model.{key}")
    vocab_size, vocab_rule = _vocab_size(section.depth, is_world=draft.is_world)
    vocab_size = draft.put("tokenizer.vocab_size", vocab_size, vocab_rule)
    if vocab_size < DEFAULTS.smallest_vocab or vocab_size % 128:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}",
            "it must be a multiple of 128 that holds 256 bytes and the special tokens",
            f"give {max(DEFAULTS.smallest_vocab, scaling.round_up(vocab_size, 128))}",
        )
    train_bytes, bytes_rule = _train_bytes(section.depth, is_world=draft.is_world)
    draft.put("tokenizer.train_bytes", train_bytes, bytes_rule)
    hidden = section.hidden_size or scaling.hidden_size(section.depth)
    head = section.head_dim or min(scaling.head_dim(section.depth), hidden)
    if hidden % head or head % 2:
        raise UserError(
            f"model.head_dim = {head} with model.hidden_size = {hidden}",
            "heads must divide the width into equal, even parts",
            f"give a head_dim that divides {hidden}, for example {math.gcd(hidden, 64)}",
        )
    heads, kv_heads = hidden // head, section.num_key_value_heads
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise UserError(
            f"model.num_key_value_heads = {kv_heads}",
            f"it must divide the {heads} query heads",
            f"give a divisor of {heads}",
        )
    model = scaling.model_config(
        section.depth,
        vocab_size=vocab_size,
        seq_len=section.max_seq_len,
        hidden=section.hidden_size,
        intermediate=section.intermediate_size,
        head=head,
        key_value_heads=section.num_key_value_heads,
        tie=section.tie_word_embeddings,
        rope_theta=section.rope_theta,
        arch=section.arch,
    )
    for key, rule in scaling.RULES.items():
        name = key.partition(".")[2]
        draft.put(
            key,
            model.max_position_embeddings if name == "max_seq_len" else getattr(model, name),
            rule,
        )
    return model


def _vocab_size(depth: int, *, is_world: bool) -> tuple[int, str]:
    if is_world:
        size = DEFAULTS.world_vocab_tiny if depth <= 2 else DEFAULTS.world_vocab
        return size, "a world's text has few different words: 1,024 up to depth 2, else 4,096"
    size = DEFAULTS.small_vocab if depth < 8 else DEFAULTS.full_vocab
    return (
        size,
        "8,192 below depth 8, where a larger head costs more than it saves; else 32,768",
    )


def _train_bytes(depth: int, *, is_world: bool) -> tuple[int, str]:
    if is_world:
        size = DEFAULTS.world_tokenizer_bytes // (4 if depth <= 2 else 1)
        return size, "enough to see every word of a world several times"
    small = depth < 8
    size = DEFAULTS.small_tokenizer_bytes if small else DEFAULTS.full_tokenizer_bytes
    return size, "20 MB below depth 8, else 2 GB: more no longer changes the merges that matter"


def _plan_base(draft: _Draft, model: ModelConfig) -> None:
    counts = scaling.count(model)
    seq_len = model.max_position_embeddings
    base = draft.recipe.base
    for key in ("tokens", "tokens_per_param", "global_batch_tokens"):
        _positive(draft.given, f"base.{key}")
    ratio = draft.put(
        "base.tokens_per_param",
        DEFAULTS.tokens_per_param,
        f"{DEFAULTS.tokens_per_param:g} tokens per parameter of blocks + head, as nanochat 2026",
    )
    wanted = base.tokens or int(ratio * counts.scaling_parameters)
    batch, batch_rule = batch_tokens(wanted, seq_len)
    batch = draft.put("base.global_batch_tokens", batch, batch_rule)
    if batch % seq_len:
        raise UserError(
            f"base.global_batch_tokens = {batch}",
            f"a step is made of whole rows of {seq_len} tokens",
            f"give a multiple of {seq_len}, for example {scaling.round_up(batch, seq_len)}",
        )
    steps = max(1, round(wanted / batch))
    draft.put("base.tokens", steps * batch, "tokens_per_param x (blocks + head), in whole steps")
    steps = max(1, draft.values["base.tokens"] // batch)
    lrs = DEFAULTS.learning_rates(model, batch)
    draft.put("base.matrix_lr", lrs.matrix, lrs.matrix_rule)
    draft.put("base.embed_lr", lrs.embed, lrs.embed_rule)
    draft.put("base.head_lr", lrs.head, lrs.head_rule)
    draft.put("base.norm_lr", lrs.norm, lrs.norm_rule)
    if model.num_hidden_layers < 8:
        draft.put(
            "base.weight_decay",
            DEFAULTS.small_weight_decay,
            "none below depth 8: a short run has nothing to forget",
        )
    else:
        draft.put("base.weight_decay", DEFAULTS.weight_decay, "house default for Muon")
    _plan_schedule(draft, "base", steps)
    share = draft.values["base.tokens"] // DEFAULTS.eval_share
    eval_tokens = min(max(share, DEFAULTS.least_eval_tokens), DEFAULTS.most_eval_tokens)
    draft.put(
        "base.eval_tokens",
        scaling.round_up(eval_tokens, seq_len),
        "a fiftieth of the training tokens, at least 16,384, at most 10.5M, in whole rows",
    )


def batch_tokens(tokens: int, seq_len: int) -> tuple[int, str]:
    """Tokens per step: nanochat's power law, but a short run still gets enough steps."""
    power_law = 2**19 * (tokens / DEFAULTS.d12_tokens) ** 0.383
    target = min(power_law, tokens / DEFAULTS.least_steps)
    batch = 2 ** round(math.log2(max(target, DEFAULTS.least_batch_tokens)))
    return (
        scaling.round_up(batch, seq_len),
        "2^19 x (tokens / 1.32B)^0.383 to a power of two (nanochat), but small enough for "
        f"{DEFAULTS.least_steps:,} steps and at least {DEFAULTS.least_batch_tokens:,}",
    )


def _plan_schedule(draft: _Draft, stage: str, steps: int) -> None:
    """Warm-up, cool-down, and how often to measure and save."""
    shape = DEFAULTS.schedules[stage]
    draft.put(
        f"{stage}.warmup_steps",
        min(DEFAULTS.most_warmup_steps, math.ceil(DEFAULTS.warmup_share * steps)),
        "2 % of the steps, at most 40: a longer warm-up wastes a short run",
    )
    draft.put(f"{stage}.cooldown_fraction", shape.cooldown, "house default of the stage")
    draft.put(f"{stage}.final_lr_fraction", shape.final, "house default of the stage")
    times = 4 if stage == "rl" else 8
    draft.put(f"{stage}.eval_every", math.ceil(steps / times), f"{times} measurements per stage")
    draft.put(
        f"{stage}.save_every",
        min(DEFAULTS.most_save_every, math.ceil(steps / 8)),
        "8 checkpoints per stage, never more than 1,000 steps apart",
    )


def _plan_chat(draft: _Draft, stage: str) -> None:
    for key in ("tokens", "global_batch_tokens"):
        _positive(draft.given, f"{stage}.{key}")
    base_tokens, base_batch = (
        draft.values["base.tokens"],
        draft.values["base.global_batch_tokens"],
    )
    seq_len = draft.values["model.max_seq_len"]
    batch = draft.put(f"{stage}.global_batch_tokens", base_batch, "as base")
    if batch % seq_len:
        raise UserError(
            f"{stage}.global_batch_tokens = {batch}",
            f"a step is made of whole rows of {seq_len} tokens",
            f"give a multiple of {seq_len}, for example {scaling.round_up(batch, seq_len)}",
        )
    share, most = DEFAULTS.chat_share[stage], DEFAULTS.most_chat_tokens[stage]
    tokens = draft.put(
        f"{stage}.tokens",
        max(1, round(min(share * base_tokens, most) / batch)) * batch,
        f"{share:.0%} of base's tokens, at most {most / 1e6:.0f}M, in whole steps",
    )
    draft.put(f"{stage}.lr_scale", DEFAULTS.lr_scale[stage], "house default of the stage")
    _plan_schedule(draft, stage, max(1, tokens // batch))
    if f"{stage}.mixture" not in draft.given:
        draft.values[f"{stage}.mixture"] = None
        draft.rules[f"{stage}.mixture"] = "absent means the data's own mixture"


def _plan_rl(draft: _Draft) -> None:
    small = draft.recipe.model.depth <= 2
    for key, value, rule in (
        ("steps", 4 if small else 40, "40; 4 up to depth 2"),
        ("prompts_per_step", 16, "16 different problems per step"),
        ("samples_per_prompt", 8, "groups of 8: enough that most hold both right and wrong"),
        ("max_new_tokens", 128, "a worked answer with one tool call is below 100 tokens"),
        ("temperature", 1.0, "sample from the model as it is"),
        ("lr_scale", DEFAULTS.lr_scale["rl"], "house default of the stage"),
    ):
        draft.put(f"rl.{key}", value, rule)
    _plan_schedule(draft, "rl", max(1, draft.values["rl.steps"]))


def _plan_evaluate(draft: _Draft) -> None:
    if "evaluate.tasks" not in draft.given:
        draft.values["evaluate.tasks"] = None
        draft.rules["evaluate.tasks"] = "absent means every task that the data offers"
    if draft.is_world or draft.recipe.model.depth >= 8:
        rule = "absent means every example"
        value = None
    else:
        value, rule = 200, "200 of each task below depth 8: an interval of about 7 points"
    draft.put("evaluate.max_examples", value, rule)


def _plan_execution(draft: _Draft, model: ModelConfig, hardware: Hardware) -> None:
    seq_len = model.max_position_embeddings
    on_cpu = hardware.device == "cpu"
    fits = rows_that_fit(
        model,
        seq_len,
        budget_bytes=int(DEFAULTS.memory_share * hardware.device_memory_bytes),
        bytes_per_value=4 if on_cpu else 2,
    )
    if on_cpu:
        # beyond this a CPU gains nothing: the weights are read from cache anyway
        fits = min(fits, max(1, DEFAULTS.cpu_tokens_per_pass // seq_len))
    for stage in ("base", "mid", "sft"):
        rows = draft.values[f"{stage}.global_batch_tokens"] // seq_len
        rows = max(1, rows // hardware.device_count)
        draft.put(
            f"{stage}.device_batch_size",
            max(1, math.gcd(rows, max(1, fits)) if fits and rows % fits else min(rows, fits)),
            "the rows of a step, split evenly so that a pass fits in 60 % of the memory"
            + (" and holds at most 8,192 tokens on a CPU" if on_cpu else ""),
        )
    draft.put("hardware.device", hardware.device, "the best this machine has")
    draft.put("hardware.threads", hardware.cpu_cores, "all cores this process may use")


def _positive(given: dict[str, Any], key: str) -> None:
    value = given.get(key)
    if value is not None and value <= 0:
        raise UserError(
            f"{key} = {value}", "it must be above zero", "give a larger number or leave it out"
        )


# keys that are counts of something that may be none
_MAY_BE_ZERO = {"rl.steps", "warmup_steps", "seed", "samples", "weight_decay", "temperature"} | {
    "lr_scale",
    "final_lr_fraction",
    "cooldown_fraction",
    "matrix_lr",
    "embed_lr",
    "norm_lr",
}
_SHARES = {"cooldown_fraction", "final_lr_fraction"}


def _check(values: dict[str, Any]) -> None:
    """Numbers below zero, shares above one: refused by name before anything starts."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = key.partition(".")[2]
        least_is_zero = key in _MAY_BE_ZERO or name in _MAY_BE_ZERO
        if not math.isfinite(value) or value < 0 or (value == 0 and not least_is_zero):
            raise UserError(
                f"{key} = {value}",
                "it must not be negative" if least_is_zero else "it must be above zero",
                f"give another number, or leave {key} out to let the planner choose",
            )
        if isinstance(value, int) and value >= 2**63:
            raise UserError(
                f"{key} = {value}", "it must fit in 64 bits", "give a smaller whole number"
            )
        if name in _SHARES and value > 1:
            raise UserError(f"{key} = {value}", "it is a share", "give a number between 0 and 1")
    fraction = values["data.val_fraction"]
    if not 0 < fraction < 1:
        raise UserError(
            f"data.val_fraction = {fraction}", "both splits need text", "give 0.01, say"
        )
