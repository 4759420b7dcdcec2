"""From a recipe and a machine to a plan: a value and a rule for every key, and what it will cost.

`resolve` fills every absent key. Numeric values depend on the recipe alone, so that a run can move
to another machine and mean the same; only execution keys (rows per device, threads, device) and the
estimates look at the hardware. Called by `fledge plan` and, once per run, by the pipeline. It reads
no data and trains nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

from fledge.config import KEYS, ModelConfig, ModelSection, Recipe, flat, recipe_to_dict
from fledge.errors import UserError
from fledge.plan import estimate, releases, scaling
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
    rehearsal: dict[str, Any] | None = None
    """Of a rehearsal: what it rehearses and by which factors it is smaller (plan/rehearsal.py)."""

    def replan(self, recipe: Recipe) -> Plan:
        """The plan of another recipe on the same hardware."""
        return dataclasses.replace(resolve(recipe, self.hardware), rehearsal=self.rehearsal)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, for resolved.json and `fledge plan --json`."""
        return {
            "model": dataclasses.asdict(self.model),
            "values": self.values,
            "rules": self.rules,
            "estimates": self.estimates,
            "hardware": self.hardware.to_dict(),
        } | ({"rehearsal": self.rehearsal} if self.rehearsal is not None else {})


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
    if recipe.hardware.device == "cpu" and hardware.device != "cpu":
        hardware = hardware.without_gpus()
    draft = _Draft(recipe)
    _plan_tokenizer(draft)
    model = _plan_model(draft)
    _plan_base(draft, model, hardware)
    _plan_chat(draft, "mid")
    _plan_chat(draft, "sft")
    _plan_rl(draft)
    _plan_evaluate(draft)
    _plan_execution(draft, model, hardware)
    for key in KEYS:
        if key not in draft.values:
            draft.put(key, None, _ABSENT.get(key, STANDARD))
    values = {key: draft.values[key] for key in KEYS}
    return Plan(
        model=model,
        values=values,
        rules={key: draft.rules[key] for key in KEYS},
        estimates=estimate.estimates(model, values, hardware),
        hardware=hardware,
    )


_ABSENT = {
    "mid.persona": "absent means the data's own identity",
    "sft.persona": "absent means the data's own identity",
    "mid.longest_reply": "absent means that none is left out",
    "sft.longest_reply": "absent means that none is left out",
    "data.source": "absent means the world, no text of your own",
    "base.minutes": "absent means that tokens or tokens_per_param say it",
    "base.law": "absent means the default ratio of tokens to parameters",
    "data.root": "absent means FLEDGE_DATA",
    "data.max_bytes": "absent means all of it",
    "data.max_chat_files": "absent means all of them",
    "hardware.target": "absent means that the recipe was made for any machine",
    "model.extras": "absent means the standard of the arch",
    "model.window_pattern": "absent means the standard of the arch",
}
_STANDARD = flat(recipe_to_dict(Recipe()))


class _Draft:
    """The values and rules found so far."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.given = flat(recipe_to_dict(recipe))
        self.values: dict[str, Any] = {}
        self.rules: dict[str, str] = {}
        self.is_world = recipe.data.source is None and recipe.data.world != NO_WORLD
        self.release = releases.release_of(recipe.model)
        self.published = releases.static_rules(self.release)
        for key, value in self.given.items():
            _check(key, value)

    def put(self, key: str, value: Any, rule: str) -> Any:
        """The user's value of a key, else the release's, else the planner's, with its rule."""
        value, rule = self.published.get(key, (value, rule))
        if key in self.given:
            value = self.given[key]
            rule = STANDARD if value == _STANDARD.get(key) else GIVEN
        _check(key, value)
        self.values[key], self.rules[key] = value, rule
        return value

    def put_batch(self, stage: str, value: int, rule: str) -> int:
        """Tokens per step of a stage: whole rows."""
        key, row = f"{stage}.global_batch_tokens", self.values["model.max_seq_len"]
        batch = self.put(key, value, rule)
        if batch % row:
            raise UserError(
                f"{key} = {batch}",
                f"a step is made of whole rows of {row} tokens",
                f"give a multiple of {row}, for example {scaling.round_up(batch, row)}",
            )
        return batch


def _plan_tokenizer(draft: _Draft) -> None:
    depth = draft.recipe.model.depth
    if draft.is_world:
        vocab_size = DEFAULTS.world_vocab_tiny if depth <= 2 else DEFAULTS.world_vocab
        vocab_rule = "a world's text has few different words: 1,024 up to depth 2, else 4,096"
        train_bytes = DEFAULTS.world_tokenizer_bytes // (4 if depth <= 2 else 1)
        bytes_rule = "enough to see every word of a world several times"
    else:
        vocab_size = DEFAULTS.small_vocab if depth < 8 else DEFAULTS.full_vocab
        vocab_rule = (
            "8,192 below depth 8, where a larger head costs more than it saves; else 32,768"
        )
        train_bytes = DEFAULTS.small_tokenizer_bytes if depth < 8 else DEFAULTS.full_tokenizer_bytes
        bytes_rule = "20 MB below depth 8, else 2 GB: more no longer changes the merges that matter"
    draft.put("tokenizer.train_bytes", train_bytes, bytes_rule)
    vocab_size = draft.put("tokenizer.vocab_size", vocab_size, vocab_rule)
    if vocab_size < DEFAULTS.smallest_vocab or vocab_size % 128:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}",
            "it must be a multiple of 128 that holds 256 bytes and the special tokens",
            f"give {max(DEFAULTS.smallest_vocab, scaling.round_up(vocab_size, 128))}",
        )


def _plan_model(draft: _Draft) -> ModelConfig:
    section = draft.recipe.model
    launch = section.rule == releases.OCT2025
    if launch and section.arch != "speedrun":
        raise UserError(
            f"model.rule = 'oct2025' with model.arch = {section.arch!r}",
            "nanochat's first network is arch speedrun without most of its extras",
            "add --model.arch speedrun",
        )
    own_width = 64 * section.depth if launch else scaling.width(section.depth)
    hidden = section.hidden_size or own_width
    head = section.head_dim or scaling.default_head_dim(section.depth, hidden, section.rule)
    if hidden % head or head % 2:
        raise UserError(
            f"model.head_dim = {head} with model.hidden_size = {hidden}",
            "heads must divide the width into equal, even parts",
            f"give a head_dim that divides {hidden}, for example {math.gcd(hidden, 64)}",
        )
    heads = hidden // head
    if heads % (section.num_key_value_heads or heads):
        raise UserError(
            f"model.num_key_value_heads = {section.num_key_value_heads}",
            f"it must divide the {heads} query heads",
            f"give a divisor of {heads}",
        )
    _check_extras(section)
    model = scaling.model_config(
        **dataclasses.asdict(section), vocab_size=draft.values["tokenizer.vocab_size"]
    )
    shape = {"max_seq_len": model.max_position_embeddings} | dataclasses.asdict(model)
    for key, rule in scaling.RULES.items():
        draft.put(f"model.{key}", shape[key], rule)
    return model


def _check_extras(section: ModelSection) -> None:
    """UserError for extras of another arch, an unknown one, or a pattern of other letters."""
    pattern, given = section.window_pattern, section.extras or {}
    if section.arch != "speedrun" and (given or pattern is not None):
        raise UserError(
            f"model.extras or model.window_pattern with model.arch = {section.arch!r}",
            "that network is Qwen3 as it stands",
            "add --model.arch speedrun, or leave them out",
        )
    for name, number in given.items():
        if name not in scaling.EXTRAS:
            near = difflib.get_close_matches(name, scaling.EXTRAS, n=1)
            raise UserError(
                f"there is no extra called {name!r}, which model.extras names",
                f"there are {', '.join(scaling.EXTRAS)}",
                f"did you mean {near[0]}?" if near else "name some of those",
            )
        if not math.isfinite(number) or number < 0 or (name == "sliding_window" and number < 1):
            raise UserError(
                f"model.extras.{name} = {number:g}",
                "it is 0, 1, or a number above zero",
                "give such a number, or leave it out",
            )
        if name in scaling.COUNTED and number != int(number):
            raise UserError(
                f"model.extras.{name} = {number:g}",
                "it counts tokens or rows of a table, so it is a whole number",
                f"give {math.ceil(number)}",
            )
    if pattern is not None and (not pattern or set(pattern) - {"S", "L"}):
        raise UserError(
            f"model.window_pattern = {pattern!r}",
            "it has one letter per layer, S (short) or L (long)",
            "give SSSL, say",
        )


def _tokens_per_param(
    path: str | None, model: ModelConfig, release: str | None
) -> tuple[float, str]:
    """Tokens per parameter of blocks and head: the default's, or those of a scaling law."""
    if path is None and release == releases.OCT:
        ratio = releases.OCT_TOKENS_PER_PARAM
        return ratio, f"{ratio:g} tokens per parameter, the embedding's too ({release})"
    if path is None:
        ratio = DEFAULTS.tokens_per_param
        return ratio, f"{ratio:g} tokens per parameter of blocks + head, as nanochat 2026"
    from fledge.plan import law  # not at the top: numpy takes a while

    fitted = law.load(path)
    size = scaling.count(model).scaling_parameters
    best = fitted.law.best_tokens_per_param(size)
    if best is None:
        raise UserError(
            f"{path} does not tell how many tokens are best",
            "in its runs the loss fell with size or with tokens, not with both",
            "give --base.tokens_per_param, or sweep over more values",
        )
    low, high = fitted.parameters
    beyond = "" if low <= size <= high else f", beyond its runs of {low:,.0f} to {high:,.0f}"
    return round(best, 2), f"the best for {size:,} parameters by {path}{beyond}"


def _plan_base(draft: _Draft, model: ModelConfig, hardware: Hardware) -> None:
    law, release = draft.recipe.base.law, draft.release
    ratio = draft.put("base.tokens_per_param", *_tokens_per_param(law, model, release))
    seq_len = model.max_position_embeddings
    by_release = releases.horizon(release, model, ratio)
    by_rule = by_release or int(ratio * scaling.count(model).scaling_parameters)
    multiplied = "all parameters" if by_release else "(blocks + head)"
    why = f"tokens_per_param x {multiplied}, in whole steps"
    if draft.recipe.base.minutes is not None:
        by_rule, why = _tokens_in(draft, model, hardware)
    wanted = draft.recipe.base.tokens or by_rule
    batch = draft.put_batch("base", *batch_tokens(wanted, seq_len))
    tokens = draft.put("base.tokens", max(1, wanted // batch) * batch, why)
    published = releases.rates(release, model, batch=batch, tokens=wanted)
    for key, (value, rule) in (DEFAULTS.rates(model) | published).items():
        draft.put(f"base.{key}", value, rule)
    _plan_schedule(draft, "base", tokens // batch)
    share = tokens // DEFAULTS.eval_share
    eval_tokens = min(max(share, DEFAULTS.least_eval_tokens), DEFAULTS.most_eval_tokens)
    draft.put(
        "base.eval_tokens",
        scaling.round_up(eval_tokens, seq_len),
        "a fiftieth of the training tokens, at least 16,384, at most 10.5M, in whole rows",
    )


def _tokens_in(draft: _Draft, model: ModelConfig, hardware: Hardware) -> tuple[int, str]:
    """Tokens that base.minutes are enough for, and how the speed is known."""
    base = draft.recipe.base
    assert base.minutes is not None
    for key in ("tokens", "tokens_per_param", "law"):
        if getattr(base, key) is not None:
            raise UserError(
                f"base.minutes and base.{key}",
                "both say how long base trains",
                "leave one of them out (on the command line: --base.KEY None)",
            )
    device = draft.recipe.hardware.device or hardware.device
    dtype = draft.recipe.hardware.dtype or _default_dtype(device, hardware)[0]
    _check_dtype(dtype, device)
    flops = estimate.training_rate(model, hardware, dtype)
    rate = flops / scaling.count(model).flops_per_token
    how = "an assumed rate; `fledge run` measures it first"
    if hardware.training_flops is not None:
        how = "the rate that was measured before the run"
    return round(rate * 60 * base.minutes), (
        f"{base.minutes:g} minutes at {rate:,.0f} tokens/s, {how}; in whole steps"
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
    steps, shape, times = max(1, steps), DEFAULTS.schedules[stage], 4 if stage == "rl" else 8
    warmup_steps = min(DEFAULTS.most_warmup_steps, math.ceil(DEFAULTS.warmup_share * steps))
    warmup_rule = "2 % of the steps, at most 40: a longer warm-up wastes a short run"
    save_every = min(DEFAULTS.most_save_every, math.ceil(steps / 8))
    for key, value, rule in (
        ("warmup_steps", warmup_steps, warmup_rule),
        ("cooldown_fraction", shape.cooldown, "house default of the stage"),
        ("final_lr_fraction", shape.final, "house default of the stage"),
        ("eval_every", math.ceil(steps / times), f"{times} measurements per stage"),
        ("save_every", save_every, "8 checkpoints per stage, never more than 1,000 steps apart"),
    ):
        draft.put(f"{stage}.{key}", value, rule)


def _plan_chat(draft: _Draft, stage: str) -> None:
    batch = draft.put_batch(stage, draft.values["base.global_batch_tokens"], "as base")
    share, most = DEFAULTS.chat_share[stage], DEFAULTS.most_chat_tokens[stage]
    tokens = draft.put(
        f"{stage}.tokens",
        max(1, round(min(share * draft.values["base.tokens"], most) / batch)) * batch,
        f"{share:.0%} of base's tokens, at most {most / 1e6:.0f}M, in whole steps",
    )
    draft.put(f"{stage}.lr_scale", DEFAULTS.lr_scale[stage], "house default of the stage")
    draft.put(f"{stage}.mixture", None, "absent means the data's own mixture")
    draft.put(f"{stage}.epochs", None, "absent means that mixture says it")
    if draft.values[f"{stage}.mixture"] and draft.values[f"{stage}.epochs"]:
        raise UserError(
            f"{stage}.mixture and {stage}.epochs",
            "both say how much of each kind is read",
            "leave one of them out",
        )
    _plan_schedule(draft, stage, tokens // batch)


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
    draft.put("rl.rewards", None, "absent means answer = 1: right, and stopped by itself")
    for key, why, fix in (
        ("temperature", "greedy answers to a problem are all alike: nothing to compare", "give 1"),
        ("updates_per_batch", "a step updates the model at least once", "give 1 or more"),
    ):
        if draft.values.get(f"rl.{key}", draft.given.get(f"rl.{key}")) == 0:
            raise UserError(f"rl.{key} = 0", why, fix)
    if draft.values["rl.samples_per_prompt"] < 2 and draft.values["rl.steps"]:
        raise UserError(
            "rl.samples_per_prompt = 1",
            "an answer is compared with the others to the same problem",
            "give 2 or more, or leave rl out with --rl.steps 0",
        )
    _plan_schedule(draft, "rl", draft.values["rl.steps"])


def _plan_evaluate(draft: _Draft) -> None:
    draft.put("evaluate.tasks", None, "absent means every task that the data offers")
    value, rule = None, "absent means every example"
    if not draft.is_world and draft.recipe.model.depth < 8:
        value, rule = 200, "200 of each task below depth 8: an interval of about 7 points"
    draft.put("evaluate.max_examples", value, rule)


def _plan_execution(draft: _Draft, model: ModelConfig, hardware: Hardware) -> None:
    seq_len = model.max_position_embeddings
    device = draft.put("hardware.device", hardware.device, "the best this machine has")
    on_cpu = device == "cpu"
    dtype = draft.put("hardware.dtype", *_default_dtype(device, hardware))
    _check_dtype(dtype, device)
    fits, checkpointed = (
        rows_that_fit(
            model,
            seq_len,
            budget_bytes=int(DEFAULTS.memory_share * hardware.device_memory_bytes),
            dtype=dtype,
            on_cpu=on_cpu,
            checkpoint_activations=again,
        )
        for again in (False, True)
    )
    again = draft.put(
        "hardware.checkpoint_activations",
        fits == 0 and checkpointed > 0,
        "only where not one row fits without: it costs a third more time",
    )
    fits = checkpointed if again else fits
    if on_cpu:
        # beyond this a CPU gains nothing: the weights are read from cache anyway
        fits = min(fits, DEFAULTS.cpu_tokens_per_pass // seq_len)
    for stage in ("base", "mid", "sft"):
        rows = draft.values[f"{stage}.global_batch_tokens"] // seq_len // hardware.device_count
        draft.put(
            f"{stage}.device_batch_size",
            math.gcd(max(1, rows), max(1, fits)),
            "the rows of a step, split evenly so that a pass fits in 60 % of the memory"
            + (" and holds at most 8,192 tokens on a CPU" if on_cpu else ""),
        )
    for stage in ("mid", "sft"):
        draft.put(f"{stage}.chatcore_every", *_chatcore_every(draft, stage, on_cpu))
    draft.put(
        "hardware.async_checkpoints",
        not on_cpu,
        "on GPUs; on a CPU it saves half a second a checkpoint and holds a copy of all state",
    )
    draft.put("hardware.threads", hardware.cpu_cores, "all cores this process may use")


def _chatcore_every(draft: _Draft, stage: str, on_cpu: bool) -> tuple[int, str]:
    """How often the exams are looked at while a stage trains."""
    depth = draft.recipe.model.depth
    if on_cpu or depth < 8:
        return 0, "not on the way on a CPU or below depth 8: it would cost more than it tells"
    steps = draft.values[f"{stage}.tokens"] // draft.values[f"{stage}.global_batch_tokens"]
    return math.ceil(steps / DEFAULTS.chatcore_looks), "four looks from depth 8 on"


def _check_dtype(dtype: str, device: str) -> None:
    """UserError for rounded products elsewhere than on a CPU."""
    if dtype == "bfloat16_products" and device != "cpu":
        raise UserError(
            f"hardware.dtype = bfloat16_products on {device}",
            "it is for CPUs, whose passes over memory are not faster in 16 bits",
            "give bfloat16, or leave hardware.dtype out",
        )


def _default_dtype(device: str, hardware: Hardware) -> tuple[str, str]:
    """What to compute in, and why."""
    if device == hardware.device == "cpu" and hardware.dtype == "bfloat16_products":
        return (
            hardware.dtype,
            "this kind of processor multiplies bfloat16 faster than float32 (docs/decisions/044)",
        )
    if device != "cuda" or hardware.device != "cuda":
        return "float32", "float32 on CPUs, and on Apple's GPUs, where nothing else was tried"
    if hardware.dtype == "float16":
        return "float16", "this GPU has no bfloat16: float16 with a loss scale"
    return "bfloat16", "bfloat16 on GPUs that have it; fp8 only when asked for"


_MAY_BE_ZERO = {
    *("steps", "warmup_steps", "cooldown_fraction", "final_lr_fraction", "seed", "samples"),
    *("matrix_lr", "embed_lr", "norm_lr", "weight_decay", "lr_scale", "temperature"),
    *(
        "dialogues",
        "chatcore_every",
        "row_variance",
        "eps_low",
        "eps_high",
        "kl_beta",
        "refill_rounds",
    ),
}
_SHARES = {"cooldown_fraction", "final_lr_fraction", "row_variance"}


def _check(key: str, value: Any) -> None:
    """A number below zero or too large, a share above one: refused by name before all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    name = key.partition(".")[2]
    may_be_zero = name in _MAY_BE_ZERO
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        raise UserError(
            f"{key} = {value}",
            "it must not be negative" if may_be_zero else "it must be above zero",
            f"give a larger number, or leave {key} out to let the planner choose",
        )
    if isinstance(value, int) and value >= 2**63:
        raise UserError(f"{key} = {value}", "it must fit in 64 bits", "give a smaller whole number")
    if name in _SHARES and value > 1:
        raise UserError(f"{key} = {value}", "it is a share", "give a number between 0 and 1")
    if key == "data.val_fraction" and value >= 1:
        raise UserError(f"{key} = {value}", "both splits need text", "give 0.01, say")
