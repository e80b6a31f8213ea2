"""What a layer keeps for its backward: everything, what is dear to compute, or nothing but its input.

Chen et al. 2016, https://arxiv.org/abs/1604.06174; the selective form is Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, chosen by operator: products of matrices and attention are kept, and norms,
rotations, activations and residuals, which cost memory traffic and no products, are computed again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, assert_never

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["selective", "full"] | None
LayerCall = Callable[..., Any]
"""Calls a layer with its arguments."""

_aten = torch.ops.aten
MATMUL_OPS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten._grouped_mm.default: 0}
"""The matrix products, and which of their arguments is the left factor."""
SAVED_OPS = {
    *MATMUL_OPS,
    *(_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default),
    *(_aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default),
}


def checkpoint_wrapper(kind: Checkpointing, intermediate_size: int | None = None) -> LayerCall:
    """Return a function that calls a layer and keeps no more than `kind` allows. Results are bitwise identical.

    A layer may end with a product whose left factor has `intermediate_size` columns, to which only the layer's input is
    added. That product is not kept: backward has no use for it, and recomputation ends before it.
    """
    match kind:
        case None:
            return call_layer
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, partial(_policy, intermediate_size))
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        case "full":
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        case _:
            assert_never(kind)


def call_layer(layer: Callable[..., Any], *args: Any) -> Any:
    """Call a layer and keep everything for its backward."""
    return layer(*args)


def _policy(intermediate_size: int | None, context: Any, operator: Any, *args: Any, **_: Any) -> CheckpointPolicy:
    is_last = operator in MATMUL_OPS and args[MATMUL_OPS[operator]].shape[-1] == intermediate_size
    return CheckpointPolicy.MUST_SAVE if operator in SAVED_OPS and not is_last else CheckpointPolicy.PREFER_RECOMPUTE
