"""Choose a model's integers by what they do to a text, not one by one: GPTQ.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. A linear layer's output on a text changes in squares by

    sum over rows w of  (w - q) H (w - q)^T / 2        H = 2 X^T X, of the layer's inputs X, a row each token

where q is what the integers of w stand for. Columns are rounded one after the other, and the error of each is made up
for by those that are still to come:

    e = (w[j] - q[j]) / U[j, j]        w[k] -= e U[j, k] for k > j        U^T U = H^-1, U upper triangular

The columns with the largest inputs come first, while many others can still make up for them. The grid of a group
(its scale and zero) is fixed before, of neighbours in the matrix's own order, so files need no order of their own.

    rows of a text -> embedding -> layer 1: inputs of each linear layer -> its integers -> its outputs -> layer 2 ...

Axes: o outputs, i inputs, b rows of a text, t tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int8
from torch import Tensor, nn

from smolforge.errors import InvalidFileError
from smolforge.evaluation.perplexity import TOKENS
from smolforge.models.decoder import Hidden, LanguageModel
from smolforge.models.quantized import (
    Grid,
    dequantize,
    nearest_integers,
    quantized_layers,
    search_grid,
)

DAMPING = 0.01
"""Of the mean of H's diagonal, added to all of it: inputs that hardly differ on the text may differ on others."""
BLOCK = 128
"""Columns whose errors reach the columns after them in one product."""
Hessian = Float64[Tensor, "i i"]


@torch.inference_mode()
def calibrate(
    model: LanguageModel,
    original: LanguageModel,
    rows: Int[Tensor, "b t"],
    *,
    on_progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Choose the integers of a quantized model's layers by the rows of a text, in place.

    `original` is the model before. A layer's inputs are those that the calibrated layers before it give. Embedding and
    head stay as they are. `on_progress` is called with 1 after each layer. Raises InvalidFileError where the model
    gives no numbers.
    """
    originals = dict(zip(model.model.layers, original.model.layers, strict=True))

    def calibrate_layer(layer: nn.Module, x: Hidden, *args: Any) -> tuple[Hidden, float]:
        chunks = x.split(max(1, TOKENS // x.shape[1]))
        hessians = input_hessians(originals[layer], chunks, *args)
        for name, linear in quantized_layers(layer).items():
            weight = originals[layer].get_submodule(name).get_parameter("weight")
            hessian = hessians.get(name, weight.new_zeros([weight.shape[1]] * 2, dtype=torch.float64))
            grid = search_grid(weight, linear.scheme, hessian.diagonal())
            linear.fill(solve(weight, hessian, grid, bits=linear.bits), grid)
        on_progress(1)
        return torch.cat([layer(chunk, *args)[0] for chunk in chunks]), 0.0

    model.hidden_states_and_aux_loss(rows, call=calibrate_layer)


def input_hessians(layer: nn.Module, chunks: tuple[Hidden, ...], *args: Any) -> dict[str, Hessian]:
    """Return H of every linear layer that a decoder layer calls, by its name."""
    hessians: dict[str, Hessian] = {}
    last: list[Tensor] = [torch.empty(0)] * 2  # an input, and its product: q, k and v have the same

    def add(name: str, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0] is not last[0]:
            tokens = inputs[0].flatten(0, -2)
            last[:] = inputs[0], (2 * tokens.T @ tokens).double()
        hessians[name] = hessians[name] + last[1] if name in hessians else last[1]

    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    handles = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
    try:
        for chunk in chunks:
            layer(chunk, *args)
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(hessian.isfinite().all()) for hessian in hessians.values()):
        raise InvalidFileError("the model gives states that are no numbers; its weights are damaged")
    return hessians


def solve(weight: Float[Tensor, "o i"], hessian: Hessian, grid: Grid, *, bits: int) -> Int8[Tensor, "o i"]:
    """Return the integers of a matrix on a grid that change its output least, as far as GPTQ finds them.

    A row keeps the nearest integers where those are better. Inputs that are always 0 are rounded to the nearest.
    """
    nearest = nearest_integers(weight, grid, bits)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    chosen = torch.empty_like(nearest)
    chosen[:, order] = _round_in_order(weight, hessian, grid, bits=bits, order=order)
    errors = [output_error(weight, dequantize(part, *grid), hessian) for part in (chosen, nearest)]
    return torch.where((errors[0] <= errors[1])[:, None], chosen, nearest)


def output_error(
    weight: Float[Tensor, "o i"], rounded: Float[Tensor, "o i"], hessian: Hessian
) -> Float64[Tensor, " o"]:
    """Return by how much each output changes, in squares over the text."""
    difference = weight.double() - rounded.double()
    return (difference @ hessian * difference).sum(-1) / 2


def _round_in_order(
    weight: Float[Tensor, "o i"], hessian: Hessian, grid: Grid, *, bits: int, order: Int[Tensor, " i"]
) -> Int8[Tensor, "o i"]:
    """Round column after column in an order, each error made up for by the columns after it; in that order."""
    half, size = 2 ** (bits - 1), len(hessian)
    upper = inverse_factor(hessian[order][:, order])
    scale, zero = (part.double()[:, order].T.contiguous() for part in grid.per_weight(size))
    rest = weight.double()[:, order].T.contiguous()
    integers = torch.empty_like(rest)
    for start in range(0, size, BLOCK):
        block = range(start, min(size, start + BLOCK))
        errors = torch.empty_like(rest[block.start : block.stop])
        for j in block:
            integers[j] = ((rest[j] / scale[j]).round_() + zero[j]).clamp_(-half, half - 1)
            errors[j - start] = (rest[j] - (integers[j] - zero[j]) * scale[j]) / upper[j, j]
            rest[j + 1 : block.stop] -= upper[j, j + 1 : block.stop, None] * errors[j - start]
        rest[block.stop :].addmm_(upper[block.start : block.stop, block.stop :].T, errors, alpha=-1)
    return integers.T.to(torch.int8)


def inverse_factor(hessian: Hessian) -> Hessian:
    """Return U, upper triangular, with U^T U the inverse of a damped H; an input that is always 0 stands alone."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal.add_(DAMPING * diagonal.mean())
    diagonal[dead] = 1.0
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
