"""What queries may look at: the only difference between training, decoding and packing.

A memory is handed every layer's queries, keys and values and gives back what they attended to. `Causal`
keeps nothing; `Documents` are several in one row, none of which sees another; `Branches` are several ends
of one beginning in one row; a `Cache` keeps what was seen, so that a new token costs one token. `Within` lets any
of them look back no further than a window.

Axes: b batch, t new tokens, s tokens attended to, h query heads, k key heads, d head width.
"""

import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.config import ModelConfig

Heads = Float[Tensor, "b h t d"]
KeyHeads = Float[Tensor, "b k t d"]
Attend = Callable[[Heads, KeyHeads, KeyHeads, int | None], Heads]


@runtime_checkable
class Memory(Protocol):
    """`attend` is called once a layer, in order; of so many tokens as `window` says, its own included, if it says."""

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads: ...


class Within:
    """The same memory, of which a token sees the last `window` tokens alone, itself among them."""

    def __init__(self, memory: Memory, window: int) -> None:
        self.memory, self.window = memory, window

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        return self.memory.attend(layer, q, k, v, min(self.window, window or self.window))


def causal(q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
    if window is None or window >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return masked(torch.arange(q.shape[2], device=q.device)[None], q, k, v, window)


class Causal:
    """Every token attends to itself and all before it in its row; nothing is kept."""

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        return causal(q, k, v, window)


class Documents:
    """Every token attends to itself and all before it in its own document; nothing is kept.

    `document` numbers each token's document, in rising order along a row. A model is given `positions`
    with this, which count from 0 in each document; `packing` makes both.
    """

    def __init__(self, document: Int[Tensor, "b t"]) -> None:
        starts = torch.searchsorted(document, document)
        self.positions = torch.arange(document.shape[1], device=document.device) - starts
        # FlexAttention has a backward pass on GPUs only.
        self.inside = flex(document) if document.is_cuda else slices(self.positions)

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        return self.inside(q, k, v, window)


def documents(ids: Int[Tensor, "b t"], separator: int) -> Int[Tensor, "b t"]:
    """Number of each token's document, where every document ends with its separator, as in a corpus.

    Separators in a row, such as a row is filled up with, all belong to the document they end.
    """
    ends = ids == separator
    return F.pad(ends[:, :-1] & ~ends[:, 1:], (1, 0)).cumsum(1)


def packing(
    ids: Int[Tensor, "b t"], separator: int | None, positions: Int[Tensor, "b t"] | None = None
) -> tuple[Int[Tensor, "b t"] | None, Documents | None]:
    """Positions and memory of rows whose documents begin where `positions` are 0, or else end with `separator`; without
    either, those of plain rows.
    """
    if positions is not None:
        return positions, Documents((positions == 0).cumsum(1))
    if separator is None:
        return None, None
    packed = Documents(documents(ids, separator))
    return packed.positions, packed


def slices(positions: Int[Tensor, "b t"]) -> Attend:
    """One causal attention a document: tokens of different documents cost neither time nor memory."""
    starts = (positions == 0).flatten().nonzero().flatten()
    lengths = starts.diff(append=starts.new_tensor([positions.numel()])).tolist()

    def inside(q: Heads, k: KeyHeads, v: KeyHeads, window: int | None) -> Heads:
        if torch.compiler.is_compiling():  # every batch has other lengths, and would have a program of its own
            return masked(positions, q, k, v, window)
        pieces = [x.transpose(0, 1).flatten(1, 2)[None].split(lengths, 2) for x in (q, k, v)]
        found = torch.cat([causal(*piece, window=window) for piece in zip(*pieces, strict=True)], 2)
        return found[0].unflatten(1, positions.shape).transpose(0, 1)

    return inside


def masked(positions: Int[Tensor, "#b t"], q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
    """The same over whole rows: a key is seen if it is no further back than the query is into its document."""
    places = torch.arange(positions.shape[1], device=positions.device)
    back = places[:, None] - places
    reach = positions if window is None else positions.clamp(max=window - 1)
    mask = (back >= 0) & (back <= reach[..., None])
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)


def flex(document: Int[Tensor, "b t"]) -> Attend:
    """FlexAttention in one kernel, which leaves out blocks of tokens of different documents."""
    rows, length = document.shape
    flex_attention, create_block_mask = compiled_flex()

    @functools.cache
    def mask(window: int) -> object:
        return create_block_mask(
            lambda row, head, query, key: (
                (query >= key) & (query - key < window) & (document[row, query] == document[row, key])
            ),
            B=rows,
            H=None,
            Q_LEN=length,
            KV_LEN=length,
            device=document.device,
        )

    mask(length)
    return lambda q, k, v, window: flex_attention(q, k, v, block_mask=mask(window or length), enable_gqa=True)


@functools.cache
def compiled_flex() -> tuple[Callable, Callable]:
    """FlexAttention and the maker of its masks, imported and compiled when first needed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


class Branches:
    """A beginning and several ways to go on, in one row; nothing is kept.

    `branch` is 0 for the beginning, which every branch sees, and numbers the branches, none of which sees
    another. So the keys and values of the beginning are computed once for all of them. A model is given
    positions with this, which go on from the beginning's in each branch.
    """

    def __init__(self, branch: Int[Tensor, "b t"]) -> None:
        order = torch.arange(branch.shape[1], device=branch.device)
        keys = branch[:, None, :]
        self.mask = ((order[:, None] >= order) & ((keys == 0) | (keys == branch[..., None])))[:, None]  # b 1 t t

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        mask = self.mask
        if window is not None:
            places = mask.sum(-1)  # a token sees all before it in its branch, and so knows its place
            mask = mask & (places[..., None] - places[..., None, :] < window)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


class Cache:
    """Keys and values of tokens already seen, one row a sequence, each filled from the left.

    `at(positions)` says where the next tokens go. A token attends to the positions up to its own, so
    whatever lies beyond, padding included, is never seen and is overwritten when its turn comes.
    `like` is a tensor of the model's dtype and device.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def at(self, positions: Int[Tensor, "b t"], first: int = 0) -> "CacheWindow":
        """The rows from `first` on, about to take tokens at positions that rise by one along each row."""
        return CacheWindow(self, positions, first)

    def move(self, source: int, target: int, length: int) -> None:
        """A row's first tokens take the place of another's."""
        for kept in (self.keys, self.values):
            kept[:, target, :, :length] = kept[:, source, :, :length]


class CacheWindow:
    """Rows of a cache about to take the tokens of these positions."""

    def __init__(self, cache: Cache, positions: Int[Tensor, "b t"], first: int = 0) -> None:
        rows, length = positions.shape
        self.keys, self.values = (kept[:, first : first + rows] for kept in (cache.keys, cache.values))
        self.rows = torch.arange(rows, device=positions.device)[:, None]
        self.positions = positions
        self.end = int(positions.max()) + 1
        seen = torch.arange(self.end, device=positions.device)
        self.back = (positions[..., None] - seen)[:, None]  # b 1 t s
        self.mask = self.back >= 0
        # The same for all layers, so it is looked at once whether anything is hidden at all.
        self.begins, self.all_seen = length == self.end, bool(self.mask.all())
        self.added = torch.zeros(self.mask.shape, dtype=cache.keys.dtype, device=positions.device)
        self.added.masked_fill_(~self.mask, float("-inf"))

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.positions] = k.transpose(1, 2)
        values[self.rows, :, self.positions] = v.transpose(1, 2)
        seen_keys, seen_values = keys[:, :, : self.end], values[:, :, : self.end]
        if window is not None and window < self.end:
            mask = self.mask & (self.back < window)
        elif self.begins:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            mask = None if self.all_seen else self.added
        return F.scaled_dot_product_attention(q, seen_keys, seen_values, mask, enable_gqa=True)
