"""Reinforcement on several gloo processes equals that of one: answers, losses, weights."""

import pytest

from fledge.dist import World
from tests.optim.test_sharded import close, ranks
from tests.train.rl_ranks import go

STEPS = 3
EXACT = 2  # steps; Muon amplifies the rounding of another order of sums after that
FIRST = 5 * 2 * EXACT  # problems of those steps, with their refill


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(tmp_path, size):
    alone = go(World(), STEPS)
    together = ranks(tmp_path / "ranks", size, STEPS, module="tests.train.rl_ranks")
    graded: dict[int, list[list[int]]] = {}
    for found in together:
        assert not graded.keys() & found["answers"].keys(), "no problem is sampled twice"
        graded |= found["answers"]
    first = {number: ids for number, ids in graded.items() if number < FIRST}
    assert first == {n: ids for n, ids in alone["answers"].items() if n < FIRST}
    assert len(first) > 10 + 2, "the groups of equal rewards were replaced"
    assert all(len(found["answers"]) >= STEPS for found in together), "all ranks sample"
    for found in together:
        close(found["weights"], alone["weights"], 1e-5)
        for step, (ours, theirs) in enumerate(zip(found["rows"], alone["rows"], strict=True)):
            for key in theirs:
                if "second" in key:
                    continue
                off = 1e-5 if key == "log_ratio_max" else 1e-6  # of that, rounding is all it shows
                relative = 0.0 if step < EXACT else 1e-3
                near = pytest.approx(theirs[key], rel=relative, abs=off)
                assert ours[key] == near, (step, key)
