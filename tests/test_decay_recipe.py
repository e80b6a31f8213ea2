"""Finishing a model that stands on its plateau: recipes/decay-on-yours.toml."""

import pytest
from conftest import NANO

from smolforge.checkpoint import huggingface
from smolforge.config.base import replace_settings
from smolforge.config.load import read_recipe, to_recipe, write_recipe
from smolforge.errors import ConfigError
from smolforge.runs import train
from smolforge.runs.estimate import within_budget
from smolforge.runs.resolve import with_resolved_schedule
from smolforge.testing import tiny_model
from smolforge.training.optim import lr_at_step
from smolforge.training.run_folder import read_records

CHECKPOINTS = "HuggingFaceTB/SmolLM2-135M-intermediate-checkpoints"
PLATEAU = "step-1440000"
SMALL = {
    "train.sequence_length": 32,
    "train.batch_tokens": 128,
    "train.dtype": "float32",
    "train.sample_every": None,
    "report.to": None,
}


def rates(recipe):
    """The learning rate of every step."""
    settled = with_resolved_schedule(recipe, recipe.train.steps).optim
    return [lr_at_step(step, settled.learning_rate, settled.schedule) for step in range(recipe.train.steps)]


def test_decay_recipe_equals_the_published_decay():
    """Step k of n has the rate of the published run's step 1,600,000 + 400,000 k / n; so has what follows a warm-up."""
    ours, published = read_recipe("decay-on-yours"), read_recipe("smollm2-135m")
    optim = {name: value for name, value in ours.optim if name != "schedule"}
    assert optim == {name: value for name, value in published.optim if name != "schedule"}
    assert ours.train.batch_tokens == published.train.batch_tokens
    assert ours.train.sequence_length == published.train.sequence_length
    assert ours.train.micro_batch_size == "auto", "no device holds a step of 512 rows at once"
    length, begin = 400_000, published.train.steps - 400_000
    whole = rates(replace_settings(ours, {"optim.schedule.warmup_steps": 0}))
    schedule = published.optim.schedule.resolved(published.train.steps)
    for step, rate in enumerate(whole):
        there = begin + length * step // len(whole)
        assert rate == pytest.approx(lr_at_step(there, published.optim.learning_rate, schedule))
    assert whole[0] == 3e-3
    assert len(rates(ours)) == 1000
    warm, rest = rates(ours)[:40], rates(ours)[40:]
    assert warm == pytest.approx([3e-3 * (step + 1) / 40 for step in range(40)])
    assert rest == pytest.approx([3e-3 * (1 - step / 960) for step in range(960)])
    assert ours.optim.schedule.warmup_steps == round(2 / (1 - ours.optim.betas[1]))


def test_decay_recipe_starts_at_the_last_plateau_checkpoint():
    recipe = read_recipe("decay-on-yours")
    assert recipe.init_from == f"{CHECKPOINTS}@{PLATEAU}"
    step, decay = int(PLATEAU.removeprefix("step-")), 1_600_000
    assert step % 240_000 == 0
    assert step <= decay < step + 240_000


@pytest.mark.parametrize("tokens", ["30K", "500K", "20M", "5B"])
@pytest.mark.parametrize("warmup", [0, 40])
def test_decay_recipe_decays_within_any_budget(tokens, warmup):
    changes = {"budget": f"{tokens}-tokens", "optim.schedule.warmup_steps": warmup}
    recipe = within_budget(replace_settings(read_recipe("decay-on-yours"), changes))
    found = rates(recipe)
    rise = max(step for step, rate in enumerate(found) if rate == pytest.approx(3e-3))  # the fall starts at the peak
    assert rise <= (len(found) / 10 if warmup else 0)
    assert max(found) == pytest.approx(3e-3)
    assert all(a > b for a, b in zip(found[rise:], found[rise + 1 :], strict=False))
    settled = with_resolved_schedule(recipe, recipe.train.steps).optim
    assert found[-1] < 1.5 * 3e-3 / (len(found) - rise)
    assert lr_at_step(recipe.train.steps, 3e-3, settled.schedule) == 0.0


@pytest.fixture
def published(hub, tmp_path):
    """The Hub's repository in small: other weights on main than at the step that is asked for."""
    for seed, revision in ((1, "main"), (2, PLATEAU)):
        model = tiny_model(seed)
        huggingface.save(model, tmp_path / revision, model.tokenizer)
        commit = hub.add(CHECKPOINTS, tmp_path / revision, revision)
    return commit


def test_decay_recipe_finishes_the_hub_checkpoint(published, tmp_path, text_file):
    run = train("decay-on-yours", tmp_path / "run", data=str(text_file), budget="2K-tokens", **SMALL)
    assert run.recipe.init_from == f"{CHECKPOINTS}@{published}"
    assert run.recipe.model.num_hidden_layers == 2
    found = [record["learning_rate"] for record in read_records(run.folder / "metrics.jsonl")]
    assert len(found) == run.recipe.train.steps == 15
    assert found == pytest.approx([3e-3 * (1 - step / 15) for step in range(15)])
    again = train("decay-on-yours", tmp_path / "run", data=str(text_file), budget="2K-tokens", **SMALL)
    assert again.metrics["step"] == 15
    with pytest.raises(ConfigError, match="goes beyond the schedule's 15 steps, where the learning rate is 0"):
        train("decay-on-yours", tmp_path / "run", data=str(text_file), steps=20, **SMALL)


def test_decay_recipe_starts_from_the_named_revision(published, tmp_path, text_file):
    """The first loss is the one model's, not the other's."""
    losses = {}
    for name, revision in (("a", PLATEAU), ("b", "main")):
        given = SMALL | {"init_from": f"{CHECKPOINTS}@{revision}", "train.steps": 1, "optim.schedule.warmup_steps": 0}
        run = train("decay-on-yours", tmp_path / name, data=str(text_file), **given)
        losses[revision] = run.metrics["loss"]
    default = SMALL | {"train.steps": 1, "optim.schedule.warmup_steps": 0}
    run = train("decay-on-yours", tmp_path / "c", data=str(text_file), **default)
    assert run.metrics["loss"] == losses[PLATEAU] != losses["main"]


def test_decay_recipe_finishes_a_local_run(tmp_path, text_file):
    """Stopped on its plateau; with its moments the first rate is the peak, and the last all but none."""
    plateau = to_recipe(NANO | {"optim": {"learning_rate": 3e-3, "schedule": {"warmup_steps": 2, "decay": "none"}}})
    (tmp_path / "plateau.toml").write_text(write_recipe(plateau))
    train(tmp_path / "plateau.toml", tmp_path / "plateau", data=str(text_file))
    given = SMALL | {"init_from": str(tmp_path / "plateau"), "init_moments": True, "optim.schedule.warmup_steps": 0}
    run = train("decay-on-yours", tmp_path / "run", data=str(text_file), steps=4, **given)
    found = [record["learning_rate"] for record in read_records(run.folder / "metrics.jsonl")]
    assert found == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
