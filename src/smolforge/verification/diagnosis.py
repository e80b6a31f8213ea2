"""Why a model does not say what it should: every known mistake is tried, and the one that fits is named."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.verification import reference_model
from smolforge.verification.reference_model import RIGHT, Reading, Weights
from smolforge.verification.releases import Golden
from smolforge.verification.transformers_reference import tolerance

UNKNOWN = "none of the known mistakes explains it"
CLEAR = 0.1
"""A mistake explains a difference when less than this share of it remains."""
SWAPS = (("k_proj", "v_proj"), ("q_proj", "o_proj"), ("gate_proj", "up_proj"))


def of_code(weights: Weights, config: ModelConfig, ids: Sequence[int], ours: Float[Tensor, "t v"]) -> str:
    """The mistake that makes the definition say what our code says about the same weights."""
    tried = {name: _distance(weights, config, ids, reading, ours) for name, reading in _all(config)}
    right = _distance(weights, config, ids, RIGHT, ours)
    best = min(tried, key=lambda name: tried[name])
    return f"this code makes a mistake: {best}" if tried[best] < CLEAR * right else UNKNOWN


def _all(config: ModelConfig) -> Iterator[tuple[str, Reading]]:
    for name, reading in reference_model.mistakes(config).items():
        yield name.replace("rope_theta", "it uses").replace(" fits", ""), reading


def _distance(weights: Weights, config: ModelConfig, ids: Sequence[int], reading: Reading, wanted: Tensor) -> float:
    try:
        found = reference_model.logits(weights, config, torch.tensor(ids), reading)
    except (KeyError, RuntimeError):  # a reading that these weights do not fit
        return float("inf")
    return (found - wanted).abs().max().item()


def of_files(weights: Weights, config: ModelConfig, golden: Sequence[Golden]) -> str:
    """The change to the files after which the definition says what the release says."""

    def fits(changed: Weights, reading: Reading = RIGHT) -> bool:
        return all(agrees(lambda ids: reference_model.logits(changed, config, ids, reading), entry) for entry in golden)

    for name, changed, reading in candidates(weights, config):
        try:
            if fits(changed(), reading):
                return name
        except (KeyError, RuntimeError):  # a reading that these weights do not fit
            continue
    return f"{UNKNOWN}; the weights may be another model's, or damaged"


def candidates(weights: Weights, config: ModelConfig) -> Iterator[tuple[str, Callable[[], Weights], Reading]]:
    """(name, weights, reading) of every mistake a file may have, the cheap and frequent first."""
    for name, reading in reference_model.mistakes(config).items():
        yield f"the files have a mistake: {name}", lambda: weights, reading
    for one, other in combinations(range(config.num_hidden_layers), 2):
        yield (
            f"the files have a mistake: swapped tensors, layers {one} and {other} are in each other's place",
            lambda one=one, other=other: reference_model.with_layers_exchanged(weights, one, other),
            RIGHT,
        )
    for layer in range(config.num_hidden_layers):
        for pair in SWAPS:
            yield (
                f"the files have a mistake: swapped tensors, {pair[0]} and {pair[1]} of layer {layer}",
                lambda layer=layer, pair=pair: swapped_in(weights, layer, *pair),
                RIGHT,
            )


def swapped_in(weights: Weights, layer: int, one: str, other: str) -> dict[str, Tensor]:
    """The same weights with two parts of one layer exchanged."""
    inside = {name: weight for name, weight in weights.items() if f"model.layers.{layer}." in name}
    return {**weights, **reference_model.exchanged(inside, one, other)}


@torch.inference_mode()
def agrees(logits: Callable[[Tensor], Tensor], entry: Golden) -> bool:
    """Whether logits (t, v) of ids (t) give an entry's greedy ids and, where they are known, its first logits.

    One forward over prompt and continuation; one near tie of the top two counts for either.
    """
    count = len(entry.greedy_ids)
    out = logits(torch.tensor([*entry.prompt_ids, *entry.greedy_ids]))[-count - 1 : -1]
    greedy = torch.tensor(list(entry.greedy_ids))
    behind = (out.amax(-1) - out.gather(-1, greedy[:, None])[:, 0])[out.argmax(-1) != greedy]
    if len(behind) > 1 or not bool((behind <= tolerance(out.abs().max().item())).all()):
        return False
    known = torch.tensor(list(entry.top_logits), dtype=out.dtype)
    found = out[0, torch.tensor(list(entry.top_ids), dtype=torch.int64)]
    return bool(torch.isclose(found, known, rtol=entry.rel_tolerance, atol=entry.abs_tolerance).all())
