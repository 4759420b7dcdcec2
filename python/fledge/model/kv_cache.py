"""Keys and values of the tokens already read: one contiguous slot per sequence.

Used by `engine`; `model.attention` writes into it and reads from it. Slots never move unless
`keep` compacts them. K and V are [slots, H_kv, max_len, K] per layer, allocated once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.config import ModelConfig


class KVCache:
    """`slots` sequences of up to `max_len` tokens each."""

    def __init__(
        self, config: ModelConfig, slots: int, max_len: int, *, device: torch.device | str = "cpu"
    ) -> None:
        shape = (slots, config.num_key_value_heads, max_len, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device) for _ in layers]
        self.values = [torch.zeros(shape, device=device) for _ in layers]
        # smear (arch "speedrun") mixes in the token before; no other network asks for it
        self.ids = torch.zeros(slots, max_len, dtype=torch.long, device=device)
        self.max_len = max_len

    @property
    def slots(self) -> int:
        return self.keys[0].shape[0]

    def write(
        self, layer: int, rows: Tensor | None, positions: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Stores k, v [b, H_kv, T, K] of slots `rows` [b] (None = all) at `positions` [b, T]."""
        if rows is None:
            rows = torch.arange(len(positions), device=positions.device)
        where = (rows[:, None], slice(None), positions)
        self.keys[layer][where] = k.transpose(1, 2)  # advanced indices move to the front
        self.values[layer][where] = v.transpose(1, 2)

    def previous_ids(self, rows: Tensor | None, positions: Tensor, ids: Tensor) -> Tensor:
        """Stores ids [b, T] of slots `rows` at `positions`; returns the ids one place before them.

        What stands before position 0 is meaningless.
        """
        if rows is None:
            rows = torch.arange(len(positions), device=positions.device)
        self.ids[rows[:, None], positions] = ids
        return self.ids[rows[:, None], (positions - 1).clamp_min(0)]

    def read(self, layer: int, rows: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of slots `rows` (None = all, without a copy)."""
        keys, values = self.keys[layer][:, :, :length], self.values[layer][:, :, :length]
        return (keys, values) if rows is None else (keys[rows], values[rows])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot into another (n samples of a prompt)."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
        self.ids[target, :length] = self.ids[source, :length]

    def keep(self, rows: Tensor) -> None:
        """Drops every slot but `rows`; the kept ones are renumbered in that order."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.ids = self.ids[rows]
