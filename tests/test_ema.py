"""The average of the weights: what it is, where it is used, and that neither a stop nor a fault changes it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import NANO
from torch import nn
from torch.optim.swa_utils import AveragedModel

from smolforge.checkpoint import loading, training_state
from smolforge.config import Optim
from smolforge.config.base import replace_settings
from smolforge.config.load import to_recipe
from smolforge.data.batches import TokenWindows
from smolforge.data.corpus import Corpus
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation import measure_corpus
from smolforge.models.stats import parameter_counts
from smolforge.runs import callbacks, train
from smolforge.runs.estimate import checkpoint_bytes, training_bytes
from smolforge.testing import tiny_model
from smolforge.training import loop
from smolforge.training.optim import (
    EMA,
    build_optimizers,
    ema_weights,
    load_state_tensors,
    set_found_inf,
    set_lr_scale,
    state_tensors,
)
from smolforge.training.run_folder import read_records

DECAY = 0.9
"""Reached with the 82nd update."""
SHORT = 0.3
"""Reached with the fifth."""


@pytest.fixture
def recipe_file(tmp_path, text_file):
    settings = NANO["train"] | {"steps": 8, "checkpoint_every": 1, "keep_last": 20}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(NANO | {"train": settings, "data": {"sources": [str(text_file)]}}))
    return path


def hashes(run: Path, step: int) -> list[str]:
    files = training_state.check_checkpoint(training_state.checkpoint_dir(run, step))["files"]
    return [files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")]


def share(number: int, decay: float) -> float:
    """Of update `number`, counted from 1."""
    return max(1 - decay, 9 / (number + 8))


# What it is


def walk(model: nn.Module, step: int) -> None:
    drawn = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=drawn, dtype=weight.dtype)


@pytest.mark.parametrize("decay", [SHORT, DECAY])
def test_ema_equals_torch_averaged_model(decay):
    model = nn.Linear(3, 2).double()
    ours = EMA(model.parameters(), decay)
    torchs = AveragedModel(model, avg_fn=lambda average, weight, n: average.lerp(weight, share(int(n) + 1, decay)))
    for step in range(100):
        walk(model, step)
        ours.step()
        torchs.update_parameters(model)
    with ema_weights([ours]):
        torch.testing.assert_close(list(model.parameters()), list(torchs.module.parameters()), rtol=1e-12, atol=1e-12)


def test_ema_equals_a_hand_computation():
    """By hand: the first counts for all, the second for nine tenths, the third for nine elevenths."""
    weight = nn.Parameter(torch.tensor(5.0))
    average = EMA([weight], 0.99)
    for value in (1.0, 2.0, 4.0):
        weight.data.fill_(value)
        average.step()
    assert average.state[weight]["average"].item() == pytest.approx((1 / 10 * 1 + 9 / 10 * 2) * 2 / 11 + 9 / 11 * 4)


def test_ema_ignores_skipped_updates():
    """Even the first: then it goes on as one that never met it, to the bit."""
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [EMA(model.parameters(), DECAY) for model in models]
    set_found_inf(averages[:1], torch.tensor(1.0))
    averages[0].step()
    for step in range(4):
        for model, average in zip(models, averages, strict=True):
            walk(model, step)
            set_found_inf([average], torch.tensor(0.0))
            average.step()
        set_found_inf(averages[:1], torch.tensor(1.0))
        averages[0].step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        for name in ("average", "averaged"):
            assert torch.equal(averages[0].state[one][name], averages[1].state[other][name])


def test_ema_weights_are_swapped_in_only_in_the_context():
    model = tiny_model()
    chosen = build_optimizers(model, Optim(ema_decay=DECAY))
    with ema_weights(chosen):  # before there is one
        pass
    chosen[-1].step()
    walk(model, 1)
    chosen[-1].step()
    before = [(weight.data_ptr(), weight.clone()) for weight in model.parameters()]
    with pytest.raises(KeyboardInterrupt), ema_weights(chosen):
        assert not any(torch.equal(weight, was) for weight, (_, was) in zip(model.parameters(), before, strict=True))
        raise KeyboardInterrupt
    for weight, (place, was) in zip(model.parameters(), before, strict=True):
        assert weight.data_ptr() == place
        assert torch.equal(weight, was)


def test_ema_has_no_learning_rate():
    chosen = build_optimizers(tiny_model(), Optim(ema_decay=DECAY, learning_rate=0.1))
    set_lr_scale(chosen, 0.5)
    assert chosen[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert chosen[-1].param_groups[0]["decay"] == DECAY


@pytest.mark.parametrize("kept", [None, DECAY])
def test_ema_state_and_plain_state_are_not_exchangeable(kept):
    model = tiny_model()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    chosen = build_optimizers(model, Optim(ema_decay=kept))
    for each in chosen:
        each.step()
    tensors = state_tensors(chosen, model)
    load_state_tensors(chosen, model, tensors)
    with pytest.raises(InvalidFileError, match="does not fit this model" if kept else "lacks"):
        load_state_tensors(build_optimizers(model, Optim(ema_decay=None if kept else DECAY)), model, tensors)


# In a run


def test_ema_run_trains_the_same_and_saves_the_ema(tmp_path, recipe_file, monkeypatch):
    """Of the weights that a run without one saved after each step; what is measured, saved and returned is that."""
    plain = train(recipe_file, tmp_path / "plain", **{"optim.name": "muon"})
    sampled, draw = [], callbacks.generate
    monkeypatch.setattr(
        callbacks,
        "generate",
        lambda model, *given, **options: sampled.append(model.lm_head_weight.clone()) or draw(model, *given, **options),
    )
    given = {"optim.name": "muon", "optim.ema_decay": SHORT, "train.sample_every": 8}
    run = train(recipe_file, tmp_path / "run", **given)
    records = [read_records(each.folder / "metrics.jsonl") for each in (plain, run)]
    assert [record["loss"] for record in records[0]] == [record["loss"] for record in records[1]]
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        for name, weight in loading.load(
            training_state.checkpoint_dir(plain.folder, step), torch.float64
        ).named_parameters():
            expected[name] = expected.get(name, weight.detach()).lerp(weight.detach(), share(step, SHORT))
    saved, corpus = loading.load(run.folder), Corpus.open(run.folder / "corpus")
    for name, weight in saved.named_parameters():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(weight, run.model.get_parameter(name))
    assert run.metrics["validation_loss"] == pytest.approx(measure_corpus(saved, corpus, 32)["loss"], rel=1e-6)
    assert run.metrics["validation_loss"] != pytest.approx(plain.metrics["validation_loss"], rel=1e-4)
    assert [torch.equal(head, saved.lm_head_weight) for head in sampled] == [True]
    assert (
        training_state.validation_loss(training_state.checkpoint_dir(run.folder, 8)) == run.metrics["validation_loss"]
    )


def test_ema_resume_is_bit_exact(tmp_path, recipe_file):
    """Copied first, or written while training waits."""
    same = {"optim.schedule.steps": 8, "optim.name": "muon", "optim.ema_decay": SHORT, "train.checkpoint_every": 3}
    train(recipe_file, tmp_path / "once", **same)
    train(recipe_file, tmp_path / "twice", steps=3, **same, **{"train.checkpoint_in_background": False})
    train(recipe_file, tmp_path / "twice", steps=8, **same)
    for step in (3, 8):
        assert hashes(tmp_path / "once", step) == hashes(tmp_path / "twice", step)


def test_ema_decay_is_fixed_and_the_next_run_starts_from_ema(tmp_path, recipe_file):
    given = {"optim.ema_decay": SHORT, "optim.schedule.steps": 8}
    first = train(recipe_file, tmp_path / "first", steps=3, **given)
    with pytest.raises(ConfigError, match=r"must not change: optim.ema_decay \(0.3, now 0.9\)"):
        train(recipe_file, tmp_path / "first", **{"optim.ema_decay": DECAY})
    second = train(recipe_file, tmp_path / "second", steps=1, init_from=str(first.folder), **given)
    batch = TokenWindows(Corpus.open(second.folder / "corpus").tokens("train"), 32, 3).batch(0, 4)
    with torch.no_grad():
        logits = first.model(batch.input_ids).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, batch.labels.flatten())
    assert second.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)


# Numbers that go wrong


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of these batches, counted as they come, no number."""
    computed, met, bad = loop.forward_backward, [], set()

    def backward(*given, **options):
        losses = computed(*given, **options)
        met.append(None)
        return losses | {"loss": torch.tensor(float("nan"))} if len(met) - 1 in bad else losses

    monkeypatch.setattr(loop, "forward_backward", backward)
    return lambda *which: bad.update(which)


def test_ema_is_unchanged_by_a_skipped_step(tmp_path, recipe_file, poison):
    poison(3)
    run = train(recipe_file, tmp_path / "run", steps=5, **{"optim.ema_decay": SHORT})
    assert hashes(run.folder, 3) != hashes(run.folder, 2)
    before, after = (
        training_state.load_checkpoint(training_state.checkpoint_dir(run.folder, step), tiny_model())[0]
        for step in (3, 5)
    )
    assert after["averaged.model.norm.weight"] == before["averaged.model.norm.weight"] + 1


def test_ema_is_restored_by_a_rewind(tmp_path, recipe_file, poison):
    """To step 3; what came of the steps that are taken back is that of a run that had other data there at once."""
    given = {"optim.ema_decay": SHORT, "train.checkpoint_every": 3}
    poison(4, 5, 6)
    run = train(recipe_file, tmp_path / "run", **given)
    told = tmp_path / "told"
    told.mkdir()
    (told / ".lock").touch()
    decision = {"kind": "rewind", "step": 7, "to": 3, "next_batch": 7, "reason": ""}
    (told / "incidents.jsonl").write_text(json.dumps(decision) + "\n")
    train(recipe_file, told, **given)
    assert [record["batch"] for record in read_records(told / "metrics.jsonl")] == [0, 1, 2, 7, 8, 9, 10, 11]
    assert hashes(told, 8) == hashes(run.folder, 8)


# What it costs


def test_ema_is_counted_in_memory_and_disk_estimates():
    plain = to_recipe(NANO)
    with_average = replace_settings(plain, {"optim.ema_decay": DECAY})
    weights = 4 * sum(parameter_counts(plain.model).values())
    for figure in (training_bytes, checkpoint_bytes):
        assert figure(with_average) - figure(plain) == weights
