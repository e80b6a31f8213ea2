"""What queries may look at: the only difference between training, decoding and packing.

A memory is handed every layer's queries, keys and values and gives back what they attended to. `Causal`
keeps nothing; a `Cache` keeps what was seen, so that a new token costs one token.

Axes: b batch, t new tokens, s tokens attended to, h query heads, k key heads, d head width.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.config import ModelConfig

Heads = Float[Tensor, "b h t d"]
KeyHeads = Float[Tensor, "b k t d"]


@runtime_checkable
class Memory(Protocol):
    """`attend` is called once a layer, in order."""

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads) -> Heads: ...


class Causal:
    """Every token attends to itself and all before it in its row; nothing is kept."""

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Cache:
    """Keys and values of tokens already seen, one row a sequence, each filled from the left.

    `at(positions)` says where the next tokens go. A token attends to the positions up to its own, so
    whatever lies beyond, padding included, is never seen and is overwritten when its turn comes.
    `like` is a tensor of the model's dtype and device.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def at(self, positions: Int[Tensor, "b t"]) -> "CacheWindow":
        return CacheWindow(self, positions)

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class CacheWindow:
    """A cache about to take the tokens of these positions."""

    def __init__(self, cache: Cache, positions: Int[Tensor, "b t"]) -> None:
        self.cache = cache
        self.rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.positions = positions
        self.end = int(positions.max()) + 1
        seen = torch.arange(self.end, device=positions.device)
        self.mask = (seen <= positions[..., None])[:, None]  # b 1 t s

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions] = k.transpose(1, 2)
        values[self.rows, :, self.positions] = v.transpose(1, 2)
        seen_keys, seen_values = keys[:, :, : self.end], values[:, :, : self.end]
        return F.scaled_dot_product_attention(q, seen_keys, seen_values, self.mask, enable_gqa=True)
