"""How well a model predicts what was held out of each source of a mixture, and of all together.

All together is a mean over sources, each with the share of the run's training tokens that it has over the whole
schedule: a figure of the same thing at every step, in every stage. What is held out may have other proportions, and
counts in none. Sources of which nothing was held out are left out, and the others' shares are of the rest.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager

from smolforge.data.corpus import HELD_OUT
from smolforge.data.mixture import Mixture
from smolforge.evaluation.text import measure_corpus
from smolforge.model import LanguageModel


def measure_mixture(
    model: LanguageModel,
    mixture: Mixture,
    shares: Mapping[str, float],
    sequence_length: int,
    max_tokens: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
) -> dict[str, float]:
    """loss, perplexity, bits_per_byte, accuracy, and loss_NAME and bits_per_byte_NAME of each source.

    `max_tokens` are divided evenly among the sources.
    """
    measured = {name: corpus for name, corpus in mixture.sources.items() if corpus.size(HELD_OUT)["tokens"]}
    each = None if max_tokens is None else max(1, max_tokens // len(measured))
    found = {
        name: measure_corpus(model, corpus, sequence_length, each, None, precision, intra_document_masking)
        for name, corpus in measured.items()
    }
    whole = sum(shares[name] for name in found)
    parts = {name: shares[name] / whole if whole else 1 / len(found) for name in found}
    loss, accuracy = (sum(parts[name] * found[name][key] for name in found) for key in ("loss", "accuracy"))
    bytes_a_token = sum(parts[name] * found[name]["loss"] / found[name]["bits_per_byte"] for name in found) / math.log(
        2
    )
    told = {f"{key}_{name}": values[key] for name, values in found.items() for key in ("loss", "bits_per_byte")}
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) / bytes_a_token,
        "accuracy": accuracy,
        **told,
    }
