"""Recipes and runs: read, settled, started, stopped, resumed to the bit, refused with a sentence."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from children import train_until
from conftest import NANO
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from smolforge import __version__, atomic
from smolforge.checkpoint import loading, training_state
from smolforge.config import Data, Recipe, Train
from smolforge.config.base import leaves, replace_settings
from smolforge.config.load import find_recipe, read_recipe, to_recipe, write_recipe
from smolforge.data.batches import IGNORE_INDEX, TokenWindows
from smolforge.data.corpus import TRAIN, Corpus
from smolforge.data.prepare.build import prepare
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, Stopped
from smolforge.evaluation import measure_corpus
from smolforge.operating_system import SCHEDULER_SIGNALS
from smolforge.runs import resume_or_start, train
from smolforge.runs.context import ProgressListener
from smolforge.runs.estimate import (
    checkpoint_bytes,
    estimate_run,
    head_bytes,
    parse_budget,
    tokens_per_second,
    training_bytes,
    within_budget,
)
from smolforge.runs.resolve import check_resume_step, merge_resume_overrides, resolve_recipe
from smolforge.testing import Crash, crashing, failing, flip_bit, in_child, sentences, tiny_config
from smolforge.tokenizer import Tokenizer
from smolforge.training import environment
from smolforge.training.run_folder import RunFolder, read_records

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe_file(tmp_path, text_file):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    return path


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """A run of that recipe which nothing disturbed."""
    folder = tmp_path_factory.mktemp("once")
    (folder / "text.txt").write_text(sentences(300))
    (folder / "tiny.json").write_text(json.dumps(NANO | {"data": {"sources": [str(folder / "text.txt")]}}))
    return train(folder / "tiny.json", folder / "run").folder


def hashes(run: Path, step: int) -> dict[str, str]:
    """sha256 of weights, optimizer and torch's random state of a checkpoint that is sound."""
    folder = training_state.checkpoint_dir(run, step)
    files = atomic.check_manifest(folder)["files"]
    # Python's own generator is left out here: the shape checks of the tests draw from it.
    drawn = load_file(folder / "training" / "random.safetensors")["torch"].numpy().tobytes()
    named = {name: files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")}
    return named | {"random": hashlib.sha256(drawn).hexdigest()}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(run / "metrics.jsonl")]


# Reading


def test_recipe_is_the_same_in_toml_yaml_and_json(tmp_path):
    tree = {"model": {"preset": "smollm2-nano", "num_hidden_layers": 3}, "train": {"sample_every": "none"}}
    (tmp_path / "a.toml").write_text(
        '[model]\npreset = "smollm2-nano"\nnum_hidden_layers = 3\n'
        '[train]\nsample_every = "none"\nsequence_length = 64\n'
    )
    tree["train"]["sequence_length"] = 64
    (tmp_path / "a.json").write_text(json.dumps(tree))
    (tmp_path / "a.yaml").write_text(
        "model: {preset: smollm2-nano, num_hidden_layers: 3}\ntrain: {sample_every: none, sequence_length: 64}\n"
    )
    one, two, three = (read_recipe(tmp_path / f"a.{kind}") for kind in ("toml", "json", "yaml"))
    assert one == two == three
    assert one.train.sample_every is None
    assert (one.model.hidden_size, one.model.num_hidden_layers) == (192, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.yaml", "train.steps: 8\noptim.schedule.warmup_steps: 2\nmodel: {preset: smollm2-135m}\n"),
        ("r.yaml", "train.steps: 8\noptim.schedule: {warmup_steps: 2}\nmodel: smollm2-135m\nmodel.vocab_size: 49152\n"),
        (
            "r.yaml",
            "optim: {schedule.warmup_steps: 2}\ntrain: {steps: 8}\ntrain.steps: 8\nmodel.preset: smollm2-135m\n",
        ),
        ("r.json", '{"train.steps": 8, "optim": {"schedule.warmup_steps": 2}, "model.preset": "smollm2-135m"}'),
        ("r.toml", '"train.steps" = 8\n"optim.schedule.warmup_steps" = 2\nmodel = "smollm2-135m"\n'),
        ("r.toml", 'train.steps = 8\noptim.schedule.warmup_steps = 2\nmodel.preset = "smollm2-135m"\n'),
    ],
)
def test_dotted_keys_of_a_recipe_are_as_flags(tmp_path, name, content):
    (tmp_path / "plain.toml").write_text('model = "smollm2-135m"\n')
    (tmp_path / name).write_text(content)
    flags = {"train.steps": 8, "optim.schedule.warmup_steps": 2}
    assert read_recipe(tmp_path / name) == read_recipe(tmp_path / "plain.toml", flags)
    assert read_recipe(tmp_path / name, {"train.steps": 9}).train.steps == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train.steps: 8\ntrain: {steps: 9}\n", "r.yaml: train.steps is set twice, to 8 and 9; keep one of them"),
        ("train: {steps: 9}\ntrain.steps: 8\n", "r.yaml: train.steps is set twice, to 9 and 8"),
        ("train.steps: 1\ntrain: {steps: true}\n", "r.yaml: train.steps is set twice, to 1 and true"),
        ("lora: none\nlora.rank: 8\n", "r.yaml: lora is set twice, to 'none' and"),
        (
            "optim: {schedule.warmup_steps: 1, schedule: {warmup_steps: 2}}\n",
            "optim.schedule.warmup_steps is set twice",
        ),
        ("train.stpes: 8\n", "there is no setting 'train.stpes'. Did you mean train.steps?"),
        ("train..steps: 8\n", "there is no setting 'train..steps'"),
        ("train.steps: 8\ntrain.steps: 8\n", "'train.steps' is set twice"),
    ],
)
def test_dotted_keys_that_contradict_are_refused(tmp_path, content, said):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("train.steps", "1_000", 1000),
        ("train.steps", "0x10", 16),
        ("train.steps", "+5", 5),
        ("train.steps", "1e3", 1000),
        ("optim.learning_rate", "1e-3", 0.001),
        ("optim.learning_rate", "1.5E-3", 0.0015),
        ("optim.learning_rate", ".5", 0.5),
        ("optim.learning_rate", "0", "refused"),
        ("optim.learning_rate", ".inf", "refused"),
        ("data.text_key", "no", "no"),
        ("data.text_key", "1:30", "1:30"),
        ("data.text_key", "2024-01-02", "2024-01-02"),
        ("data.text_key", "'010'", "010"),
        ("data.text_key", "10", "refused"),
        ("train.keep_best", "no", False),
        ("train.keep_best", "on", True),
        ("train.compile", "off", False),
        ("train.compile", "auto", "auto"),
        ("train.steps", "1:30", "refused"),
        ("train.steps", "2024-01-02", "refused"),
        ("train.steps", "yes", "refused"),
        ("train.steps", "true", "refused"),
        ("train.steps", "010", "r.yaml cannot be read: 010 begins with 0, which some read as octal"),
        ("train.steps", "-08", "begins with 0"),
        ("train.steps", "0_8", "begins with 0"),
        ("data.text_key", "007", "begins with 0"),
    ],
)
def test_yaml_values_are_what_they_look_like(tmp_path, setting, text, value):
    """YAML 1.1 reads 010 as 8, 1:30 as 90, no as false and 1e-3 as text."""
    (tmp_path / "r.yaml").write_text(f"model: smollm2-135m\n{setting}: {text}\n")
    if value == "refused" or "begins" in str(value):
        with pytest.raises(ConfigError, match=setting if value == "refused" else value):
            read_recipe(tmp_path / "r.yaml")
    else:
        read = leaves(read_recipe(tmp_path / "r.yaml"))[setting]
        assert (type(read), read) == (type(value), value)


def test_recipe_survives_write_and_read(tmp_path):
    recipe = to_recipe(NANO | {"data": {"sources": ["a,b", 'quo"te']}, "sample": {"stop": ["\n"]}})
    (tmp_path / "r.toml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "r.toml") == recipe


def shipped():
    return sorted((ROOT / "recipes").glob("*.toml"))  # studies are held to what they are in test_study


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_commented(path, monkeypatch):
    monkeypatch.setattr("smolforge.runs.auto.available_bytes", lambda device: 32 << 30)
    # the first may be on the Hub
    recipe = replace_settings(read_recipe(path), {"init_from": None, "data.format": "text"})
    assert find_recipe(path.stem) == path
    assert path.read_text().startswith("# ")
    alone = replace_settings(recipe, {"init_from": None})  # and nobody asks the Hub
    assert estimate_run(resolve_recipe(alone)).tokens == recipe.train.steps * recipe.train.batch_tokens


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "r.toml",
            "[train]\nstpes = 5\n",
            r"r\.toml: there is no setting 'train\.stpes'\. Did you mean train\.steps\?",
        ),
        ("r.toml", "[train\n", r"r\.toml cannot be read"),
        ("r.yaml", "a: [1\n", r"r\.yaml cannot be read"),
        ("r.json", "[1]", "is not a table of settings"),
        ("r.txt", "", r"should end in \.toml, \.yaml or \.json"),
        ("r.toml", '[model]\npreset = "smollm2-135n"\n', "Did you mean smollm2-135m"),
    ],
)
def test_recipe_file_errors_name_the_problem(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_recipe(tmp_path / name)


def test_missing_recipe_suggests_a_similar_name():
    with pytest.raises(ConfigError, match=r"there is no recipe 'nanno'.*Did you mean nano\?"):
        read_recipe("nanno")


# Budgets and plans


@given(st.integers(1, 10**9), st.sampled_from("smhd"))
def test_budget_accepts_times_and_token_counts(number, unit):
    seconds, tokens = parse_budget(f"{number}{unit}")
    assert seconds == number * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    assert tokens is None
    assert parse_budget(f"{number}M-tokens") == (None, number * 10**6)


@pytest.mark.parametrize("budget", ["5", "m", "5 m", "10M", "-5m", "1e3s"])
def test_budget_refuses_other_forms(budget):
    with pytest.raises(ConfigError, match="a time like 5m or 1h, or a count like 10M-tokens"):
        parse_budget(budget)


@pytest.mark.parametrize("tokens", ["20K", "1M", "50M"])
def test_token_budget_sets_steps_and_schedule(tokens):
    recipe = within_budget(replace_settings(read_recipe("smollm2-135m"), {"budget": f"{tokens}-tokens"}))
    spent, given = recipe.train.steps * recipe.train.batch_tokens, parse_budget(f"{tokens}-tokens")[1]
    assert given - recipe.train.batch_tokens < spent <= given
    schedule = recipe.optim.schedule.resolved(recipe.train.steps)
    assert schedule.steps == recipe.train.steps
    assert schedule.decay_steps == pytest.approx(recipe.train.steps / 5, abs=1)
    assert recipe.train.steps >= 200 or recipe.train.sequences_per_step == 1


def test_time_budget_sets_steps_from_measured_speed():
    schedule = {"warmup_steps": 0.1, "decay": "linear", "decay_steps": 0.3}
    recipe = to_recipe(NANO | {"budget": "3s", "optim": {"schedule": schedule}})
    recipe = within_budget(replace_settings(recipe, {"train.sequence_length": 64, "train.batch_tokens": 64}))
    tokens = recipe.train.steps * recipe.train.batch_tokens
    assert recipe.optim.schedule.steps == recipe.train.steps
    assert 0.3 < tokens / tokens_per_second(recipe) < 30


MEASURED = [
    ("smollm2-135m", {}, 5.30),
    ("smollm2-135m", {"activation_checkpointing": "selective"}, 4.24),
    ("smollm2-135m", {"activation_checkpointing": "full"}, 3.70),
    ("smollm2-135m", {"compile": True}, 4.15),
    ("smollm2-135m", {"compile": True, "activation_checkpointing": "selective"}, 3.80),
    ("smollm2-135m", {"dtype": "bfloat16"}, 4.73),
    ("smollm2-135m", {"sequence_length": 2048, "batch_tokens": 4096, "micro_batch_size": 1}, 6.15),
    ("nano", {"sequence_length": 256, "batch_tokens": 4096, "micro_batch_size": None}, 0.70),
    ("nano", {"sequence_length": 256, "batch_tokens": 4096, "micro_batch_size": None, "dtype": "bfloat16"}, 0.63),
]
"""GiB at the peak of a process that trains, on two cores of an AMD EPYC: docs/performance.md."""


@pytest.mark.parametrize(("name", "settings", "gigabytes"), MEASURED)
def test_training_bytes_are_near_measured_memory(name, settings, gigabytes):
    usual = {"sequence_length": 512, "batch_tokens": 2048, "micro_batch_size": 4, "dtype": "float32", "compile": False}
    usual |= {"activation_checkpointing": None, "device": "cpu", "checkpoint_in_background": False}
    recipe = replace_settings(read_recipe(name), {f"train.{key}": value for key, value in (usual | settings).items()})
    assert training_bytes(recipe) / 2**30 == pytest.approx(gigabytes, rel=0.15)
    copied = replace_settings(recipe, {"train.checkpoint_in_background": True})
    assert estimate_run(copied).memory_bytes - estimate_run(recipe).memory_bytes == checkpoint_bytes(recipe)


HEAVY_HEAD = """
from pathlib import Path
import torch
from smolforge.data.batches import Batch
from smolforge.models.decoder import build
from smolforge.training.objective import Objective
from smolforge.config.load import read_recipe
from smolforge.training.loop import forward_backward

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

recipe = read_recipe("recipe.toml")
objective, train = Objective(build(recipe.model)), recipe.train
ids = torch.randint(recipe.model.vocab_size, (train.sequences_per_step, train.sequence_length))
forward_backward(objective, Batch(ids[:1, :2], ids[:1, :2]), 2, rows=1)
before = kilobytes("VmRSS")
forward_backward(objective, Batch(ids, ids), ids.numel(), rows=train.micro_batch_size)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_head_bytes_are_near_measured_memory(tmp_path):
    """A chunk's logits are 101 MB, and those of all 2048 tokens would be 403."""
    shape = tiny_config(vocab_size=49152, hidden_size=16, num_hidden_layers=1, max_position_embeddings=512)
    train = {"sequence_length": 512, "batch_tokens": 4096, "micro_batch_size": 4, "device": "cpu", "dtype": "float32"}
    recipe = to_recipe(NANO | {"model": shape.model_dump(), "train": train})
    (tmp_path / "recipe.toml").write_text(write_recipe(recipe))
    done = subprocess.run([sys.executable, "-c", HEAVY_HEAD], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert head_bytes(recipe, 2048, 4, accumulates=True) == pytest.approx(int(done.stdout) * 1024, rel=0.15)


def test_tokens_per_second_works_with_document_masking(monkeypatch):
    monkeypatch.setattr("smolforge.runs.estimate.PROBE_SECONDS", 0)
    assert tokens_per_second(to_recipe(NANO | {"data": {"intra_document_masking": True}})) > 0


def test_run_estimate_warns_of_low_memory_and_long_runs():
    warnings = estimate_run(replace_settings(read_recipe("smollm2-135m"), {"train.micro_batch_size": None})).warnings()
    assert any("--train.micro-batch-size needs less" in warning for warning in warnings)
    assert any("days here" in warning for warning in warnings)
    assert estimate_run(to_recipe(NANO)).warnings() == []


# What may change on resume


def test_resume_refuses_changed_fixed_settings():
    stored = resolve_recipe(to_recipe(NANO))
    written = replace_settings(to_recipe(NANO), {"seed": 9})
    with pytest.raises(
        ConfigError, match=r"seed \(3, now 9\), optim\.learning_rate \(0\.003, now 0\.004\).*--init-from"
    ):
        merge_resume_overrides(stored, written, {"optim.learning_rate": 4e-3, "train.steps": 20})
    with pytest.raises(ConfigError, match=r"train\.dtype \('float32', now 'float64'\)"):
        merge_resume_overrides(stored, to_recipe(NANO), {"train.dtype": "float64"})


def test_resume_refuses_another_model_preset(tmp_path, text_file):
    given = {"model.preset": "smollm2-nano", "model.num_hidden_layers": 1, "model.vocab_size": 400}
    short = {"train.sequence_length": 32, "train.batch_tokens": 64, "train.sample_every": "none"}
    train("nano", tmp_path / "run", data=str(text_file), steps=2, **given, **short)
    assert train("nano", tmp_path / "run", data=str(text_file), steps=3, **given, **short).metrics["step"] == 3
    with pytest.raises(ConfigError, match=r"must not change: model\.hidden_size \(192, now 576\)"):
        train("nano", tmp_path / "run", steps=3, **given | {"model.preset": "smollm2-135m"}, **short)


def test_resume_accepts_the_same_model_flags(tmp_path, text_file):
    """Also where the width of a head follows from them."""
    given = {"model.preset": "smollm2-nano", "model.hidden_size": 48, "model.num_hidden_layers": 1}
    given |= {"model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.vocab_size": 400}
    short = {"train.sequence_length": 32, "train.batch_tokens": 64, "train.sample_every": "none"}
    for steps in (2, 3):
        run = train("nano", tmp_path / "run", data=str(text_file), steps=steps, **given, **short)
    assert (run.metrics["step"], run.recipe.model.head_dim) == (3, 12)
    with pytest.raises(ConfigError, match=r"must not change: model\.head_dim \(12, now 16\)"):
        train("nano", tmp_path / "run", data=str(text_file), steps=4, **given, **{"model.head_dim": 16}, **short)


def test_resume_takes_free_settings_only_from_flags():
    stored = replace_settings(resolve_recipe(to_recipe(NANO)), {"train.steps": 30})
    assert stored.optim.schedule.steps == 8
    by_hand = {"train.steps": "20", "train.micro_batch_size": 1, "train.evaluate_every": "none"}
    now = merge_resume_overrides(stored, to_recipe(NANO), by_hand)
    assert (now.train.steps, now.train.micro_batch_size, now.train.evaluate_every) == (20, 1, None)
    assert now.optim.schedule.steps == 8
    assert merge_resume_overrides(stored, to_recipe(NANO), {}) == stored


def test_resume_accepts_fewer_steps_than_the_schedule():
    lengths = {"optim.schedule.warmup_steps": 3, "optim.schedule.decay_steps": 4}
    recipe = replace_settings(to_recipe(NANO), lengths)
    assert merge_resume_overrides(resolve_recipe(recipe), recipe, {"train.steps": 5}).train.steps == 5


def test_resume_accepts_the_same_budget_again():
    asked = replace_settings(to_recipe(NANO), {"budget": "1K-tokens"})
    stored = resolve_recipe(asked)
    assert stored.train.steps < 32
    assert merge_resume_overrides(stored, asked, {"budget": "1K-tokens"}) == stored
    assert merge_resume_overrides(stored, asked, {"budget": "1K-tokens", "train.steps": 50}).train.steps == 50
    long = replace_settings(read_recipe("wikitext"), {"budget": "300K-tokens"})
    stored = resolve_recipe(long)
    assert merge_resume_overrides(stored, long, {}) == stored


def test_budget_keeps_settings_given_by_hand():
    asked = replace_settings(read_recipe("smollm2-135m"), {"budget": "10M-tokens"})
    assert resolve_recipe(asked).train.batch_tokens < 2**20
    by_hand = resolve_recipe(asked, frozenset({"train.batch_tokens"}))
    assert (by_hand.train.batch_tokens, by_hand.train.steps) == (2**20, 9)
    fewer = resolve_recipe(replace_settings(asked, {"train.steps": 7}), frozenset({"train.steps"}))
    assert (fewer.train.steps, fewer.optim.schedule.steps) == (7, 7)


def test_resume_refuses_steps_with_zero_learning_rate():
    recipe = resolve_recipe(replace_settings(to_recipe(NANO), {"optim.schedule.final_learning_rate": 0.0}))
    further = replace_settings(recipe, {"train.steps": 9})
    with pytest.raises(ConfigError, match=r"nothing would be learned.*final_learning_rate"):
        check_resume_step(further, 8)
    with pytest.raises(ConfigError, match="at step 8 already"):
        check_resume_step(replace_settings(recipe, {"train.steps": 4}), 8)
    check_resume_step(recipe, 8)


# Runs


def test_run_writes_metrics_checkpoints_and_environment(tmp_path, recipe_file):
    run = train(recipe_file, tmp_path / "run")
    assert run.metrics["step"] == 8
    assert {"loss", "tokens", "learning_rate", "grad_norm", "validation_loss", "validation_bits_per_byte"} <= set(
        run.metrics
    )
    records = read_records(run.folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8]
    assert [folder.name for folder in training_state.list_checkpoints(run.folder)] == ["step-00000004", "step-00000008"]
    assert read_recipe(run.folder / "recipe.toml") == run.recipe
    (start,) = json.loads((run.folder / "environment.json").read_text())
    assert start["packages"]["torch"] == metadata.version("torch")  # PyPI's has no +cu130, as torch.__version__ has
    assert start["packages"]["smolforge"] == __version__
    assert "finished at step 8" in (run.folder / "run.log").read_text()


def test_run_reports_an_environment_it_cannot_write(tmp_path, recipe_file, monkeypatch):
    """And nothing else that then cannot be written either."""
    replace = atomic.write_text_atomic

    def refuse(path, text):
        if path.name == "environment.json":
            raise atomic.write_error(path, OSError(28, "No space left on device"), len(text))
        replace(path, text)

    monkeypatch.setattr(atomic, "write_text_atomic", refuse)
    with pytest.raises(MissingResourceError, match=r"environment.json needs [\d,]+ bytes"):
        train(recipe_file, tmp_path / "run", steps=2)


@pytest.mark.parametrize("content", ["{", "3", '["x"]'])
def test_run_refuses_a_corrupted_environment_file(tmp_path, recipe_file, content):
    train(recipe_file, tmp_path / "run", steps=2)
    (tmp_path / "run" / "environment.json").write_text(content)
    with pytest.raises(InvalidFileError, match=r"environment.json is not (JSON|a list of starts)"):
        train(recipe_file, tmp_path / "run", steps=4)


def test_environment_versions_include_uninstalled_packages(monkeypatch):
    assert environment.versions()["smolforge"] == __version__
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert environment.versions() == {"torch": metadata.version("torch"), "no-such-package": "not installed"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_equals_an_uninterrupted_run(tmp_path, recipe_file, optimizer):
    """5000 + 50 in small: to step 8, on to 13, against 13 at once with the same horizon."""
    same = {"optim.schedule.steps": 8, "optim.name": optimizer}
    train(recipe_file, tmp_path / "once", steps=13, **same)
    train(recipe_file, tmp_path / "twice", steps=8, **same)
    train(recipe_file, tmp_path / "twice", steps=13, **same)
    assert hashes(tmp_path / "once", 13) == hashes(tmp_path / "twice", 13)
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")


def test_document_masking_trains_and_resumes_exactly(tmp_path, recipe_file):
    """Of a text with many borders, so that masking them changes the first loss already; the data are the same."""
    lines = sentences(300).splitlines()
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    masked = {"optim.schedule.steps": 8, "data.intra_document_masking": True}
    text = str(tmp_path / "many.jsonl")
    train(recipe_file, tmp_path / "plain", text, steps=2, **{"optim.schedule.steps": 8})
    train(recipe_file, tmp_path / "once", text, steps=4, **masked)
    train(recipe_file, tmp_path / "twice", text, steps=2, **masked)
    train(recipe_file, tmp_path / "twice", text, steps=4, **masked)
    assert hashes(tmp_path / "once", 4) == hashes(tmp_path / "twice", 4)
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    (_, without), (_, within) = losses(tmp_path / "plain")[0], losses(tmp_path / "once")[0]
    assert within != pytest.approx(without, rel=1e-5)
    for name, masking in (("plain", False), ("once", True)):
        run = tmp_path / name
        last = training_state.checkpoint_dir(run, 2 if name == "plain" else 4)
        model, corpus = loading.load(last), Corpus.open(run / "corpus")
        found = measure_corpus(model, corpus, 32, intra_document_masking=masking)
        assert read_records(run / "metrics.jsonl")[-1]["validation_loss"] == pytest.approx(found["loss"], rel=1e-5)
    with pytest.raises(ConfigError, match=r"must not change: data\.intra_document_masking \(False, now True\)"):
        train(recipe_file, tmp_path / "plain", text, steps=4, **masked)
    masking = Data(sources=(text,), intra_document_masking=True)
    assert prepare(masking, tmp_path / "plain" / "corpus", None, vocab_size=320).fingerprint == corpus.fingerprint


def test_finished_run_is_not_trained_again(tmp_path, recipe_file):
    first = train(recipe_file, tmp_path / "run")
    saved = training_state.checkpoint_dir(first.folder, 8).stat().st_mtime_ns
    again = train(recipe_file, tmp_path / "run")
    assert again.metrics == first.metrics
    assert training_state.checkpoint_dir(first.folder, 8).stat().st_mtime_ns == saved


def test_intervals_and_workers_do_not_change_the_weights(tmp_path, recipe_file):
    changed = {
        "train.evaluate_every": None,
        "train.checkpoint_every": 3,
        "data.num_workers": 4,
        "train.sample_every": 2,
    }
    train(recipe_file, tmp_path / "one")
    train(recipe_file, tmp_path / "two", **changed)
    assert hashes(tmp_path / "one", 8) == hashes(tmp_path / "two", 8)


def test_resume_skips_a_corrupted_checkpoint(tmp_path, recipe_file, once, caplog):
    """And made again, sound, when its step comes again."""
    train(recipe_file, tmp_path / "run")
    flip_bit(training_state.checkpoint_dir(tmp_path / "run", 8) / "training" / "optimizer.safetensors", 50_001)
    train(recipe_file, tmp_path / "run")
    assert "step-00000008 is skipped" in caplog.text
    assert hashes(tmp_path / "run", 8) == hashes(once, 8)
    assert losses(tmp_path / "run") == losses(once)


def test_resume_reports_that_all_checkpoints_are_corrupted(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "run")
    for folder in training_state.list_checkpoints(tmp_path / "run"):
        (folder / "manifest.json").unlink()
    with pytest.raises(InvalidFileError, match="no checkpoint of .* is sound"):
        train(recipe_file, tmp_path / "run")


def test_init_from_takes_only_the_weights(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "first")
    first = training_state.checkpoint_dir(tmp_path / "first", 8)
    run = train(recipe_file, tmp_path / "second", steps=2, init_from=str(tmp_path / "first"))
    record = read_records(run.folder / "metrics.jsonl")[0]
    assert record["step"] == 1
    assert record["loss"] < losses(tmp_path / "first")[0][1]
    assert run.recipe.model == read_recipe(tmp_path / "first" / "recipe.toml").model
    shutil.rmtree(first)  # what a run started from may be gone when it goes on
    train(recipe_file, tmp_path / "second", steps=3, init_from=str(tmp_path / "first"))


def test_init_from_first_loss_equals_transformers(tmp_path, recipe_file):
    """As Transformers computes it on the same batch, and so does this code afterwards."""
    from transformers import AutoModelForCausalLM

    train(recipe_file, tmp_path / "first")
    run = train(recipe_file, tmp_path / "second", steps=2, init_from=str(tmp_path / "first"))
    text = Corpus.open(run.folder / "corpus")
    windows = TokenWindows(text.tokens(TRAIN), run.recipe.train.sequence_length, run.recipe.seed)
    batch = windows.batch(0, run.recipe.train.sequences_per_step)
    theirs = AutoModelForCausalLM.from_pretrained(
        training_state.checkpoint_dir(tmp_path / "first", 8), dtype=torch.float32
    )
    with torch.no_grad():
        logits = theirs(batch.input_ids).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    assert losses(run.folder)[0][1] == pytest.approx(expected.item(), rel=1e-5)


def test_init_from_allows_only_new_rope_theta_and_context(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "first")
    changes = {"model.rope_theta": 5e4, "model.max_position_embeddings": 512, "train.sequence_length": 64}
    given = {"init_from": str(tmp_path / "first"), "train.batch_tokens": 128, **changes}
    run = train(recipe_file, tmp_path / "second", steps=2, **given)
    saved = loading.load(tmp_path / "second").config
    assert (saved.rope_theta, saved.max_position_embeddings) == (5e4, 512)
    assert run.recipe.model.num_hidden_layers == 2
    assert train(recipe_file, tmp_path / "second", steps=3, **given).metrics["step"] == 3
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 400, but the model of --init-from has 320"):
        train(recipe_file, tmp_path / "third", init_from=str(tmp_path / "first"), **{"model.vocab_size": 400})


def test_init_from_logs_where_the_recipe_differs(tmp_path, recipe_file, caplog):
    """The long-context step as a file; what it says of another shape is passed over aloud."""
    train(recipe_file, tmp_path / "first")
    content = json.loads(recipe_file.read_text())
    content["model"] |= {"rope_theta": 50000.0, "intermediate_size": 64}
    (tmp_path / "long.json").write_text(json.dumps(content))
    run = train(tmp_path / "long.json", tmp_path / "second", steps=3, init_from=str(tmp_path / "first"))
    assert run.recipe.model.rope_theta == 5e4
    assert run.recipe.model.intermediate_size == 48
    assert "model.rope_theta is 50000.0 in the recipe and 10000.0 in --init-from; 50000.0 is used" in caplog.text
    assert "model.intermediate_size is 64 in the recipe and 48 in --init-from; 48 is used" in caplog.text


def test_resume_works_after_the_initial_model_is_deleted(tmp_path, recipe_file, text_file, tokenizer):
    """Also where its corpus was prepared: the model it started from may be gone."""
    train(recipe_file, tmp_path / "first")
    own = Corpus.open(tmp_path / "first" / "corpus").tokenizer()
    prepare(replace_settings(to_recipe(NANO), {"data.sources": (str(text_file),)}).data, tmp_path / "corpus", own)
    given = {"init_from": str(tmp_path / "first"), "data.sources": [str(tmp_path / "corpus")]}
    train(recipe_file, tmp_path / "second", steps=3, **given)
    shutil.rmtree(tmp_path / "first")
    assert train(recipe_file, tmp_path / "second", steps=4, **given).metrics["step"] == 4


def test_init_from_records_the_hub_commit(tmp_path, recipe_file, hub):
    train(recipe_file, tmp_path / "first")
    commit = hub.add("someone/first", training_state.checkpoint_dir(tmp_path / "first", 8))
    given = {"init_from": "someone/first"}
    run = train(recipe_file, tmp_path / "second", steps=3, **given)
    assert run.recipe.init_from == f"someone/first@{commit}"
    hub.clear()
    assert train(recipe_file, tmp_path / "second", steps=4, **given).metrics["step"] == 4
    assert hub.requests == []


def test_resume_refuses_another_micro_batch_size_for_moe(tmp_path, recipe_file):
    shape = {"model.model_type": "mixtral", "train.micro_batch_size": 2}
    train(recipe_file, tmp_path / "run", steps=3, **shape)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size \(2, now 1\)"):
        train(recipe_file, tmp_path / "run", steps=4, **shape | {"train.micro_batch_size": 1})
    unbalanced = shape | {"model.router_aux_loss_coef": 0.0}
    train(recipe_file, tmp_path / "free", steps=3, **unbalanced)
    train(recipe_file, tmp_path / "free", steps=4, **unbalanced | {"train.micro_batch_size": 1})


def test_special_tokens_grow_the_initial_model(tmp_path, recipe_file, tokenizer):
    count = len(tokenizer)
    tokenizer.save(tmp_path / "tokenizer")
    own = {"tokenizer": str(tmp_path / "tokenizer"), "model.vocab_size": count}
    train(recipe_file, tmp_path / "first", **own)
    given = {"init_from": str(tmp_path / "first"), "special_tokens": ["<|think|>", "<|done|>"]}
    run = train(recipe_file, tmp_path / "second", steps=2, **given)
    assert run.recipe.model.vocab_size == count + 2
    again = loading.load(tmp_path / "second")
    assert again.lm_head_weight.shape[0] == len(again.tokenizer) == count + 2
    assert again.tokenizer.encode_with_special_tokens("<|done|>") == [count + 1]
    assert count + 1 not in again.tokenizer.encode("<|done|>")
    assert train(recipe_file, tmp_path / "second", steps=3, **given).metrics["step"] == 3
    with pytest.raises(ConfigError, match="special_tokens are added to a tokenizer that was named"):
        train(recipe_file, tmp_path / "third", special_tokens=["<|think|>"])


def test_moe_trains_and_resumes_exactly(tmp_path, recipe_file):
    """Its balance loss is in the metrics; Muon has its stacked matrices; the shards have Mixtral's names."""
    shape = {"model.model_type": "mixtral", "model.num_local_experts": 4, "optim.name": "muon"}
    train(recipe_file, tmp_path / "once", **shape)
    train(recipe_file, tmp_path / "twice", steps=4, **shape, **{"optim.schedule.steps": 8})
    train(recipe_file, tmp_path / "twice", steps=8, **shape, **{"optim.schedule.steps": 8})
    assert hashes(tmp_path / "once", 8) == hashes(tmp_path / "twice", 8)
    records = read_records(tmp_path / "once" / "metrics.jsonl")
    assert all(record["balance_loss"] > 1.9 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]


def test_prepared_corpus_is_used_in_place(tmp_path, recipe_file, text_file, tokenizer):
    prepare(replace_settings(to_recipe(NANO), {"data.sources": (str(text_file),)}).data, tmp_path / "corpus", tokenizer)
    run = train(recipe_file, tmp_path / "run", data=str(tmp_path / "corpus"))
    assert not (run.folder / "corpus").exists()
    assert run.model.tokenizer.fingerprint == tokenizer.fingerprint


def test_resume_refuses_another_corpus(tmp_path, recipe_file, text_file):
    train(recipe_file, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "corpus")
    text_file.write_text(sentences(300, start=1000))
    with pytest.raises(InvalidFileError, match="trained on another corpus"):
        train(recipe_file, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.sources": ["nope.txt"]}, "there is no file, directory or match for the data source 'nope.txt'"),
        ({"train.sequence_length": 128, "train.batch_tokens": 128, "data.held_out": 0.5}, None),
        ({"model.vocab_size": 300}, "the tokenizer has 303 ids and model.vocab_size is 300; --model.vocab-size 303"),
        ({"optim.schedule.warmup_steps": 99}, "together are more than the 8 steps"),
        ({"budget": "soon"}, "a time like 5m"),
        ({"train.device": "abacus"}, "device is 'abacus'; it should be auto, cpu, cuda or mps"),
    ],
)
def test_run_refuses_bad_settings_before_the_first_step(tmp_path, recipe_file, tokenizer, overrides, said):
    tokenizer.save(tmp_path / "tokenizer")
    call = {"tokenizer": str(tmp_path / "tokenizer"), **overrides}
    if said is None:
        train(recipe_file, tmp_path / "run", **call)
        return
    with pytest.raises((ConfigError, InvalidFileError, MissingResourceError)) as caught:
        train(recipe_file, tmp_path / "run", **call)
    assert said in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_run_refuses_a_corpus_below_one_window(tmp_path, recipe_file):
    (tmp_path / "short.txt").write_text("a few words\n")
    with pytest.raises(InvalidFileError, match="less than one window of train.sequence_length"):
        train(recipe_file, tmp_path / "run", data=str(tmp_path / "short.txt"))


def test_run_refuses_foreign_folders_and_fresh_resume(tmp_path, recipe_file):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not a run folder"):
        train(recipe_file, tmp_path / "home")
    train(recipe_file, tmp_path / "run")
    with pytest.raises(ConfigError, match="--fresh refuses to resume"):
        train(recipe_file, tmp_path / "run", fresh=True)


def test_run_folder_is_locked_by_one_process(tmp_path, recipe_file):
    with (
        RunFolder.open(tmp_path / "run"),
        pytest.raises(ConfigError, match=f"is being trained by process {os.getpid()}"),
    ):
        train(recipe_file, tmp_path / "run")


# Signals, crashes, full disks


class At(ProgressListener):
    """An observer that does something at a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, metrics):
        if metrics["step"] == self.step:
            self.act()


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGINT, 130, 1), (signal.SIGINT, 130, 4), (signal.SIGTERM, 75, 6), (SCHEDULER_SIGNALS[0], 75, 1)],
)
def test_signals_save_and_resume_bit_for_bit(tmp_path, recipe_file, once, number, code, step):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step {step}") as caught:
        resume_or_start(recipe_file, tmp_path / "run", {}, listener=At(step, lambda: signal.raise_signal(number)))
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert training_state.list_checkpoints(tmp_path / "run")[-1] == training_state.checkpoint_dir(
        tmp_path / "run", step
    )
    train(recipe_file, tmp_path / "run")
    assert hashes(tmp_path / "run", 8) == hashes(once, 8)
    assert losses(tmp_path / "run") == losses(once)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (SCHEDULER_SIGNALS[0], 75)])
def test_signals_before_the_first_step_set_the_exit_code(tmp_path, recipe_file, monkeypatch, number, code):
    """Epochs prepare the whole text there, and a budget measures."""
    before = signal.getsignal(number)
    monkeypatch.setattr("smolforge.runs.load_or_resolve", lambda *_, **__: signal.raise_signal(number))
    with pytest.raises(Stopped, match=f"stopped by {number.name} before the first step") as caught:
        train(recipe_file, tmp_path / "run")
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


def test_second_interrupt_ends_at_once(tmp_path, recipe_file):
    def twice():
        # a write still under way would be left like a killed one
        while not training_state.list_checkpoints(tmp_path / "run"):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        resume_or_start(recipe_file, tmp_path / "run", {}, listener=At(6, twice))
    assert [folder.name for folder in training_state.list_checkpoints(tmp_path / "run")] == ["step-00000004"]


def test_sigkill_loses_only_steps_since_the_checkpoint(tmp_path, recipe_file, once):
    for step in (2, 5, 7):
        assert in_child(train_until, step, recipe_file, tmp_path / "run", {}) == -signal.SIGKILL
    train(recipe_file, tmp_path / "run")
    assert hashes(tmp_path / "run", 8) == hashes(once, 8)
    assert losses(tmp_path / "run") == losses(once)


@pytest.mark.parametrize("after", [0, 3])
def test_full_disk_keeps_the_last_checkpoint(tmp_path, recipe_file, once, after):
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    with (
        failing(tmp_path / "run" / "checkpoints", after),
        pytest.raises(MissingResourceError, match="the disk is full"),
    ):
        train(recipe_file, tmp_path / "run", steps=8)
    assert [folder.name for folder in training_state.list_checkpoints(tmp_path / "run")] == ["step-00000004"]
    train(recipe_file, tmp_path / "run", steps=8)
    assert hashes(tmp_path / "run", 8) == hashes(once, 8)


def test_run_refuses_a_too_small_disk_before_the_first_step(tmp_path, recipe_file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(MissingResourceError, match=r"need [\d,]+ more bytes and .* has 10 free"):
        train(recipe_file, tmp_path / "run")


@pytest.mark.parametrize(("keep_last", "at_once"), [(2, 4), (3, 5), (1000, 11)])
def test_disk_estimate_counts_checkpoints_kept_at_once(keep_last, at_once):
    recipe = Recipe(train=Train(steps=100, checkpoint_every=10, keep_last=keep_last))
    assert estimate_run(recipe).disk_bytes == at_once * checkpoint_bytes(recipe)


def test_crash_while_saving_keeps_the_previous_checkpoint(tmp_path, recipe_file, once):
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    with crashing(tmp_path / "run" / "checkpoints", 2), pytest.raises(Crash):
        train(recipe_file, tmp_path / "run", steps=8)
    train(recipe_file, tmp_path / "run", steps=8)
    assert hashes(tmp_path / "run", 8) == hashes(once, 8)


def test_train_prints_nothing_as_a_library(tmp_path, recipe_file, capfd):
    train(recipe_file, tmp_path / "run", **{"train.sample_every": 4})
    assert capfd.readouterr() == ("", "")
    assert {record["step"] for record in read_records(tmp_path / "run" / "samples.jsonl")} == {4, 8}


def test_run_log_has_the_traceback(tmp_path, recipe_file):
    with pytest.raises(InvalidFileError):
        train(recipe_file, tmp_path / "run", data="nope.txt")
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Traceback" in log
    assert "nope.txt" in log


def test_corrupted_old_checkpoint_does_not_stop_training(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    shutil.copytree(
        training_state.checkpoint_dir(tmp_path / "run", 4), training_state.checkpoint_dir(tmp_path / "run", 1)
    )
    (training_state.checkpoint_dir(tmp_path / "run", 1) / "training" / "state.json").write_text("{")
    assert train(recipe_file, tmp_path / "run", steps=8).metrics["step"] == 8


def test_failed_start_allows_other_settings(tmp_path, recipe_file, text_file):
    """A first try that failed leaves nothing to be held to, least of all its text."""
    enough = text_file.read_text()
    text_file.write_text("a few words\n" * 5)
    with pytest.raises(InvalidFileError, match="less than one window"):
        train(recipe_file, tmp_path / "run")
    text_file.write_text(enough)
    run = train(recipe_file, tmp_path / "run", **{"optim.learning_rate": 1e-3})
    assert run.recipe.data.sources == (str(text_file),)
    assert Corpus.open(tmp_path / "run" / "corpus").text("train") in text_file.read_text()


def test_init_from_refuses_another_tokenizer_or_shape(tmp_path, recipe_file):
    """The same number of ids is not the same words."""
    train(recipe_file, tmp_path / "first")
    (tmp_path / "other.txt").write_text("zebra quagga okapi " * 500 + sentences(300, 5000))
    other = Tokenizer.train([(tmp_path / "other.txt").read_text()], 303)
    other.save(tmp_path / "other")
    with pytest.raises(ConfigError, match="another tokenizer than that of --init-from"):
        train(recipe_file, tmp_path / "run", init_from=str(tmp_path / "first"), tokenizer=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"model\.num_hidden_layers is 1, but the model of --init-from has 2"):
        train(recipe_file, tmp_path / "run", init_from=str(tmp_path / "first"), **{"model.num_hidden_layers": 1})


def test_resume_refuses_a_newer_checkpoint_format(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "run")
    path = training_state.checkpoint_dir(tmp_path / "run", 8) / "manifest.json"
    content = json.loads(path.read_text()) | {"format_version": 99}
    path.write_text(json.dumps(content | {"sha256": atomic.manifest_hash(content)}))
    with pytest.raises(InvalidFileError, match="has format 99; this version reads up to 1"):
        train(recipe_file, tmp_path / "run")
    assert path.is_file()


@pytest.mark.parametrize("limit", [2_000, 60_000, 100_000])
def test_file_size_limit_leaves_no_partial_checkpoint(tmp_path, recipe_file, once, limit):
    """A real limit of the system, which libraries written in Rust meet too."""
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    resource = pytest.importorskip("resource")  # Windows has no such limits
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((MissingResourceError, OSError)):
            train(recipe_file, tmp_path / "run", steps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    train(recipe_file, tmp_path / "run", steps=8)
    assert hashes(tmp_path / "run", 8) == hashes(once, 8)


def test_run_refuses_prompts_that_fill_the_context(tmp_path, recipe_file):
    with pytest.raises(ConfigError, match="fills the model's context of 128 tokens"):
        train(recipe_file, tmp_path / "run", **{"train.sample_every": 5, "train.sample_prompts": ["7" * 200]})
    assert not list((tmp_path / "run").glob("metrics.jsonl"))
