"""The inference bench compares like with like: same weights, same bytes, all rows measured."""

from __future__ import annotations

import pytest
import torch

from fledge.bench import infer
from fledge.config import ModelConfig

TINY = ModelConfig(32768, 32, 2, 2, 2, 16, 48, 2048, tie_word_embeddings=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(infer.SHAPES, "d4", TINY)
    monkeypatch.setattr(infer, "copy_bandwidth", lambda: 1e9)


def test_the_shapes_have_the_matrix_parameters_that_were_published():
    # nanochat 92d63d4: 11.5 M and 110.1 M matrix parameters (head included)
    for shape, millions in (("d4", 11.5), ("d12", 110.1)):
        floats = infer.step_bytes(shape, 0) / 4
        assert floats / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_bound_counts_weights_once_and_every_rows_keys():
    one, many = infer.step_bytes("d12", 1), infer.step_bytes("d12", 16)
    token = 2 * 12 * 6 * 128 * 4
    assert many - one == 15 * 512 * token
    assert infer.step_bytes("d12", 16, shared=True) == one
    weights = one - 512 * token
    assert infer.step_bytes("d12", 1, weights="int8") == weights / 4 + 512 * token


def test_the_peer_has_our_weights(tiny):
    pytest.importorskip("transformers")
    model = infer.make_model("d4")
    peer = infer.Peer(model)
    ids = torch.tensor([infer.prompt(3)[:20]])
    with torch.inference_mode():
        torch.testing.assert_close(peer.model(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_every_layout_is_measured_beside_the_peer(tiny):
    pytest.importorskip("transformers")
    found = infer.measure("d4", batches=(1, 3), formats=("float32",), steps=2, peer=True)
    assert [(e["batch"], e["shared_prompt"]) for e in found] == [(1, False), (3, False), (3, True)]
    for entry in found:
        assert len(entry["steps"]) == 4 == len(entry["peer_steps"])
        assert entry["step_seconds"] > 0 and entry["peer_first_seconds"] > 0


def test_the_bench_prints_rows_with_their_peer(tiny):
    rows, notes = infer.run_default()
    assert len(rows) == 6 and any("GB/s" in note for note in notes)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
