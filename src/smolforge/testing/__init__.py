"""Small real objects for tests: a model, a tokenizer, a text, and fault injection.

disk       file operations that fail, crash or are recorded         hub        a Hub on this machine
power      what a disk may hold after a power loss                  processes  children killed, paused, on a small disk
damage     bits flipped, files cut, zeroed, swapped

Nothing in smolforge imports this.
"""

import functools
from typing import Any

from smolforge.config import ModelConfig
from smolforge.models.decoder import LanguageModel, build
from smolforge.testing.damage import flip_bit as flip_bit
from smolforge.testing.disk import Crash as Crash
from smolforge.testing.disk import crashing as crashing
from smolforge.testing.disk import failing as failing
from smolforge.testing.disk import recorded as recorded
from smolforge.testing.hub import HubMirror as HubMirror
from smolforge.testing.power import after_power_loss as after_power_loss
from smolforge.testing.processes import in_child as in_child
from smolforge.tokenizer import Tokenizer

SENTENCE = "the model reads a token and a token follows another so it learns what follows what"


def tiny_config(**changes: Any) -> ModelConfig:
    """A shape with every feature of the big one: grouped heads, several layers, a tied head."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 10_000.0,
        "initializer_range": 0.1,
    }
    return ModelConfig.model_validate(shape | changes)


def tiny_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE of a few merges, trained on `sentences`; a copy of its own for each caller."""
    return _train_tiny_tokenizer(vocab_size).with_special_tokens([])


@functools.cache
def _train_tiny_tokenizer(vocab_size: int) -> Tokenizer:
    return Tokenizer.train([sentences(400)], vocab_size)


def tiny_model(seed: int = 0, **changes: Any) -> LanguageModel:
    """A model with random weights and a tokenizer that fits it."""
    model = build(tiny_config(**changes), seed)
    model.tokenizer = tiny_tokenizer(model.config.vocab_size)
    return model.eval()


def sentences(count: int, start: int = 0) -> str:
    """Lines of simple text, each different from the others, the same every time."""
    words = SENTENCE.split()
    lines = []
    for number in range(start, start + count):
        chosen = [words[(number * 7 + position * (number % 5 + 1)) % len(words)] for position in range(9)]
        lines.append(f"{number}: {' '.join(chosen)}.\n")
    return "".join(lines)
