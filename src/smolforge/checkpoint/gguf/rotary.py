"""Rotary scaling as llama.cpp has it: two settings for `linear`, a tensor of divisors for `llama3`.

    rope.scaling.type linear, rope.scaling.factor 4        rope_freqs.weight  1, 1 ... 2.6, 7.1 ... 32, 32

The divisors are what Llama 3's settings make of each frequency. The settings themselves are in no file, so they are
derived again: from one divisor to the next, frequency and divisor decide where the change begins and where it ends.

Axes: f pairs of a head's channels, each with its frequency.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from smolforge.checkpoint.families import parse_rope_scaling
from smolforge.config import ModelConfig
from smolforge.config.model import ROPE_SETTINGS, RopeScaling
from smolforge.errors import InvalidFileError
from smolforge.models.decoder import inverse_frequencies

FREQUENCIES = "rope_freqs.weight"
SCALING_TYPE, SCALING_FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
HIGH_FREQ_FACTOR = 4.0
"""Llama 3's own; with low_freq_factor 1 it decides what too few divisors leave open."""
TOLERANCE = 1e-5
"""Of divisors that are equal but for the rounding of fp32."""
Divisors = Float[Tensor, " f"]


def pop_scaling(settings: dict[str, Any], source: str) -> RopeScaling:
    """Remove the settings of linear scaling and return them, as llama.cpp understands them.

    Raises InvalidFileError for a type that is not implemented.
    """
    kind, old_factor = settings.pop(SCALING_TYPE, "linear"), settings.pop(OLD_FACTOR, 0.0)
    factor = settings.pop(SCALING_FACTOR, old_factor)
    if kind not in ("none", "linear"):
        raise InvalidFileError(
            f"{source}: {SCALING_TYPE} is {str(kind)[:40]}, which is not implemented; none and linear are"
        )
    if kind == "none" or factor in (0, 1):
        return RopeScaling()
    return parse_rope_scaling({"rope_type": "linear", "factor": factor}, f"{source}: {SCALING_FACTOR}")


def scaling_settings(scaling: RopeScaling) -> dict[str, Any]:
    """Return the settings of linear scaling; of other types there are none."""
    return {SCALING_TYPE: "linear", SCALING_FACTOR: scaling.factor} if scaling.rope_type == "linear" else {}


def frequency_divisors(config: ModelConfig) -> Divisors:
    """Return by what `llama3` scaling divides each frequency, bit-for-bit as llama.cpp's converter has it."""
    factor, low, high, context = (config.rope_scaling.__dict__[name] for name in ROPE_SETTINGS["llama3"])
    wavelength = 2 * math.pi / unscaled_frequencies(config)
    share = (context / wavelength - low) / (high - low)
    shorter = torch.where(wavelength < context / high, torch.ones(()), 1 / ((1 - share) / factor + share))
    return torch.where(wavelength > context / low, torch.tensor(factor), shorter)


def scaling_of_divisors(divisors: Divisors, config: ModelConfig, source: str) -> RopeScaling:
    """Return the `llama3` scaling that has these divisors, with low_freq_factor 1, which leaves all of them possible.

    Raises InvalidFileError where none has.
    """
    if config.rope_scaling != RopeScaling() or divisors.shape != (config.resolved_head_dim // 2,):
        raise InvalidFileError(
            f"{source} has {FREQUENCIES} that does not fit: one divisor for each two channels of a head is "
            f"implemented, without {SCALING_FACTOR} beside it"
        )
    scaling = derive_llama3(divisors, config)
    if scaling is None:
        raise InvalidFileError(f"{source} has divisors in {FREQUENCIES} that are not Llama 3's, which alone are read")
    return scaling


def derive_llama3(divisors: Divisors, config: ModelConfig) -> RopeScaling | None:
    """Return the scaling that has these divisors, None where none has."""
    if not bool((divisors >= 1).all() and divisors.isfinite().all()):
        return None
    context, high = fit_llama3(divisors.double(), unscaled_frequencies(config).double())
    if not math.isfinite(context + high):
        return None
    values = (float(f"{divisors.max():.6g}"), 1.0, round(high, 3), round(context))
    try:
        scaling = RopeScaling(rope_type="llama3", **dict(zip(ROPE_SETTINGS["llama3"], values, strict=True)))
    except ValidationError:
        return None
    scaled = frequency_divisors(config.model_copy(update={"rope_scaling": scaling}))
    return scaling if torch.allclose(scaled, divisors, rtol=TOLERANCE, atol=0) else None


def fit_llama3(divisors: Divisors, frequency: Divisors) -> tuple[float, float]:
    """Return the original context and high_freq_factor of divisors, where low_freq_factor is 1; 0 where there are none.

    A channel between the two ends turns context * frequency / 2 pi = 1 + share * (high - 1) times within the context.
    """
    factor, turns = divisors.max(), frequency / (2 * math.pi)
    unchanged, full = divisors <= 1 + TOLERANCE, divisors >= factor * (1 - TOLERANCE)
    between = ~(unchanged | full)
    share = ((1 / divisors - 1 / factor) / (1 - 1 / factor))[between]
    if between.sum() > 1:
        equations = torch.stack([turns[between], -share], 1)
        context, high = torch.linalg.lstsq(equations, 1 - share).solution.tolist()
        return context, high
    if between.any():
        return ((1 + share * (HIGH_FREQ_FACTOR - 1)) / turns[between]).item(), HIGH_FREQ_FACTOR
    if not (unchanged.any() and full.any()):
        return 0.0, HIGH_FREQ_FACTOR
    return (HIGH_FREQ_FACTOR / turns[unchanged].min() / turns[full].max()).sqrt().item(), HIGH_FREQ_FACTOR


def unscaled_frequencies(config: ModelConfig) -> Divisors:
    return inverse_frequencies(config.model_copy(update={"rope_scaling": RopeScaling()}))
