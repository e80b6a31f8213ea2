"""From final hidden states to the loss, a chunk of tokens at a time: the logits of a whole batch never exist at once.

    states (n c) -> for each chunk of k tokens: logits (k v) -> loss, gradient of the logits
                                                             -> gradients of the chunk's states and of the head

Gradients are computed in the forward, while the logits exist, and wait for the backward. So logits are computed once,
and a batch needs the memory of one chunk. This is Liger Kernel's way: Hsu et al. 2024, https://arxiv.org/abs/2410.10989.

DPO needs each label's log-probability, and its gradient is known only after all of them: there the logits of a chunk
are computed again in the backward.

Axes: b batch, t tokens of a row, n tokens, k tokens of a chunk, c hidden, v vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from smolforge.data.batches import IGNORE_INDEX

Scalar = Float[Tensor, ""]
States, Head, Labels = Float[Tensor, "n c"], Float[Tensor, "v c"], Int[Tensor, " n"]


def chunk_tokens(device: torch.device) -> int:
    """Return the tokens whose logits exist at the same time: enough to keep the device busy, and no more."""
    return 8192 if device.type == "cuda" else 512


def loss_sum(
    hidden: Float[Tensor, "b t c"], head: Head, labels: Int[Tensor, "b t"], *, z_loss: float = 0.0
) -> tuple[Scalar, Scalar]:
    """Return the loss to minimize, in nats summed over all labels but IGNORE_INDEX, and the z-loss in it.

    The loss is the cross-entropy plus `z_loss` times the square of log Z, where Z is the sum over the vocabulary of
    exp(logit): PaLM, section 5, https://arxiv.org/abs/2204.02311. Only the first of the two has a gradient.
    Under autocast the products are in its dtype; softmax and sums are in fp32 at least.
    """
    needs_grad = torch.is_grad_enabled()
    return _LossSum.apply(hidden.flatten(0, 1), head, labels.flatten(), z_loss, needs_grad)


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: States, head: Head, labels: Labels, z_loss: float, needs_grad: bool
    ) -> tuple[Scalar, Scalar]:
        of_states, of_head = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        loss, z, *gradients = chunked_loss(states, head, labels, z_loss=z_loss, of_states=of_states, of_head=of_head)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(z)
        return loss + z, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        of_states, of_head = (grad if grad is None else grads[0] * grad for grad in ctx.saved_tensors)
        return of_states, of_head, None, None, None


def chunked_loss(
    states: States, head: Head, labels: Labels, *, z_loss: float, of_states: bool, of_head: bool
) -> tuple[Scalar, Scalar, States | None, Head | None]:
    """Return cross-entropy, z-loss, and the gradients of their sum that are needed."""
    dtype = product_dtype(states)
    states_grad = torch.empty_like(states) if of_states else None
    head_grad = torch.zeros_like(head, dtype=at_least_fp32(dtype)) if of_head else None
    loss = z = states.new_zeros((), dtype=at_least_fp32(dtype))
    factor = head.to(dtype)
    for chunk, part, logits in chunks_of_logits(states, factor):
        part_loss, part_z = logits_to_gradient(logits, labels[chunk], z_loss)
        loss, z = loss + part_loss, z + part_z
        if states_grad is not None:
            states_grad[chunk] = logits @ factor
        if head_grad is not None:
            add_product(head_grad, logits.T, part)
    return loss, z, states_grad, head_grad


def chunks_of_logits(states: States, factor: Head) -> Iterator[tuple[slice, States, Float[Tensor, "k v"]]]:
    """Yield slices of tokens, their states and logits, in one reused buffer: new memory costs 5 % on a CPU."""
    size = chunk_tokens(states.device)
    buffer = states.new_empty((min(size, len(states)), len(factor)), dtype=factor.dtype)
    for start in range(0, len(states), size):
        part = states[start : start + size].to(factor.dtype)
        yield slice(start, start + size), part, torch.mm(part, factor.T, out=buffer[: len(part)])


def logits_to_gradient(logits: Float[Tensor, "k v"], labels: Int[Tensor, " k"], z_loss: float) -> tuple[Scalar, Scalar]:
    """Return cross-entropy and z-loss of a chunk; turn its logits into the gradient of their sum, in place."""
    wide = logits.to(at_least_fp32(logits.dtype))
    counts = (labels != IGNORE_INDEX)[:, None]
    label = labels[:, None].where(counts, 0)
    log_p, log_z, total = logits_to_odds(wide, label)
    slope = 1 + 2 * z_loss * log_z  # of loss and z-loss along log Z, whose own gradient is the softmax
    logits.copy_(wide.mul_(counts * slope / total))
    # The label's entry anew, for p - 1 is to be rounded after the difference, not before.
    logits.scatter_(-1, label, (counts * (log_p.exp() * slope - 1)).to(logits.dtype))
    return -log_p.where(counts, 0).sum(), z_loss * log_z.where(counts, 0).square().sum()


def logits_to_odds(logits: Float[Tensor, "k v"], label: Int[Tensor, "k 1"]) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each label, log Z, and the sum (k 1) of the odds against the likeliest, which the logits become."""
    top, of_label = logits.amax(-1, keepdim=True), logits.gather(-1, label)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return of_label - top - total.log(), top + total.log(), total


def label_log_probs(hidden: Float[Tensor, "b t c"], head: Head, labels: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Return the log-probability of each label, 0 where there is none; in fp32 at least, with a gradient."""
    return _LabelLogProbs.apply(hidden.flatten(0, 1), head, labels.flatten()).view_as(labels)


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: States, head: Head, labels: Labels) -> Float[Tensor, " n"]:
        ctx.save_for_backward(states, head, labels)
        ctx.dtype = product_dtype(states)
        log_probs = torch.empty(len(states), dtype=at_least_fp32(ctx.dtype), device=states.device)
        for chunk, _, logits in chunks_of_logits(states, head.to(ctx.dtype)):
            counts = labels[chunk] != IGNORE_INDEX
            label = labels[chunk].where(counts, 0)[:, None]
            log_p, _, _ = logits_to_odds(logits.to(log_probs.dtype), label)
            log_probs[chunk] = log_p[:, 0].where(counts, 0)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        states, head, labels = ctx.saved_tensors
        of_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=at_least_fp32(ctx.dtype)) if ctx.needs_input_grad[1] else None
        factor = head.to(ctx.dtype)
        for chunk, part, logits in chunks_of_logits(states, factor):
            logits_to_gradient(logits, labels[chunk], 0.0)  # of -log p
            logits.mul_(-grads[0][chunk, None])
            if of_states is not None:
                of_states[chunk] = logits @ factor
            if of_head is not None:
                add_product(of_head, logits.T, part)
        return of_states, of_head, None


def add_product(total: Head, left: Float[Tensor, "v k"], right: Float[Tensor, "k c"]) -> None:
    """total += left @ right, kept in the precision of the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def product_dtype(states: States) -> torch.dtype:
    """What a matrix product of these would be in here: autocast leaves float64 alone."""
    device = states.device.type
    lowered = torch.is_autocast_enabled(device) and states.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowered else states.dtype


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
