"""What goes around a forward pass changes nothing but time and memory: recomputation, compilation, precision."""

import logging
from functools import partial

import pytest
import torch
from torch._inductor import config as inductor
from torch.profiler import profile

from smolforge.data.batches import IGNORE_INDEX
from smolforge.models.decoder import build
from smolforge.testing import tiny_config
from smolforge.training.objective import Objective

SHAPES = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {"model_type": "starcoder2"},
}
SEPARATOR = 7


def micro_batch(rows=3, length=48, vocabulary=320):
    chance = torch.Generator().manual_seed(5)
    ids = torch.randint(vocabulary, (rows, length), generator=chance)
    ids[:, ::11] = SEPARATOR
    labels = torch.randint(vocabulary, (rows, length), generator=chance)
    labels[0, 40:] = IGNORE_INDEX
    return ids, labels


def outcome(shape, **settings):
    """Sums and gradients of one micro-batch, and bytes held between forward and backward."""
    objective, batch = Objective(build(tiny_config(**shape), seed=1), **settings), micro_batch()
    with profile(profile_memory=True, acc_events=True) as profiler:
        sums = objective(*batch)
    sums["objective"].backward()
    values = [value.detach() for value in sums.values()] + [weight.grad for weight in objective.parameters()]
    return values, sum(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize(
    ("shape", "around"),
    [
        ("llama", {"separator": SEPARATOR, "dtype": "bfloat16"}),
        ("qwen3", {"z_loss": 1e-3}),
        ("mixtral", {"dtype": "bfloat16"}),
        ("starcoder2", {"separator": SEPARATOR}),
    ],
)
def test_activation_checkpointing_changes_only_memory(shape, around):
    expected, kept = outcome(SHAPES[shape], **around)
    for kind in ("selective", "full"):
        found, less = outcome(SHAPES[shape], **around, checkpoint=kind)
        assert all(map(torch.equal, found, expected))
        assert less < 0.85 * kept
        kept = less


OF_A_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"
CASES = [("llama", None), ("llama", "selective"), ("llama", "full"), ("mixtral", None)]


def check_compiled(shape, checkpoint, caplog):
    """To rounding: a compiler may add in another order."""
    expected, _ = outcome(SHAPES[shape])
    with caplog.at_level(logging.WARNING, "smolforge"):
        found, _ = outcome(SHAPES[shape], compiled=True, checkpoint=checkpoint)
    assert [record for record in caplog.records if record.name == "smolforge"] == []
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(OF_A_LEAF)
@pytest.mark.parametrize(("shape", "checkpoint"), CASES[:1])
def test_objective_as_one_program_equals_eager(compiling, monkeypatch, caplog, shape, checkpoint):
    """All of the compiler but the making of kernels, which takes it half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    check_compiled(shape, checkpoint, caplog)


@pytest.mark.long
@pytest.mark.filterwarnings(OF_A_LEAF)
@pytest.mark.parametrize(("shape", "checkpoint"), CASES)
def test_compiled_objective_equals_eager(compiling, caplog, shape, checkpoint):
    check_compiled(shape, checkpoint, caplog)


@pytest.mark.long
@pytest.mark.filterwarnings(OF_A_LEAF)
def test_objective_falls_back_to_eager_without_a_compiler(compiling, caplog, monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    expected, _ = outcome(SHAPES["starcoder2"])
    with caplog.at_level(logging.WARNING, "smolforge"):
        found, _ = outcome(SHAPES["starcoder2"], compiled=True)
    assert all(map(torch.equal, found, expected))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "smolforge"]
    assert said.startswith("torch.compile does not work here, so training goes on without it: InvalidCxxCompiler")
