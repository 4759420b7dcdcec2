"""Packing loses nothing, fills rows, and resumes to the row."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data.loader import Ahead, Loader, Mixture
from fledge.data.pack import Packer

PAD = 0


def documents(lengths: list[int]):
    """Document i has lengths[i] tokens, all different over the documents."""
    starts = [0, *itertools.accumulate(lengths)]

    def fetch(index: int):
        lap, place = divmod(index, len(lengths))
        first = 1 + starts[place] + lap * starts[-1]
        ids = np.arange(first, first + lengths[place], dtype=np.int32)
        return ids, np.ones(len(ids), dtype=np.uint8)

    return fetch


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.integers(8, 40))
def test_text_fills_every_row_and_every_token_comes_once(lengths, row_tokens):
    packer = Packer(documents(lengths), row_tokens, PAD, split=True)
    rows = [packer.row() for _ in range(12)]
    tokens = np.concatenate([ids[mask == 1] for ids, mask in rows])
    assert len(tokens) == 12 * row_tokens  # no padding at all
    assert len(set(tokens.tolist())) == len(tokens)  # nothing twice


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(30, 64))
def test_conversations_are_never_cut(lengths, row_tokens):
    packer = Packer(documents(lengths), row_tokens, PAD, split=False)
    for ids, mask in (packer.row() for _ in range(12)):
        tokens = ids[mask == 1]
        assert (ids[mask == 0] == PAD).all()
        breaks = np.flatnonzero(np.diff(tokens) != 1)
        for piece in np.split(tokens, breaks + 1):  # neighbours may happen to be consecutive
            assert len(piece) >= min(lengths)


@pytest.mark.parametrize("split", [True, False])
def test_resume_gives_the_same_rows(split):
    lengths = [5, 17, 3, 29, 11, 23, 2]
    whole = Packer(documents(lengths), 32, PAD, split=split)
    for _ in range(9):
        whole.row()
    state = whole.state()
    expected = [whole.row()[0].tolist() for _ in range(6)]
    resumed = Packer(documents(lengths), 32, PAD, split=split)
    resumed.restore(state)
    assert [resumed.row()[0].tolist() for _ in range(6)] == expected


class Numbers:
    piece = staticmethod(documents([7, 19, 4]))


def test_batches_do_not_depend_on_how_rows_are_grouped():
    one = Loader(Numbers(), row_tokens=16, pad_id=PAD, split=True)
    two = Loader(Numbers(), row_tokens=16, pad_id=PAD, split=True)
    together, _ = one.batch(6)
    apart = np.concatenate([two.batch(2)[0] for _ in range(3)])
    assert (together == apart).all()


def test_packing_ahead_gives_the_same_batches_and_states():
    plain = Loader(Numbers(), row_tokens=16, pad_id=PAD, split=True)
    with Ahead(Loader(Numbers(), row_tokens=16, pad_id=PAD, split=True), 3) as ahead:
        assert ahead.state() == plain.state()
        for _ in range(20):
            ids, mask = ahead.batch(3)
            expected_ids, expected_mask = plain.batch(3)
            assert (ids == expected_ids).all() and (mask == expected_mask).all()
            assert ahead.state() == plain.state()  # however far the thread is
    resumed = Loader(Numbers(), row_tokens=16, pad_id=PAD, split=True)
    resumed.restore(ahead.state())
    with Ahead(resumed, 3) as going_on:
        assert (going_on.batch(3)[0] == plain.batch(3)[0]).all()


def test_an_error_while_packing_ahead_reaches_the_training_thread():
    class Broken:
        def piece(self, index: int):
            if index == 300:
                raise ValueError("document 300 cannot be read")
            return Numbers.piece(index)

    with (
        Ahead(Loader(Broken(), row_tokens=16, pad_id=PAD, split=True), 3) as ahead,
        pytest.raises(ValueError, match="document 300"),
    ):
        for _ in range(1000):
            ahead.batch(3)


def test_leaving_early_ends_the_thread():
    with Ahead(Loader(Numbers(), row_tokens=16, pad_id=PAD, split=True), 3) as ahead:
        ahead.batch(3)
    assert not ahead._thread.is_alive()


def test_a_mixture_keeps_its_shares_and_reads_every_source_in_order():
    mixture = Mixture([None, None, None], [5, 3, 2])  # type: ignore[list-item]
    placed = [mixture.locate(i) for i in range(3000)]
    for source, share in enumerate((0.5, 0.3, 0.2)):
        offsets = [offset for s, offset in placed if s == source]
        assert offsets == list(range(len(offsets)))
        assert len(offsets) == pytest.approx(3000 * share, abs=2)
    first = [source for source, _ in placed[:10]]
    assert sorted(set(first)) == [0, 1, 2]  # well mixed from the start
