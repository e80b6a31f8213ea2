"""Every function of smolforge is checked when it is called: types, and where it has arrays, their shapes."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from smolforge.formatting import format_duration
from smolforge.models.decoder import apply_rope
from smolforge.models.quantized import QuantizationScheme
from smolforge.training.dpo import sum_by_sequence


def test_wrong_types_are_refused():
    with pytest.raises(BeartypeCallHintViolation):
        format_duration("a minute")
    with pytest.raises(BeartypeCallHintViolation):
        QuantizationScheme("eight", None, True)


def test_wrong_shapes_are_refused():
    rotary = (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    assert apply_rope(torch.ones(1, 2, 3, 4), rotary).shape == (1, 2, 3, 4)
    with pytest.raises(BeartypeCallHintViolation):
        apply_rope(torch.ones(2, 3, 4), rotary)


def test_sizes_of_one_name_must_agree():
    numbers, positions = torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.long)
    assert sum_by_sequence(numbers, positions).shape[::2] == (2, 2)
    assert sum_by_sequence(numbers[:1], positions[:1]).shape[::2] == (1, 2)  # a name holds for one call
    with pytest.raises(BeartypeCallHintViolation):
        sum_by_sequence(numbers, positions[:, :3])
