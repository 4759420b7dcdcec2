"""Work behind the loop's back: in order, errors raised, copies that training cannot change."""

import threading

import pytest
import torch

from fledge.errors import UserError
from fledge.train.saving import Saver, host_copies


def test_at_once_is_at_once():
    done = []
    saver = Saver(behind=False)
    saver.submit(lambda: done.append(threading.current_thread()))
    assert done == [threading.main_thread()]
    saver.wait()


def test_the_next_waits_for_the_one_before():
    begun, go, order = threading.Event(), threading.Event(), []
    saver = Saver(behind=True)

    def first() -> None:
        begun.set()
        assert go.wait(60)
        order.append(1)

    saver.submit(first)
    assert begun.wait(60) and order == []  # the caller went on while it works
    threading.Timer(0.05, go.set).start()
    saver.submit(lambda: order.append(2))
    saver.wait()
    assert order == [1, 2]


def test_an_error_comes_back_once_to_whoever_waits():
    def fail() -> None:
        raise UserError("cannot write", "the disk is full", "free some space")

    saver = Saver(behind=True)
    saver.submit(fail)
    with pytest.raises(UserError, match="disk is full"):
        saver.submit(lambda: None)
    saver.wait()
    with pytest.raises(UserError, match="disk is full"):
        Saver(behind=False).submit(fail)


def test_copies_do_not_follow():
    live = torch.nn.Parameter(torch.ones(3, 2))
    kept = host_copies({"w": live, "turned": live.T})
    with torch.no_grad():
        live.add_(1)
    assert torch.equal(kept["w"], torch.ones(3, 2)) and not kept["w"].requires_grad
    assert torch.equal(kept["turned"], torch.ones(2, 3))
