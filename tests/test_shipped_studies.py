"""The studies that ship: each reads, is as equal as its comment says, here and at full size, and runs."""

import tomllib
from pathlib import Path

import pytest
import tomli_w
from test_study import Audience, merged

from smolforge import cli
from smolforge.comparison.study import plan, run_variants
from smolforge.comparison.study.spec import read_study
from smolforge.config import ModelConfig, presets
from smolforge.config.base import replace_settings
from smolforge.models.stats import active_parameters, parameter_counts
from smolforge.testing import sentences

FILES = sorted((Path(__file__).parents[1] / "recipes" / "studies").glob("*.toml"), key=lambda file: file.stem)
WITHIN = 0.01
FULL = {
    "power-of-two": [{"preset": "smollm2-135m"}, {"preset": "pow2-135m"}],
    "power-of-two-int4": [{"preset": "smollm2-135m"}, {"preset": "pow2-135m"}],
    "tied-against-untied": [{"preset": "smollm2-135m-untied"}, {"intermediate_size": 2082}],
    "compact-against-llama": [{}, {"model_type": "starcoder2", "intermediate_size": 2304}],
    "dense-against-experts": [{}, {"model_type": "mixtral", "intermediate_size": 192}],
}
"""What the comments say of the full size, where parameters in all are equal."""
EQUAL = {
    "power-of-two": ["original", "power-of-two"],
    "power-of-two-int4": ["original", "power-of-two"],
    "tied-against-untied": ["untied", "tied-wider"],
    "compact-against-llama": ["llama", "compact"],
    "dense-against-experts": ["dense", "equal-total"],
    "adamw-against-muon": ["adamw", "muon"],
    "wsd-against-cosine": ["wsd", "cosine"],
}


def of(file: str):
    return next(each for each in FILES if each.stem == file)


AS_LONG = [pytest.param(file, marks=pytest.mark.long, id=file.stem) for file in FILES]


def close(sizes) -> bool:
    return max(sizes) <= (1 + WITHIN) * min(sizes)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_study_is_valid_and_has_equal_budgets(file):
    study, spent = read_study(file.stem), {}
    assert study.path.resolve() == file
    for name, recipe in study.recipes.items():
        known = replace_settings(
            recipe, {"train.dtype": "float32", "train.micro_batch_size": 1, "train.compile": False}
        )
        steps = plan.steps_for_budget(study.settings.budget, known, "")
        spent[name] = steps * plan.cost_per_step(study.settings.budget, known)
    assert max(spent.values()) <= 1.02 * min(spent.values())
    assert "# The same at full size:" in file.read_text()


@pytest.mark.parametrize("name", EQUAL)
def test_shipped_study_has_equal_parameter_counts(name):
    recipes = read_study(name).recipes
    assert close([sum(parameter_counts(recipes[variant].model).values()) for variant in EQUAL[name]])


@pytest.mark.parametrize("name", FULL)
def test_shipped_study_has_equal_parameters_at_full_size(name):
    base = presets.shape("smollm2-135m")
    shapes = [presets.shape(each.get("preset", "smollm2-135m")) | each for each in FULL[name]]
    shapes = [{key: value for key, value in (base | shape).items() if key != "preset"} for shape in shapes]
    for shape in shapes:
        if shape.get("model_type") == "starcoder2":
            shape.pop("rms_norm_eps")
    assert close([sum(parameter_counts(ModelConfig.model_validate(shape)).values()) for shape in shapes])
    for said in FULL[name]:
        assert all(str(value) in of(name).read_text() or key == "preset" for key, value in said.items())


def test_moe_study_has_equal_active_parameters():
    recipes = read_study("dense-against-experts").recipes
    assert close([active_parameters(recipes[name].model) for name in ("dense", "equal-active")])


def test_power_of_two_study_keeps_the_published_ratio():
    recipes = read_study("power-of-two-as-published").recipes
    ours = [recipes[name].model for name in ("power-of-two", "original")]
    names = ("study-pow2-151m", "study-original-174m")
    theirs = [ModelConfig.model_validate(presets.shape(name)) for name in names]
    small, large, published_small, published_large = (sum(parameter_counts(m).values()) for m in [*ours, *theirs])
    assert small / large == pytest.approx(published_small / published_large, abs=0.02)
    assert f"{1 - small / large:.0%}".replace("%", " %") in of("power-of-two-as-published").read_text()


@pytest.mark.parametrize("file", [pytest.param(of("compact-against-llama"), id="one"), *AS_LONG])
def test_shipped_study_runs_four_steps(file, tmp_path):
    (tmp_path / "text.txt").write_text(sentences(300))
    tree = tomllib.loads(file.read_text())
    tree["study"] |= {"seeds": [0], "learning_rates": [], "budget": {"tokens": 256}}
    small = {"train.batch_tokens": 64, "train.sequence_length": 32, "train.evaluate_every": 4, "train.dtype": "float32"}
    small |= {"data.sources": [str(tmp_path / "text.txt")], "model.vocab_size": 320, "train.checkpoint_every": 4}
    tree["settings"] = merged(tree["settings"], small)
    for name in ("batch_tokens", "evaluate_every", "checkpoint_every"):
        tree["settings"]["train"].pop(name)
    (tmp_path / file.name).write_text(tomli_w.dumps(tree))
    found = run_variants(read_study(tmp_path / file.name), tmp_path / "out", Audience(), measure_costs=False)
    assert [each.failed for each in found.variants] == [{}] * len(found.variants)
    assert {each.steps for each in found.variants} == {4}


@pytest.mark.parametrize("name", ["ladder", str(of("ladder"))])
def test_train_refuses_a_study_and_names_compare(tmp_path, capsys, name):
    assert cli.run(["train", name, "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"smolforge: {name} is a study, not a recipe: smolforge compare {name} --out DIR conducts it\n"
    )
