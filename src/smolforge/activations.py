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
DEAR = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten._grouped_mm.default),
    *(_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default),
    *(_aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default),
}


def checkpointing(kind: Checkpointing) -> Through:
    """How layers are called so that they keep no more. The numbers stay as they are, to the bit."""
    match kind:
        case None:
            return plainly
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        case "full":
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        case _:
            assert_never(kind)


def plainly(layer: Callable[..., Any], *given: Any) -> Any:
    """Everything is kept."""
    return layer(*given)


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in DEAR else CheckpointPolicy.PREFER_RECOMPUTE
