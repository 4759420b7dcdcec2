"""Several gloo processes equal one: loss, gradients, weights, optimizer state, resuming."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from fledge.dist import World, joined, lost_a_peer
from fledge.errors import UserError
from tests.helpers_mini import ROOT, environment
from tests.optim.ranks import go


def ranks(
    folder,
    size: int,
    steps: int,
    first: int = 0,
    resume=None,
    module="tests.optim.ranks",
    dtype="float64",
) -> list[dict]:
    """Runs `ranks.py` (or another) in `size` processes that meet by torchrun's contract."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", module, folder, steps, first, dtype]
    if resume is not None:
        torch.save(resume, folder / "resume.pt")
        words.append(folder / "resume.pt")
    base = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    meet = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [*map(str, words)],
            env=base | meet | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [torch.load(folder / f"rank{r}.pt") for r in range(size)]


def close(a: dict, b: dict, tolerance: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_equal_one_process_over_twenty_steps(tmp_path, size):
    """5 rows a step and odd sizes: neither 2 nor 3 divides them.

    Two ranks are held to 1e-9. Three sum in another order, and AdamW divides gradients near zero by
    themselves: of 1,552 numbers of a table one was off by 1.4e-9 after 20 steps.
    """
    tolerance = 1e-9 if size == 2 else 1e-8
    hooks, _ = go(World(), 20, None)
    found = ranks(tmp_path / "ranks", size, 20)
    for one in found:
        losses, norms = ([r[k] for r in hooks.rows] for k in ("loss", "gradient_norm"))
        assert one["losses"] == pytest.approx(losses, rel=1e-9)
        assert one["norms"] == pytest.approx(norms, rel=1e-6)
        close(one["weights"], hooks.held["weights"], tolerance)
        close(one["state"], hooks.held["state"], tolerance)
    for name in found[0]["weights"]:
        assert all(torch.equal(found[0]["weights"][name], f["weights"][name]) for f in found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_stop_and_one_or_three_go_on(tmp_path):
    hooks, _ = go(World(), 20, None)
    half = ranks(tmp_path / "two", 2, 10)[0]
    alone, _ = go(World(), 20, half, first=10)
    close(alone.held["weights"], hooks.held["weights"])
    three = ranks(tmp_path / "three", 3, 20, first=10, resume=half)[0]
    close(three["weights"], hooks.held["weights"], 1e-8)
    close(three["state"], hooks.held["state"], 1e-8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_two_ranks_to_one_to_four(tmp_path):
    """A run that moves twice equals one that never moved; the losses to 1e-9, all 20 of them."""
    hooks, _ = go(World(), 20, None)
    two = ranks(tmp_path / "two", 2, 7)[0]
    alone, _ = go(World(), 14, two, first=7)
    one = {"weights": alone.held["weights"], "state": alone.held["state"]}
    four = ranks(tmp_path / "four", 4, 20, first=14, resume=one)
    losses = two["losses"] + [row["loss"] for row in alone.rows] + four[0]["losses"]
    assert losses == pytest.approx([row["loss"] for row in hooks.rows], rel=1e-9)
    for found in four:
        close(found["weights"], hooks.held["weights"], 1e-8)  # AdamW near zero, as above
        close(found["state"], hooks.held["state"], 1e-8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 4])
def test_the_first_steps_in_float32(tmp_path, size):
    """To 1e-6 over three steps; Muon and AdamW make rounding larger after that (docs/log.md)."""
    hooks, _ = go(World(), 3, None, dtype=torch.float32)
    for found in ranks(tmp_path / "ranks", size, 3, dtype="float32"):
        assert found["losses"] == pytest.approx([r["loss"] for r in hooks.rows], rel=1e-6)


def test_every_row_is_somebodys():
    for size in (1, 2, 3, 7):
        for count in (1, 5, 12):
            rows = [i for r in range(size) for i in range(count)[World(r, size).share(count)]]
            assert rows == list(range(count))


def test_a_world_without_a_place_to_meet_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"), joined():
        pass


def test_only_a_closed_connection_is_a_lost_peer() -> None:
    gloo = "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:3"
    assert lost_a_peer(RuntimeError(gloo))
    for other in ("NCCL error: unhandled cuda error, out of memory", "gloo: not implemented", "x"):
        assert not lost_a_peer(RuntimeError(other))
    assert not lost_a_peer(ValueError(gloo))
