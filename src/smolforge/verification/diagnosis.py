"""Diagnose wrong logits: try every known mistake, and name the one that explains them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, product

import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.verification import reference_model
from smolforge.verification.reference_model import CORRECT, ReferenceOptions, Weights
from smolforge.verification.releases import Golden
from smolforge.verification.transformers_reference import tolerance

UNKNOWN = "none of the known mistakes explains it"
MAX_REMAINING = 0.1
"""A mistake explains a difference when less than this share of it remains."""
SWAPS = (("k_proj", "v_proj"), ("q_proj", "o_proj"), ("gate_proj", "up_proj"))


def diagnose_code(
    weights: Weights, config: ModelConfig, ids: Sequence[int], *, our_logits: Float[Tensor, "t v"]
) -> str:
    """Return the mistake with which the reference model gives the logits of our code for the same weights."""

    def distance(options: ReferenceOptions) -> float:
        try:
            logits = reference_model.logits(weights, config, torch.tensor(ids), options=options)
        except (KeyError, RuntimeError):  # options that do not fit these weights
            return float("inf")
        return (logits - our_logits).abs().max().item()

    distances = {name: distance(options) for name, options in reference_model.mistakes(config).items()}
    best = min(distances, key=lambda name: distances[name])
    if distances[best] >= MAX_REMAINING * distance(CORRECT):
        return UNKNOWN
    return f"this code makes a mistake: {best.replace('rope_theta', 'it uses').replace(' fits', '')}"


def diagnose_files(weights: Weights, config: ModelConfig, golden: Sequence[Golden]) -> str:
    """Return the change to the files with which the reference model gives the text of the release."""
    for name, changed, options in file_mistakes(weights, config):
        try:
            logits = partial(reference_model.logits, changed(), config, options=options)
            if all(matches_golden(logits, entry) for entry in golden):
                return f"the files have a mistake: {name}"
        except (KeyError, RuntimeError):  # options that do not fit these weights
            continue
    return f"{UNKNOWN}; the weights may be another model's, or damaged"


def file_mistakes(
    weights: Weights, config: ModelConfig
) -> Iterator[tuple[str, Callable[[], Weights], ReferenceOptions]]:
    """Yield (name, weights, options) of every mistake a file may have, cheap and frequent ones first."""
    for name, options in reference_model.mistakes(config).items():
        yield name, lambda: weights, options
    layers = range(config.num_hidden_layers)
    for one, other in combinations(layers, 2):
        name = f"swapped tensors, layers {one} and {other} are in each other's place"
        yield name, partial(reference_model.swap_layers, weights, one, other), CORRECT
    for layer, pair in product(layers, SWAPS):
        name = f"swapped tensors, {pair[0]} and {pair[1]} of layer {layer}"
        yield name, partial(swap_parts_of_layer, weights, layer, pair), CORRECT


def swap_parts_of_layer(weights: Weights, layer: int, parts: tuple[str, str]) -> dict[str, Tensor]:
    """Return the weights with two parts of one layer swapped."""
    inside = {name: weight for name, weight in weights.items() if f"model.layers.{layer}." in name}
    return {**weights, **reference_model.swap_parts(inside, *parts)}


@torch.inference_mode()
def matches_golden(logits: Callable[[Tensor], Tensor], entry: Golden) -> bool:
    """Return whether logits (t, v) of ids (t) give an entry's greedy ids and its first logits, if it has them.

    One forward over prompt and continuation; one near tie of the top two counts for either.
    """
    count = len(entry.greedy_ids)
    predicted = logits(torch.tensor([*entry.prompt_ids, *entry.greedy_ids]))[-count - 1 : -1]
    greedy = torch.tensor(list(entry.greedy_ids))
    gaps = (predicted.amax(-1) - predicted.gather(-1, greedy[:, None])[:, 0])[predicted.argmax(-1) != greedy]
    if len(gaps) > 1 or not bool((gaps <= tolerance(predicted.abs().max().item())).all()):
        return False
    expected = torch.tensor(list(entry.top_logits), dtype=predicted.dtype)
    top_logits = predicted[0, torch.tensor(list(entry.top_ids), dtype=torch.int64)]
    return bool(torch.isclose(top_logits, expected, rtol=entry.rel_tolerance, atol=entry.abs_tolerance).all())
