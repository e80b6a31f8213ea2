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
Through = Callable[..., Any]
"""Calls a layer with what it is given."""

_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten._grouped_mm.default: 0}
"""And which of their arguments is the left factor."""
DEAR = {
    *PRODUCTS,
    *(_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default),
    *(_aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default),
}


def checkpointing(kind: Checkpointing, wide: int | None = None) -> Through:
    """How layers are called so that they keep no more. The numbers stay as they are, to the bit.

    A layer that ends with a product of a factor so `wide`, to which nothing but its input is added, need not keep what
    that gives: its backward has no use for it, and recomputation ends before it.
    """
    match kind:
        case None:
            return plainly
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, partial(_policy, wide))
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        case "full":
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        case _:
            assert_never(kind)


def plainly(layer: Callable[..., Any], *given: Any) -> Any:
    """Everything is kept."""
    return layer(*given)


def _policy(wide: int | None, context: Any, operator: Any, *given: Any, **_: Any) -> CheckpointPolicy:
    is_last = operator in PRODUCTS and given[PRODUCTS[operator]].shape[-1] == wide
    return CheckpointPolicy.MUST_SAVE if operator in DEAR and not is_last else CheckpointPolicy.PREFER_RECOMPUTE
