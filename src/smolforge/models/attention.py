"""What queries may look at: the only difference between training, decoding and packing.

An `AttentionContext` is called with every layer's queries, keys and values, and returns the output of attention.
`CausalAttention` keeps nothing. `DocumentAttention` has several documents in one row, none of which sees another.
`SharedPrefixAttention` has several continuations of one prefix in one row. `KVCache` keeps keys and values, so that a
new token costs one token. `SlidingWindow` limits any of them to the last tokens.

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
class AttentionContext(Protocol):
    """`attend` is called once a layer, in order; of so many tokens as `window` says, its own included, if it says."""

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads: ...


class SlidingWindow:
    """A context in which a token sees only the last `window` tokens, itself among them."""

    def __init__(self, context: AttentionContext, window: int) -> None:
        self.context, self.window = context, window

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        return self.context.attend(layer, q, k, v, min(self.window, window or self.window))


def causal_attention(q: Heads, k: KeyHeads, v: KeyHeads, *, window: int | None = None) -> Heads:
    if window is None or window >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return masked_attention(torch.arange(q.shape[2], device=q.device)[None], q, k, v, window)


class CausalAttention:
    """Every token attends to itself and all before it in its row; nothing is kept."""

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        return causal_attention(q, k, v, window=window)


class DocumentAttention:
    """Every token attends to itself and all before it in its own document; nothing is kept.

    `document` numbers each token's document, in rising order along a row. A model is given `positions`
    with this, which count from 0 in each document; `packed_attention` makes both.
    """

    def __init__(self, document: Int[Tensor, "b t"]) -> None:
        starts = torch.searchsorted(document, document)
        self.positions = torch.arange(document.shape[1], device=document.device) - starts
        # FlexAttention has a backward pass on GPUs only.
        self.attend_documents = (
            flex_document_attention(document) if document.is_cuda else per_document_attention(self.positions)
        )

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        return self.attend_documents(q, k, v, window)


def document_ids(ids: Int[Tensor, "b t"], separator: int) -> Int[Tensor, "b t"]:
    """Return the number of each token's document, where every document ends with its separator, as in a corpus.

    Separators in a row, such as a row is filled up with, all belong to the document they end.
    """
    ends = ids == separator
    return F.pad(ends[:, :-1] & ~ends[:, 1:], (1, 0)).cumsum(1)


def packed_attention(
    ids: Int[Tensor, "b t"], separator: int | None, positions: Int[Tensor, "b t"] | None = None
) -> tuple[Int[Tensor, "b t"] | None, DocumentAttention | None]:
    """Return positions and context of rows whose documents start where `positions` are 0, or else end with `separator`;
    without either, those of plain rows.
    """
    if positions is not None:
        return positions, DocumentAttention((positions == 0).cumsum(1))
    if separator is None:
        return None, None
    packed = DocumentAttention(document_ids(ids, separator))
    return packed.positions, packed


def per_document_attention(positions: Int[Tensor, "b t"]) -> Attend:
    """Return an attention that runs once per document: tokens of different documents cost neither time nor memory."""
    starts = (positions == 0).flatten().nonzero().flatten()
    lengths = starts.diff(append=starts.new_tensor([positions.numel()])).tolist()

    def attend(q: Heads, k: KeyHeads, v: KeyHeads, window: int | None) -> Heads:
        if torch.compiler.is_compiling():  # every batch has other lengths, and would have a program of its own
            return masked_attention(positions, q, k, v, window)
        pieces = [x.transpose(0, 1).flatten(1, 2)[None].split(lengths, 2) for x in (q, k, v)]
        output = torch.cat([causal_attention(*piece, window=window) for piece in zip(*pieces, strict=True)], 2)
        return output[0].unflatten(1, positions.shape).transpose(0, 1)

    return attend


def masked_attention(
    positions: Int[Tensor, "#b t"], q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None
) -> Heads:
    """Attend over whole rows: a key is seen if it is no further back than the query is into its document."""
    index = torch.arange(positions.shape[1], device=positions.device)
    distance = index[:, None] - index
    reach = positions if window is None else positions.clamp(max=window - 1)
    mask = (distance >= 0) & (distance <= reach[..., None])
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)


def flex_document_attention(document: Int[Tensor, "b t"]) -> Attend:
    """Return FlexAttention in one kernel, which skips blocks of tokens of different documents."""
    rows, length = document.shape
    flex_attention, create_block_mask = compiled_flex_attention()

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
def compiled_flex_attention() -> tuple[Callable, Callable]:
    """FlexAttention and the maker of its masks, imported and compiled when first needed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


class SharedPrefixAttention:
    """A prefix and several continuations, in one row; nothing is kept.

    `branch` is 0 for the prefix, which every branch sees, and numbers the branches, none of which sees
    another. So the keys and values of the prefix are computed once for all of them. A model is called with
    positions that continue from the prefix in each branch.
    """

    def __init__(self, branch: Int[Tensor, "b t"]) -> None:
        index = torch.arange(branch.shape[1], device=branch.device)
        keys = branch[:, None, :]
        self.mask = ((index[:, None] >= index) & ((keys == 0) | (keys == branch[..., None])))[:, None]  # b 1 t t

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        mask = self.mask
        if window is not None:
            depth = mask.sum(-1)  # a token sees all before it in its branch, and so knows its place
            mask = mask & (depth[..., None] - depth[..., None, :] < window)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


class KVCache:
    """Keys and values of tokens already seen, one row a sequence, each filled from the left.

    `at(positions)` says where the next tokens go. A token attends to the positions up to its own, so
    whatever lies beyond, padding included, is never seen and is overwritten when its turn comes.
    `like` is a tensor of the model's dtype and device.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, *, like: Tensor) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.resolved_head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def view(self, positions: Int[Tensor, "b t"], first: int = 0) -> "KVCacheView":
        """The rows from `first` on, about to take tokens at positions that rise by one along each row."""
        return KVCacheView(self, positions, first)

    def move(self, source: int, target: int, length: int) -> None:
        """A row's first tokens take the place of another's."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]


class KVCacheView:
    """Rows of a cache about to take the tokens of these positions."""

    def __init__(self, cache: KVCache, positions: Int[Tensor, "b t"], first: int = 0) -> None:
        rows, length = positions.shape
        self.keys, self.values = (tensor[:, first : first + rows] for tensor in (cache.keys, cache.values))
        self.rows = torch.arange(rows, device=positions.device)[:, None]
        self.positions = positions
        self.end = int(positions.max()) + 1
        key_positions = torch.arange(self.end, device=positions.device)
        self.distance = (positions[..., None] - key_positions)[:, None]  # b 1 t s
        self.mask = self.distance >= 0
        # The same for all layers, so it is looked at once whether anything is hidden at all.
        self.is_prefill, self.mask_is_full = length == self.end, bool(self.mask.all())
        self.mask_bias = torch.zeros(self.mask.shape, dtype=cache.keys.dtype, device=positions.device)
        self.mask_bias.masked_fill_(~self.mask, float("-inf"))

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.positions] = k.transpose(1, 2)
        values[self.rows, :, self.positions] = v.transpose(1, 2)
        seen_keys, seen_values = keys[:, :, : self.end], values[:, :, : self.end]
        if window is not None and window < self.end:
            mask = self.mask & (self.distance < window)
        elif self.is_prefill:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            mask = None if self.mask_is_full else self.mask_bias
        return F.scaled_dot_product_attention(q, seen_keys, seen_values, mask, enable_gqa=True)
