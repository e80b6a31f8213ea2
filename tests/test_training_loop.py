"""The loop, held to a plain one of Transformers and torch.optim, and to arithmetic."""

import gc
import itertools
from itertools import count, islice

import numpy as np
import pytest
import torch
from conftest import NANO, get_freeze_count
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from smolforge.config import Optim
from smolforge.config.base import replace_settings
from smolforge.config.load import to_recipe
from smolforge.data.batches import IGNORE_INDEX, Batch, TokenWindows, iterate_batches
from smolforge.data.corpus import Tokens
from smolforge.generation.stream import generate
from smolforge.models.decoder import build
from smolforge.testing import sentences, tiny_config, tiny_model, tiny_tokenizer
from smolforge.training.loop import Callback, Hooks, TrainState, forward_backward, gc_disabled, train
from smolforge.training.loss import loss_sum
from smolforge.training.objective import Objective
from smolforge.training.optim import build_optimizers
from smolforge.training.step_timer import HostClock, StepCost, StepTimer

RECIPE = replace_settings(to_recipe(NANO), {"optim.schedule.steps": 200, "train.checkpoint_every": None})
TOKENS = Tokens([np.array(tiny_tokenizer().encode(sentences(300)))])


def meter():
    return StepTimer(StepCost(128, 1, 1, 1.0), 8, HostClock())


def run(recipe, model, start=0, actions=(), stopping=lambda: False):
    chosen = build_optimizers(model, recipe.optim)
    windows = TokenWindows(TOKENS, recipe.train.sequence_length, recipe.seed)
    source = iterate_batches(windows, count(start), recipe.train.sequences_per_step, num_workers=0)
    return train(
        Objective.from_recipe(model, recipe), chosen, source,
        recipe=recipe, state=TrainState(start), timer=meter(), hooks=Hooks(actions, stopping),
    )  # fmt: skip


def ours(recipe, dtype):
    """Losses of our loop."""
    losses: list[float] = []
    run(
        recipe, build(tiny_config(), 7, dtype), actions=[Callback(1, lambda _, metrics: losses.append(metrics["loss"]))]
    )
    return losses


def theirs(recipe, dtype):
    """The same training, written plainly with other people's parts."""
    model = LlamaForCausalLM(LlamaConfig(**tiny_config().model_dump(exclude={"model_type"}))).to(dtype)
    model.load_state_dict(build(tiny_config(), 7, dtype).state_dict(), strict=False)
    model.tie_weights()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    windows, losses = TokenWindows(TOKENS, recipe.train.sequence_length, recipe.seed), []
    for step in range(recipe.train.steps):
        ids, labels, *_ = windows.batch(step, recipe.train.sequences_per_step)
        fall = max(0.0, (step - 2) / 198)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (step + 1) / 2 if step < 2 else 3e-4 + (3e-3 - 3e-4) * (1 - fall)
        loss = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 20), (torch.float64, 60), pytest.param(torch.float64, 200, marks=pytest.mark.long)],
)
def test_training_trajectory_equals_a_plain_loop(dtype, steps):
    recipe = replace_settings(RECIPE, {"train.steps": steps, "train.dtype": str(dtype).removeprefix("torch.")})
    mine, other = ours(recipe, dtype), theirs(recipe, dtype)
    assert mine == pytest.approx(other, rel=1e-6)
    assert mine[-1] < mine[0]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_gradient_accumulation_equals_the_large_batch(rows):
    """Ragged labels included: a micro-batch counts for as many labels as it has."""
    model, ids = tiny_model(), torch.randint(320, (8, 20))
    labels = ids.roll(-1, 1)
    for row, length in enumerate([20, 1, 7, 20, 3, 0, 12, 20]):
        labels[row, length:] = IGNORE_INDEX
    plain = loss_sum(model.hidden_states(ids), model.lm_head_weight, labels)[0] / (labels != IGNORE_INDEX).sum()
    plain.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    losses = forward_backward(Objective(model), Batch(ids, labels), 83, rows=rows)
    torch.testing.assert_close(losses["loss"], plain.detach(), rtol=1e-6, atol=0)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-4, atol=1e-6)


def test_z_loss_is_minimized_and_reported_separately():
    """Its gradient joins the loss's; the loss that is reported stays the cross-entropy."""
    model, ids = build(tiny_config(), 7, torch.float64), torch.randint(320, (4, 20))
    labels = ids.roll(-1, 1)
    labels[0, 3:] = IGNORE_INDEX
    logits, flat = model(ids).flatten(0, 1), labels.flatten()
    cross_entropy = nn.functional.cross_entropy(logits, flat, ignore_index=IGNORE_INDEX)
    z = 0.01 * logits.logsumexp(-1)[flat != IGNORE_INDEX].square().mean()
    expected = torch.autograd.grad(cross_entropy + z, list(model.parameters()))
    losses = forward_backward(
        Objective(model, z_loss=0.01), Batch(ids, labels), int((labels != IGNORE_INDEX).sum()), rows=3
    )
    torch.testing.assert_close(losses, {"loss": cross_entropy.detach(), "z_loss": z.detach()})
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_z_loss_is_reported_only_where_used():
    said: list[dict] = []
    for weight in (0.0, 1e-2):
        report = Callback(None, lambda _, metrics: said.append(metrics))
        run(
            replace_settings(RECIPE, {"train.z_loss": weight, "train.steps": 2}),
            build(tiny_config(), 7),
            actions=[report],
        )
    assert "z_loss" not in said[0]
    assert said[1]["z_loss"] == pytest.approx(1e-2 * np.log(320) ** 2, rel=0.1)
    assert said[1]["loss"] == pytest.approx(np.log(320), rel=0.1)


def test_training_overfits_a_short_text():
    model = tiny_model()
    text = sentences(2)[:64]
    ids = model.tokenizer.encode(text)[:64]
    tokens = Tokens([np.array([*ids, model.tokenizer.eos_id])])
    recipe = replace_settings(
        RECIPE,
        {
            "train.steps": 150,
            "train.sequence_length": len(ids),
            "train.batch_tokens": len(ids),
            "optim.learning_rate": 1e-2,
        },
    )
    losses: list[float] = []
    source = iterate_batches(TokenWindows(tokens, len(ids), 0), count(), 1, num_workers=0)
    report = Callback(1, lambda _, metrics: losses.append(metrics["loss"]))
    chosen = build_optimizers(model, recipe.optim)
    train(
        Objective.from_recipe(model, recipe), chosen, source,
        recipe=recipe, state=TrainState(), timer=meter(), hooks=Hooks([report]),
    )  # fmt: skip
    assert losses[-1] < 0.01
    first = model.tokenizer.decode(ids[:4])
    (completion,) = generate(model.eval(), [first], temperature=0, max_new_tokens=100)
    assert first + completion.text == model.tokenizer.decode(ids)
    assert completion.finish_reason == "stop"


def test_callbacks_run_at_their_interval_and_at_the_end():
    seen: dict[str, list[int]] = {"three": [], "never": [], "all": []}
    actions = [
        Callback(3, lambda now, _: seen["three"].append(now.step)),
        Callback(None, lambda now, _: seen["never"].append(now.step)),
        Callback(1, lambda now, _: {"extra": now.step}),
        Callback(1, lambda now, metrics: seen["all"].append(metrics["extra"])),
    ]
    end = run(RECIPE, tiny_model(), actions=actions)
    assert seen == {"three": [3, 6, 8], "never": [8], "all": list(range(1, 9))}
    windows = TokenWindows(TOKENS, 32, RECIPE.seed)
    labels = [int((windows.batch(step, 4).labels != IGNORE_INDEX).sum()) for step in range(8)]
    assert end == TrainState(8, sum(labels))


def test_stop_request_finishes_the_step():
    """Looked at once before each; whoever composed the run saves its end."""
    seen: list[str] = []
    looks = itertools.count(1)
    actions = [Callback(None, lambda *_: seen.append("last")), Callback(1, lambda now, _: seen.append(now.step))]
    end = run(RECIPE, tiny_model(), actions=actions, stopping=lambda: next(looks) > 3)
    assert end.step == 3
    assert seen == [1, 2, 3]
    assert next(looks) == 5


def test_gradient_clipping_limits_the_update():
    for limit, moved_more in ((1e-3, False), (None, True)):
        model = build(tiny_config(), 7)
        before = model.lm_head_weight.clone()
        run(
            replace_settings(
                RECIPE, {"optim.max_grad_norm": limit, "optim.eps": 1.0, "optim.weight_decay": 0.0, "train.steps": 1}
            ),
            model,
        )
        assert ((model.lm_head_weight - before).abs().max() > 1e-6) == moved_more


def test_muon_lowers_the_loss():
    recipe = replace_settings(RECIPE, {"optim.name": "muon", "train.steps": 30})
    losses: list[float] = []
    run(recipe, build(tiny_config(), 7), actions=[Callback(1, lambda _, metrics: losses.append(metrics["loss"]))])
    assert losses[-1] < losses[0] - 0.1


def test_batches_start_at_the_given_step():
    windows = TokenWindows(TOKENS, 32, RECIPE.seed)
    (batch,) = islice(iterate_batches(windows, count(5), 4, num_workers=0), 1)
    assert torch.equal(batch.input_ids, windows.batch(5, 4).input_ids)
    assert Optim().betas == (0.9, 0.95)


def test_gc_disabled_keeps_frozen_objects_frozen(monkeypatch):
    monkeypatch.setattr(gc, "get_freeze_count", get_freeze_count)
    gc.unfreeze()
    with gc_disabled():
        assert gc.get_freeze_count() > 10_000
        assert not gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.freeze()
    with gc_disabled():
        pass
    assert gc.get_freeze_count() > 10_000
    assert gc.isenabled()
