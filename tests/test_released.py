"""The released SmolLM2-135M-Instruct, as llama.cpp rounded it to 4 bits (Q4_1): what random weights cannot show.

`make .released` brings the file. It is not the original bfloat16 release: its matrices are on Q4_1's grid.
"""

import pytest
import torch
from conftest import RELEASED, needs_released

from smolforge.checkpoint import loading
from smolforge.models.decoder import LanguageModel
from smolforge.models.stats import parameter_counts

pytestmark = needs_released


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return loading.load(RELEASED)


def test_released_model_has_the_published_shape(model):
    assert sum(parameter_counts(model.config).values()) == 134_515_008
    assert model.tokenizer is not None
    assert torch.stack([weight.isfinite().all() for weight in model.parameters()]).all()
