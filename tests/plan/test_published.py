"""The recipes resolve to nanochat's published figures, digit for digit where digits are published.

Sources: karpathy/nanochat at 3a5e0bc (October 2025; its report of the d20, run1000.sh) and at
92d63d4 (July 2026; gpt.py and base_train.py for the rules, dev/LEADERBOARD.md).
"""

from __future__ import annotations

import dataclasses

import pytest

from fledge.config import ModelSection, Recipe, builtin_recipes, load_recipe
from fledge.errors import UserError
from fledge.optim.groups import ADAM_GROUPS, SPEEDRUN_GROUPS, adam_groups
from fledge.optim.schedule import Schedule
from fledge.plan import hardware, scaling
from fledge.plan.planner import Plan, resolve

EIGHT = hardware.parse("8xh100")


def plan_of(name: str, depth: int | None = None) -> Plan:
    recipe = load_recipe(name)[1]
    if depth is not None:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, depth=depth))
    return resolve(recipe, EIGHT)


def steps(plan: Plan, stage: str = "base") -> int:
    return plan.values[f"{stage}.tokens"] // plan.values[f"{stage}.global_batch_tokens"]


# depth: parameters, FLOPs per token, steps, tokens, total FLOPs
OCTOBER = {
    4: (36_700_160, 1.447e8, 1_400, 734_003_200, 1.06e17),
    12: (185_597_952, 1.038e9, 7_080, 3_711_959_040, 3.85e18),
    20: (560_988_160, 3.491758e9, 21_400, 11_219_763_200, 3.918e19),
    26: (1_081_999_360, 6.901e9, 41_275, 21_639_987_200, 1.49e20),
    32: (1_879_048_192, 1.207960e10, 71_680, 37_580_963_840, 4.539628e20),
}


def digits(value: float, published: float) -> float:
    """A unit of the last digit of a published figure such as 3.918e19, a little more than half:
    d16's 1.58545e9 stands as 1.586e9."""
    mantissa = f"{published:.7g}".partition("e")[0].rstrip("0")
    places = len(mantissa.partition(".")[2]) if "." in mantissa else 0
    exponent = int(f"{published:e}".partition("e")[2])
    return 0.6 * 10.0 ** (exponent - max(places, 2))


@pytest.mark.parametrize("depth", OCTOBER)
def test_october_2025_to_the_digit(depth: int) -> None:
    parameters, flops, published_steps, tokens, total = OCTOBER[depth]
    plan = plan_of("speedrun", depth)
    assert plan.estimates["parameters"] == parameters
    assert (steps(plan), plan.values["base.tokens"]) == (published_steps, tokens)
    counted = scaling.nanochat_flops_per_token(plan.model)
    assert counted == pytest.approx(flops, abs=digits(counted, flops), rel=0)
    assert counted * tokens == pytest.approx(total, rel=3e-3)
    assert plan.values["base.global_batch_tokens"] == 524_288


@pytest.mark.parametrize(
    ("name", "depth"), [("speedrun", 20), ("d26", 26), ("d30", 30), ("thousand", 32)]
)
def test_the_recipes_of_october_have_its_rates_and_schedules(name: str, depth: int) -> None:
    plan = plan_of(name)
    values, width = plan.values, 64 * depth
    assert plan.model.num_hidden_layers == depth and plan.model.hidden_size == width
    assert (plan.model.head_dim, plan.model.intermediate_size) == (128, 4 * width)
    assert (plan.model.vocab_size, plan.model.max_position_embeddings) == (65_536, 2048)
    assert (plan.model.rope_theta, plan.model.final_logit_softcapping) == (10_000.0, 15.0)
    assert not plan.model.value_embeddings and plan.model.window_pattern == "L"
    assert values["base.matrix_lr"] == 0.02
    assert values["base.embed_lr"] == pytest.approx(0.2 * (width / 768) ** -0.5, rel=1e-12)
    assert values["base.head_lr"] == pytest.approx(0.004 * (width / 768) ** -0.5, rel=1e-12)
    assert (values["base.weight_decay"], values["base.warmup_steps"]) == (0, 0)
    assert (values["base.cooldown_fraction"], values["base.final_lr_fraction"]) == (0.2, 0)
    assert values["base.eval_tokens"] == 20 * 524_288 and values["base.eval_every"] == 250
    assert (values["mid.lr_scale"], values["mid.cooldown_fraction"]) == (1, 1)
    assert values["mid.global_batch_tokens"] == 524_288
    assert (steps(plan, "sft"), values["sft.lr_scale"]) == (669, 0.02)
    rl = ("steps", "prompts_per_step", "samples_per_prompt", "max_new_tokens", "lr_scale")
    assert [values[f"rl.{key}"] for key in rl] == [467, 16, 16, 256, 0.05]


def test_october_2025_trains_with_its_own_optimizer_groups() -> None:
    groups = adam_groups("speedrun", plan_of("speedrun").values["base.adamw"])
    for kind in ("embed", "head"):
        assert (groups[kind].betas, groups[kind].weight_decay) == ((0.8, 0.95), 0)
    assert adam_groups("speedrun", "2026") is SPEEDRUN_GROUPS
    assert adam_groups("qwen3", None) is ADAM_GROUPS


def test_momentum_of_october_rises_in_300_steps() -> None:
    schedule = Schedule(21_400, 0, 0.2, 0.0, momentum_schedule="rise")
    found = [schedule.momentum(step) for step in (0, 150, 300, 21_399)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95])
    # constant, then linear to 0 over the last fifth
    assert schedule.factor(0) == schedule.factor(17_120) == 1.0
    assert schedule.factor(19_260) == pytest.approx(0.5)


# depth: width, parameters, blocks + head, FLOPs per token, batch, steps, rates x, decay
JULY = {
    8: (512, 125_829_354, 41_943_232, 2.957e8, 262_144, 1_920, 0.707, 0.520),
    12: (768, 286_261_730, 110_100_912, 7.597e8, 524_288, 2_520, 1.0, 0.280),
    16: (1024, 536_871_738, 234_881_792, 1.586e9, 524_288, 5_376, 1.0, 0.131),
    20: (1280, 896_533_746, 435_160_240, 2.886e9, 1_048_576, 4_980, 1.414, 0.100),
    24: (1536, 1_384_122_122, 729_810_624, 4.775e9, 1_048_576, 8_352, 1.414, 0.060),
    26: (1664, 1_681_786_938, 918_423_532, 5.991e9, 1_048_576, 10_510, 1.414, 0.047),
    32: (2048, 2_818_575_450, 1_677_724_672, 1.077e10, 2_097_152, 9_600, 2.0, 0.037),
}


@pytest.mark.parametrize("depth", JULY)
def test_july_2026_to_the_digit(depth: int) -> None:
    width, parameters, scaled, flops, batch, published_steps, by_batch, decay = JULY[depth]
    plan = plan_of("speedrun24", depth)
    values = plan.values
    assert plan.model.hidden_size == width
    assert plan.estimates["parameters"] == parameters
    assert plan.estimates["scaling_parameters"] == scaled
    counted = scaling.nanochat_flops_per_token(plan.model)
    assert counted == pytest.approx(flops, abs=digits(counted, flops), rel=0)
    assert (values["base.global_batch_tokens"], steps(plan)) == (batch, published_steps)
    assert values["base.matrix_lr"] == pytest.approx(0.02 * by_batch, rel=5e-4)
    by_width = (width / 768) ** -0.5 * by_batch
    assert values["base.embed_lr"] == pytest.approx(0.3 * by_width, rel=5e-4)
    assert values["base.head_lr"] == pytest.approx(0.008 * by_width, rel=5e-4)
    assert values["base.weight_decay"] == pytest.approx(decay, abs=0.00051)
    shape = ("warmup_steps", "cooldown_fraction", "final_lr_fraction", "decay_schedule")
    assert [values[f"base.{key}"] for key in shape] == [40, 0.65, 0.05, "cosine"]


def test_the_published_hours_are_met_by_the_estimate() -> None:
    """P1 (10,949 s), P8's pretraining at MFU .48 (2.87 h) and P9 (10.9 h) of the pairs."""
    for name, hours in (("speedrun24", 10_949 / 3600), ("speedrun", 2.87), ("d26", 10.9)):
        seconds = plan_of(name).estimates["stages"]["base"]["seconds"]
        assert seconds / 3600 == pytest.approx(hours, rel=0.08), name


def test_shards_of_the_speedrun() -> None:
    """216 shards of about 100 MB: nanochat fetches 240 for its d20."""
    download = plan_of("speedrun").estimates["download_bytes"]
    assert 21.6e9 < download < 24e9 + 1.5e9
    assert resolve(load_recipe("tiny")[1], EIGHT).estimates["download_bytes"] == 0


def test_what_a_person_sets_wins_over_a_release() -> None:
    recipe = load_recipe("speedrun")[1]
    changed = dataclasses.replace(recipe, base=dataclasses.replace(recipe.base, matrix_lr=0.5))
    plan = resolve(changed, EIGHT)
    assert plan.values["base.matrix_lr"] == 0.5
    assert plan.rules["base.matrix_lr"] == "given in the recipe"


def test_the_first_release_is_of_one_architecture() -> None:
    with pytest.raises(UserError, match="oct2025"):
        resolve(Recipe(model=ModelSection(depth=4, rule="oct2025")), EIGHT)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_every_header_says_command_hardware_time_cost_and_what_to_expect(name: str) -> None:
    header = builtin_recipes()[name].partition("\n[")[0]
    for word in ("command", "hardware", "time", "cost", "expected"):
        assert f"#   {word} " in header, (name, word)
    assert all(line.startswith("#") or not line for line in header.splitlines())
    resolve(load_recipe(name)[1], EIGHT)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_every_recipe_is_planned_by_the_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from fledge import cli

    target = load_recipe(name)[1].hardware.target or "2xcpu"
    assert cli.main(["plan", name, "--hardware", target]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name} on ") and "together" in said and "[evaluate]" in said
