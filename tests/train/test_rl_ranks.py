"""Reinforcement on two gloo processes equals that of one."""

import pytest

from fledge.dist import World
from tests.optim.test_sharded import close, ranks
from tests.train.rl_ranks import go

PER_RANK = {"log_ratio_max", "length_max"}  # of the rank's own answers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_equal_one(tmp_path):
    alone = go(World(), 3)
    for found in ranks(tmp_path / "ranks", 2, 3, module="tests.train.rl_ranks"):
        close(found["weights"], alone["weights"], 1e-5)
        for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
            for key in theirs.keys() - PER_RANK:
                if "second" not in key:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
