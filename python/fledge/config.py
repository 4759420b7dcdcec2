"""Every number and name a person can decide: frozen dataclasses, TOML in and out.

A `Recipe` is what the user asked for. A key that is `None` means "the planner decides"
(`fledge.plan.planner` turns a recipe into a `Plan`). `ModelConfig` is the shape of one network in
Hugging Face names. Keys tagged *execution* change how fast or where a run happens, never its
numbers, and so never enter a fingerprint. This module reads and writes TOML; it never derives a
number and never imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fledge.errors import UserError

STAGES = ("tokenizer", "base", "mid", "sft", "rl", "evaluate")
TRAINED_STAGES = ("base", "mid", "sft", "rl")


def execution(default: Any) -> Any:
    """A field that changes speed or place only; it stays out of every fingerprint."""
    return field(default=default, metadata={"execution": True})


def later(default: Any) -> Any:
    """A field that came after the first runs: in fingerprints only where it is not the default, so
    that a run made before there was such a key goes on. In a config.json it may be missing."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one Transformer, in Hugging Face names (Qwen3 when arch is "qwen3").

    The fields below `arch` belong to arch "speedrun" alone; `fledge.model.extras` has the formulas,
    and with all of them as they stand here the network is Qwen3.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    arch: str = "qwen3"
    hidden_act: str = "silu"
    """silu: the gated layer of Qwen3; relu2: down(relu(up(x))^2)."""
    norm_weights: bool = True
    embedding_norm: bool = False
    qk_scale: float = 1.0
    final_logit_softcapping: float | None = None
    window_pattern: str = "L"
    """One letter per layer, repeated: S looks back `sliding_window` tokens, L at all of them."""
    sliding_window: int | None = None
    value_embeddings: bool = False
    residual_scalars: bool = False
    embedding_scalars: bool = False
    smear: bool = False
    backout: bool = False
    bigram_rows: int = later(0)
    """Rows of the table of hashed pairs of tokens; 0 = there is none."""

    def __post_init__(self) -> None:
        assert self.num_attention_heads % self.num_key_value_heads == 0, self
        assert self.head_dim % 2 == 0, self
        assert self.hidden_act in ("silu", "relu2"), self
        assert self.sliding_window is not None or "S" not in self.window_pattern, self
        assert type(self.bigram_rows) is int and self.bigram_rows >= 0, self

    def extras(self) -> dict[str, Any]:
        """The extras of arch "speedrun" that differ from Qwen3: field name -> value."""
        names = [f.name for f in fields(self)]
        own = names[names.index("arch") + 1 :]
        standard = {f.name: f.default for f in fields(self)}
        return {n: getattr(self, n) for n in own if getattr(self, n) != standard[n]}


@dataclass(frozen=True)
class ModelSection:
    """[model]: the network. `depth` alone is enough."""

    depth: int = 4
    """Number of Transformer layers; the one dial from which every other size follows."""
    rule: Literal["auto", "oct2025"] = execution("auto")
    """How the rest follows from depth: auto is fledge's own (nanochat's of 2026 with arch speedrun
    from depth 8 on), oct2025 is nanochat as it was launched in October 2025."""
    arch: Literal["qwen3", "speedrun"] = "qwen3"
    """Architecture. qwen3 is exactly Qwen3 and loads in transformers, vLLM and llama.cpp; speedrun
    adds what makes a small model learn fastest and brings its own code for transformers."""
    max_seq_len: int | None = None
    """Training context in tokens, exported as max_position_embeddings."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer."""
    head_dim: int | None = None
    """Width of one attention head."""
    num_key_value_heads: int | None = None
    """Key/value heads (fewer than query heads = grouped-query attention)."""
    tie_word_embeddings: bool | None = None
    """Share the embedding matrix with the output head."""
    rope_theta: float | None = None
    """Base of the rotary position frequencies."""
    extras: dict[str, float] | None = None
    """Extras of arch speedrun that differ from its standard, as in { smear = 0, qk_scale = 1 }.
    One of them is in no standard: { bigram_rows = 32768 }, a table of pairs of tokens."""
    window_pattern: str | None = None
    """Arch speedrun: a letter per layer, repeated; S looks back sliding_window tokens, L at all."""


@dataclass(frozen=True)
class DataSection:
    """[data]: what the model is raised on."""

    source: str | None = None
    """Real text: a folder or file of .txt .md .jsonl .parquet (also .gz .zst), or of the hub
    fineweb-edu, climbmix, hub:OWNER/NAME[/FOLDER][@REVISION]; absent = a world."""
    world: str = "almanac"
    """The built-in world (almanac, village) or the path of a CSV table of your own facts."""
    seed: int = 0
    """Seed of the world, of the train/validation split and of the document order."""
    chats: Literal["files", "smoltalk"] = later("files")
    """Where chats come from: the files in sft/ of data.root, or SmolTalk of the hub (460,000
    conversations, about 1 GB)."""
    max_chat_files: int | None = later(None)
    """Read at most this many of SmolTalk's files; absent = all of them."""
    root: str | None = None
    """Folder with task files (gsm8k, mmlu, arc, humaneval, sft); default: FLEDGE_DATA."""
    val_fraction: float = 0.01
    """Share of the documents of `source` kept for validation."""
    max_bytes: int | None = None
    """Use at most this many bytes of `source`; absent = all of it (beyond 400 MB as shards under
    FLEDGE_HOME)."""


@dataclass(frozen=True)
class TokenizerSection:
    """[tokenizer]: byte-level BPE."""

    vocab_size: int | None = None
    """Bytes + merges + special tokens + padding, a multiple of 128."""
    pattern: Literal["qwen2", "llama3", "gpt4-2"] = "qwen2"
    """How text is split before merging (qwen2: single digits)."""
    train_bytes: int | None = None
    """How many bytes of the training documents the merges are learnt from."""


@dataclass(frozen=True)
class BaseSection:
    """[base]: pretraining on raw text."""

    tokens: int | None = None
    """Tokens to train on; wins over tokens_per_param."""
    minutes: float | None = later(None)
    """Train for about this long instead: the speed of this network on this machine is measured
    first, and `tokens` is what it can do in that time. mid and sft add their share of it."""
    tokens_per_param: float | None = None
    """Tokens per matrix parameter (blocks + head) when `tokens` is absent."""
    law: str | None = execution(None)
    """law.json of a `fledge sweep`: tokens_per_param then is the best of that scaling law."""
    global_batch_tokens: int | None = None
    """Tokens per optimizer step, over all devices."""
    device_batch_size: int | None = execution(None)
    """Rows per device and forward pass (absent = the planner's choice for this machine)."""
    matrix_lr: float | None = None
    """Learning rate of Muon, for the matrices of the blocks."""
    embed_lr: float | None = None
    """Learning rate of AdamW for the embedding (and tied head)."""
    head_lr: float | None = None
    """Learning rate of AdamW for the untied output head."""
    norm_lr: float | None = None
    """Learning rate of AdamW for the norm weights."""
    weight_decay: float | None = None
    """Weight decay of the matrices (decoupled, multiplied by the learning rate)."""
    row_variance: float | None = None
    """How slowly Muon's running mean square of each row forgets (NorMuon); 0 turns it off."""
    adamw: Literal["2025", "2026"] | None = later(None)
    """Betas and decay of AdamW's groups: nanochat's of 2025 (no decay) or those of 2026; absent =
    2026 with arch speedrun, else 2025."""
    cooldown_shape: Literal["linear", "sqrt"] | None = None
    """How the learning rate falls at the end: linear, or as 1 - sqrt."""
    decay_schedule: Literal["constant", "cosine"] | None = None
    """Weight decay over the steps: constant, or a cosine down to 0."""
    momentum_schedule: Literal["constant", "warm", "rise"] | None = None
    """Muon's momentum: 0.95; or 0.85 rising to 0.97 in 400 steps and falling to 0.90 at the end;
    or (rise) 0.85 rising to 0.95 in 300 steps."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    cooldown_fraction: float | None = None
    """Share of the steps over which the learning rate falls linearly."""
    final_lr_fraction: float | None = None
    """Learning rate at the very end, as a share of the peak."""
    eval_every: int | None = None
    """Steps between two measurements of validation bits per byte."""
    eval_tokens: int | None = None
    """Validation tokens for one measurement."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the initial weights."""


@dataclass(frozen=True)
class ChatSection:
    """Training on conversations; the shape of [mid] and [sft]."""

    tokens: int | None = None
    """Tokens to train on."""
    global_batch_tokens: int | None = None
    """Tokens per optimizer step, over all devices."""
    device_batch_size: int | None = execution(None)
    """Rows per device and forward pass (absent = as base)."""
    lr_scale: float | None = None
    """Learning rates as a share of base's peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    cooldown_fraction: float | None = None
    """Share of the steps over which the learning rate falls linearly."""
    final_lr_fraction: float | None = None
    """Learning rate at the very end, as a share of the peak."""
    mixture: dict[str, float] | None = None
    """Weight of each kind of conversation (prose = base's text); absent = the data's own mix."""
    epochs: dict[str, float] | None = later(None)  # noqa: RUF009
    """Instead of mixture: passes over each kind, as in { gsm8k = 2, chat = 1 }; `tokens` says how
    far it goes."""
    files: tuple[str, ...] = ()
    """Extra JSONL files of conversations in OpenAI's message format."""
    persona: str | None = later(None)
    """Who the assistant is: warm, terse, playful or a .toml file; a kind of conversation that takes
    the place of identity (data/personas.py)."""
    long_chats: Literal["start", "end", "drop"] = later("start")
    """Of a conversation beyond the context: its first whole exchanges, its last, or nothing."""
    solutions: Literal["whole", "steps"] = later("whole")
    """How GSM8K is solved: whole, or in steps: its calculations without the words between them."""
    longest_reply: int | None = later(None)
    """Chats in which the assistant says more characters than this at once are left out; absent =
    none are."""
    eval_every: int | None = None
    """Steps between two measurements of validation loss."""
    chatcore_every: int | None = execution(None)
    """Steps between two looks at ChatCORE while the stage trains; 0 = none. No weight changes."""
    chatcore_examples: int = execution(64)
    """Questions of each task in such a look."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the order of the conversations."""


@dataclass(frozen=True)
class RlSection:
    """[rl]: reinforcement on problems whose answer can be checked, with the python tool."""

    steps: int | None = None
    """Optimizer steps; 0 skips the stage."""
    prompts_per_step: int | None = None
    """Different problems per step."""
    samples_per_prompt: int | None = None
    """Rollouts per problem: the group whose mean reward is the baseline."""
    max_new_tokens: int | None = None
    """Longest rollout in tokens."""
    temperature: float | None = None
    """Sampling temperature of the rollouts."""
    loss: Literal["reinforce", "grpo", "dr_grpo", "dapo", "cispo"] = later("reinforce")
    """What is made small (formulas: train/rl.py); they differ in advantage, divisor and clip."""
    eps_low: float = later(0.2)
    """How far the ratio of new to old probability may fall before it is clipped."""
    eps_high: float = later(0.28)
    """How far it may rise (DAPO's clip-higher); both matter from updates_per_batch = 2 on."""
    kl_beta: float = later(0.0)
    """Weight of the divergence from sft's model (k3); 0 needs no second model."""
    importance_cap: float = later(2.0)
    """Largest weight of a token that the trainer thinks likelier than the sampler did."""
    updates_per_batch: int = later(1)
    """Optimizer steps on one batch of rollouts."""
    refill_rounds: int = later(0)
    """How often groups of equal rewards are dropped and replaced by new problems; 0 keeps them."""
    overlong: Literal["count", "mask"] = later("count")
    """Answers cut at max_new_tokens: learnt from like others, or left out."""
    rewards: dict[str, float] | None = later(None)  # noqa: RUF009
    """Weight of each reward: answer, format, stops, brief, tests, or FILE.py:FUNCTION of your own;
    absent = answer alone."""
    files: tuple[str, ...] = later(())
    """JSONL files of your own problems (question, and answer or tests); absent = the data's own."""
    lr_scale: float | None = None
    """Learning rates as a share of base's peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    cooldown_fraction: float | None = None
    """Share of the steps over which the learning rate falls linearly."""
    final_lr_fraction: float | None = None
    """Learning rate at the very end, as a share of the peak."""
    eval_every: int | None = None
    """Steps between two measurements on held-out problems."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the problems' order and of the sampling."""


@dataclass(frozen=True)
class EvaluateSection:
    """[evaluate]: the exams at the end."""

    tasks: tuple[str, ...] | None = None
    """Task names; absent = every task that the data offers."""
    stages: tuple[str, ...] = ("mid", "sft", "rl")
    """Whose last checkpoint is examined."""
    max_examples: int | None = None
    """At most this many examples of a task; absent = all."""
    samples: int = 8
    """Transcripts per task that the report shows."""
    dialogues: int = later(64)
    """How many unseen dialogues, probes and facts show how good the chat is; 0 leaves it out."""


@dataclass(frozen=True)
class HardwareSection:
    """[hardware]: where it runs; never part of the result."""

    device: str | None = execution(None)
    """cpu, cuda or mps; absent = the best there is."""
    threads: int | None = execution(None)
    """CPU threads; absent = all cores."""
    dtype: Literal["float32", "bfloat16", "float16", "fp8", "bfloat16_products"] | None = execution(
        None
    )
    """What products are computed in (weights and optimizer state are float32 always);
    bfloat16_products, for CPUs, keeps all else than products in float32. Absent = bfloat16 on GPUs
    that have it, float16 on older ones, bfloat16_products on CPUs that are faster so, else
    float32."""
    checkpoint_activations: bool | None = execution(None)
    """Keep only the input of each layer and compute the rest again in the backward pass: a third
    more time for much less memory, the same numbers; absent = where not one row fits without."""
    async_checkpoints: bool | None = execution(None)
    """Write checkpoints in the background while training goes on, from a copy in memory; absent =
    on GPUs; on a CPU the second copy costs more memory than the half second it saves is worth."""
    target: str | None = execution(None)
    """What the recipe was made for, as in --hardware 8xh100; only `--rehearse` reads it, to say
    what the whole run will take there."""


@dataclass(frozen=True)
class Recipe:
    """What a person decides about a run; everything else follows from it."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    base: BaseSection = field(default_factory=BaseSection)
    mid: ChatSection = field(default_factory=ChatSection)
    sft: ChatSection = field(default_factory=ChatSection)
    rl: RlSection = field(default_factory=RlSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    hardware: HardwareSection = field(default_factory=HardwareSection)


SECTIONS: dict[str, type] = typing.get_type_hints(Recipe)
"""Name -> dataclass of every section, in the order of the recipe."""

KEYS = tuple(f"{name}.{key.name}" for name, kind in SECTIONS.items() for key in fields(kind))
"""Every key as "section.key"."""

EXECUTION_KEYS = frozenset(
    f"{name}.{key.name}"
    for name, kind in SECTIONS.items()
    for key in fields(kind)
    if key.metadata.get("execution")
)
"""The keys that change only speed or place."""

LATER_KEYS: dict[str, Any] = {
    f"{name}.{key.name}": key.default
    for name, kind in SECTIONS.items()
    for key in fields(kind)
    if key.metadata.get("later")
}
"""Those that came later, with their defaults."""

NUMERIC_KEYS = frozenset(KEYS) - EXECUTION_KEYS - {"data.source", "data.root"}
"""The keys that fingerprints are taken over. Where the data lies is none of them: its manifest says
what it is, so that a folder may move."""


def builtin_recipes() -> dict[str, str]:
    """Name -> TOML text of the recipes that come with fledge."""
    folder = resources.files("fledge") / "recipes"
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(".toml"))
    return {n[: -len(".toml")]: (folder / n).read_text(encoding="utf-8") for n in names}


def load_recipe(name_or_path: str) -> tuple[str, Recipe]:
    """The (name, Recipe) of a built-in recipe or of a TOML file.

    Raises UserError for an unknown name, a broken file, an unknown key or a value of a wrong type.
    """
    builtin = builtin_recipes()
    if name_or_path in builtin:
        return name_or_path, parse_recipe(builtin[name_or_path], where=f"recipe {name_or_path}")
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, builtin, n=1)
        hint = f"did you mean {near[0]}?" if near else "give a name or the path of a .toml file"
        raise UserError(
            f"there is no recipe called {name_or_path!r}",
            f"the built-in recipes are {', '.join(builtin)}, and no such file exists",
            hint,
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the recipe {path}", str(error), "give a readable UTF-8 TOML file"
        ) from None
    return path.stem, parse_recipe(text, where=str(path))


def recipe_text(name_or_path: str) -> str:
    """The TOML text of a recipe that `load_recipe` knows."""
    builtin = builtin_recipes()
    return builtin.get(name_or_path) or Path(name_or_path).read_text(encoding="utf-8")


def expected_of(text: str) -> str | None:
    """What the header of a recipe expects of the run: its "expected" entry, line by line."""
    header = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines: list[str] = []
    for line in header:
        entry = re.fullmatch(r"#   (\w+) +(.*)", line)
        if entry is not None and entry[1] == "expected":
            lines = ["#" + " " * (entry.start(2) - 1) + entry[2]]
        elif lines and re.match(r"# {5,}\S", line):
            lines.append(line)
        elif lines:
            break
    return textwrap.dedent("\n".join(line[1:] for line in lines)) or None


def parse_recipe(text: str, *, where: str) -> Recipe:
    """The Recipe that TOML text describes; `where` names its origin in errors."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{where} is not valid TOML", str(error), "mend that line; see docs/recipes.md"
        ) from None
    return recipe_from_dict(tables, where=where)


def recipe_from_dict(tables: dict[str, Any], *, where: str) -> Recipe:
    """The Recipe of a dict of tables, every key and type checked."""
    built = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            raise _unknown(f"[{section}]", section, SECTIONS, where)
        if not isinstance(table, dict):
            raise UserError(
                f"{section} = {table!r} in {where}",
                f"{section} is a section, not a value",
                f"write [{section}] and its keys below it",
            )
        hints, values = typing.get_type_hints(SECTIONS[section]), {}
        for key, value in table.items():
            if key not in hints:
                raise _unknown(f"{section}.{key}", key, hints, where)
            try:
                values[key] = _coerce(value, hints[key])
            except TypeError as error:
                raise UserError(
                    f"{section}.{key} = {value!r} in {where}",
                    f"it must be {error}",
                    f"see `fledge run --help` for what {section}.{key} means",
                ) from None
        built[section] = SECTIONS[section](**values)
    return Recipe(**built)


def _unknown(what: str, key: str, known: Iterable[str], where: str) -> UserError:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
    return UserError(f"unknown key {what} in {where}", "no such setting exists", fix)


_IN_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", str: "a string", bool: "true or false"},
    **{tuple[str, ...]: "a list of strings", dict[str, float]: "a table of numbers"},
}


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the annotated type; TypeError (with the type in words) if it does not fit."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the latter of Literal[...] | None
        return None if value is None else _coerce(value, inner[0])  # always "X | None"
    if hint is float and type(value) is int:
        return float(value)
    if origin is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if origin is dict and isinstance(value, dict) and {*map(type, value.values())} <= {int, float}:
        return {key: float(number) for key, number in value.items()}
    if type(value) is hint or (origin is Literal and value in inner):
        return value
    raise TypeError(_IN_WORDS.get(hint) or f"one of {', '.join(inner)}")


def recipe_to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Sections as plain dicts without the absent keys; ready for TOML and JSON."""
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in table.items()
            if value is not None
        }
        for section, table in dataclasses.asdict(recipe).items()
    }


def flat(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same as one dict of "section.key"."""
    return {f"{name}.{key}": v for name, table in tables.items() for key, v in table.items()}


def recipe_to_toml(recipe: Recipe) -> str:
    """TOML text from which `parse_recipe` makes the same Recipe."""
    return tomli_w.dumps(recipe_to_dict(recipe))
