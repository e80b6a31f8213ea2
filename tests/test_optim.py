"""Optimizers and schedules, held to torch's and Transformers'."""

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from smolforge.config import Optim, Schedule
from smolforge.errors import InvalidFileError
from smolforge.testing import tiny_model
from smolforge.training.optim import (
    Muon,
    build_optimizers,
    load_state_tensors,
    lr_at_step,
    newton_schulz,
    set_lr_scale,
    state_tensors,
)


def rates(schedule, steps, peak=1.0):
    return [lr_at_step(step, peak, schedule) for step in range(steps)]


def theirs(make, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_lr_schedule_equals_transformers():
    """After the warm-up, where ours is one step ahead so that no update has rate 0."""
    ours = rates(Schedule(warmup_steps=10, decay="linear", decay_steps=30, steps=100), 100)
    wsd = theirs(
        lambda optimizer: get_wsd_schedule(optimizer, 10, 30, num_training_steps=100, decay_type="linear"), 100
    )
    assert ours[10:] == pytest.approx(wsd[10:])
    assert ours[:10] == pytest.approx([*wsd[1:10], 1.0])
    ours = rates(Schedule(warmup_steps=10, decay="cosine", steps=100), 100)
    cosine = theirs(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 10, 100), 100)
    assert ours[10:] == pytest.approx(cosine[10:])


def test_lr_schedule_one_minus_sqrt_equals_hand_results():
    ours = rates(Schedule(decay="1-sqrt", decay_steps=16, steps=20), 20)
    assert ours[:5] == [1.0] * 5
    assert ours[4 + 4] == pytest.approx(1 - 0.5)
    assert ours[4 + 9] == pytest.approx(1 - 0.75)


@pytest.mark.parametrize("decay", ["linear", "1-sqrt", "cosine", None])
def test_lr_schedule_is_final_beyond_the_horizon(decay):
    schedule = Schedule(
        warmup_steps=3, decay=decay, decay_steps=None if decay is None else 5, steps=20, final_learning_rate=0.1
    )
    assert (
        lr_at_step(20, 1.0, schedule)
        == lr_at_step(500, 1.0, schedule)
        == (1.0 if decay is None else pytest.approx(0.1))
    )
    assert all(rate > 0 for rate in rates(schedule, 30))


def test_adamw_decays_matrices_only():
    model = tiny_model()
    (adamw,) = build_optimizers(model, Optim(weight_decay=0.5, learning_rate=0.1))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    adamw.step()
    for name, weight in model.named_parameters():
        expected = before[name] * (1 - 0.05) if weight.ndim > 1 else before[name]
        torch.testing.assert_close(weight, expected)


def test_muon_gets_only_matrices_of_the_layers():
    model = tiny_model(tie_word_embeddings=False)
    muon, adamw = build_optimizers(model, Optim(name="muon"))
    names = {weight: name for name, weight in model.named_parameters()}
    assert all("proj" in names[weight] for weight in muon.param_groups[0]["params"])
    rest = {names[weight] for group in adamw.param_groups for weight in group["params"]}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= rest


def test_muon_is_near_torch():
    """torch orthogonalises in bfloat16, so to its rounding."""
    mine, other = (nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours = Muon([mine], 0.02, 0.95, weight_decay=0.1)
    torchs = torch.optim.Muon([other], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    begun = mine.detach().clone()
    for step in range(5):
        grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        mine.grad, other.grad = grad.clone(), grad.clone()
        ours.step()
        torchs.step()
    moved = (other - begun).norm()
    assert (mine - other).norm() / moved < 0.02


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (newton_schulz(matrix) * (u @ v)).sum() / (newton_schulz(matrix).norm() * (u @ v).norm())
    assert cosine > 0.95


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_survives_save_and_load(name):
    def stepped(chosen, model, seed):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        set_lr_scale(chosen, 0.5)
        for each in chosen:
            each.step()

    model = tiny_model()
    chosen = build_optimizers(model, Optim(name=name))
    stepped(chosen, model, 1)
    tensors = {key: tensor.clone() for key, tensor in state_tensors(chosen, model).items()}
    twin = tiny_model(seed=9)
    twin.load_state_dict(model.state_dict())
    again = build_optimizers(twin, Optim(name=name))
    load_state_tensors(again, twin, tensors)
    stepped(chosen, model, 2)
    stepped(again, twin, 2)
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_optimizer_state_of_another_model_is_refused():
    model = tiny_model()
    chosen = build_optimizers(model, Optim())
    with pytest.raises(InvalidFileError, match="does not fit this model"):
        load_state_tensors(chosen, model, {"exp_avg.model.norm.weight": torch.zeros(3)})
    with pytest.raises(InvalidFileError, match="lacks 'model.embed_tokens.weight'"):
        load_state_tensors(chosen, model, {"exp_avg.model.norm.weight": torch.zeros(32)})
