"""Folders: strict in, whole out, sound or refused."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smolforge import atomic
from smolforge.checkpoint import families, huggingface, loading, training_state
from smolforge.config import ModelConfig
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.runs import train
from smolforge.testing import Crash, crashing, failing, flip_bit, tiny_config, tiny_model
from smolforge.training.run_folder import read_records


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return tmp_path / "model"


def edit_config(folder: Path, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def edit_weights(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# A model folder


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_in_transformers(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    huggingface.save(model, tmp_path, model.tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(theirs, LlamaForCausalLM)
    ids = torch.randint(320, (2, 30))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_model_loads_here(tmp_path, tied):
    names = tiny_config(tie_word_embeddings=tied).model_dump(exclude={"model_type"})
    theirs = LlamaForCausalLM(LlamaConfig(**names)).eval()
    theirs.save_pretrained(tmp_path)
    ours = huggingface.load(tmp_path)
    assert ours.config == tiny_config(tie_word_embeddings=tied, initializer_range=0.1)
    ids = torch.randint(320, (2, 30))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name", ["config_SmolLM2-135M.json", "config_SmolLM2-135M-Instruct.json", "config_SmolLM2-360M.json"]
)
def test_published_configs_are_read(shared, name):
    config = families.read_config(shared / "smollm2-tokenizer" / name)
    assert config.resolved_head_dim == 64
    if "360M" not in name:
        assert config == ModelConfig()


def test_save_and_load_are_bit_exact(folder):
    model, again = tiny_model(), loading.load(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias is True, which is not implemented"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_type is 'yarn', which is not implemented"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"sliding_window": 128}, "a setting 'sliding_window' that is not known here"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 321}, "model.embed_tokens.weight has shape"),
        ({"tie_word_embeddings": False}, "has no lm_head.weight, and config.json does not tie"),
    ],
)
def test_load_refuses_configs_of_another_model(folder, change, said):
    edit_config(folder, **change)
    with pytest.raises(InvalidFileError, match=said.replace(".", r"\.")):
        huggingface.load(folder)


def test_load_refuses_missing_and_extra_tensors(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InvalidFileError, match=r"lacks 1 of 20 tensors, the first model\.norm\.weight"):
        huggingface.load(folder)
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32), "extra": torch.ones(1)}))
    with pytest.raises(InvalidFileError, match="has 1 tensors this model has no place for, the first extra"):
        huggingface.load(folder)


def test_load_refuses_a_tied_head_unlike_the_embedding(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert huggingface.load(folder).config.tie_word_embeddings
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(InvalidFileError, match="differs from the embedding"):
        huggingface.load(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 8 + b"{}"])
def test_load_refuses_corrupted_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidFileError, match="cannot be read"):
        huggingface.load(folder)


# MODEL


def test_load_refuses_names_that_are_no_model(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no model 'smollm2-135n'.*Did you mean smollm2-135m"):
        loading.load("smollm2-135n")
    with pytest.raises(ConfigError, match=r"nothing to say; its published weights are HuggingFaceTB/SmolLM2-135M"):
        loading.load("smollm2-135m")
    with pytest.raises(InvalidFileError, match=r"is not a model folder: it has no config\.json"):
        loading.load(tmp_path)
    assert loading.load("smollm2-nano", random=True).config.hidden_size == 192


# Whole or not at all


def put(folder: Path, text: str = "content") -> None:
    def fill(temporary: Path) -> None:
        (temporary / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            with (temporary / name).open("w") as file:
                file.write(f"{text} {name}")

    atomic.write_dir_atomic(folder, fill, {"step": 1})


def test_write_dir_atomic_writes_a_valid_manifest(tmp_path):
    put(tmp_path / "step-1")
    assert set(atomic.check_manifest(tmp_path / "step-1")["files"]) == {"a", "b", "sub/c"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("after", range(4))
def test_write_dir_atomic_leaves_nothing_on_a_full_disk(tmp_path, after):
    put(tmp_path / "step-1")
    with failing(tmp_path, after), pytest.raises(MissingResourceError, match="the disk is full.*are free"):
        put(tmp_path / "step-2")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    atomic.check_manifest(tmp_path / "step-1")


@pytest.mark.parametrize("after", range(1, 17))
def test_write_dir_atomic_crash_leaves_only_temporary_files(tmp_path, after):
    put(tmp_path / "step-1")
    with crashing(tmp_path, after), pytest.raises(Crash):
        put(tmp_path / "step-2")
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", ".tmp-step-2"}
    put(tmp_path / "step-2")
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_manifest_detects_every_flipped_bit(tmp_path):
    put(tmp_path / "step-1")
    for name in ("a", "sub/c", "manifest.json"):
        path = tmp_path / "step-1" / name
        content = path.read_bytes()
        for bit in range(len(content) * 8):
            flip_bit(path, bit)
            if name == "manifest.json" and _same_json(path.read_bytes(), content):
                continue  # white space says nothing
            with pytest.raises(InvalidFileError, match="damaged"):
                atomic.check_manifest(tmp_path / "step-1")
            path.write_bytes(content)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_manifest_detects_missing_and_truncated_files(tmp_path):
    put(tmp_path / "step-1")
    (tmp_path / "step-1" / "a").write_text("conten")
    with pytest.raises(InvalidFileError, match="its size is not"):
        atomic.check_manifest(tmp_path / "step-1")
    (tmp_path / "step-1" / "a").unlink()
    with pytest.raises(InvalidFileError, match="is missing"):
        atomic.check_manifest(tmp_path / "step-1")
    atomic.check_manifest(tmp_path / "step-1", only=["b"])


# A run's checkpoints


def checkpoint(run: Path, step: int, loss: float | None = None, model=None) -> Path:
    model = model or tiny_model()
    folder = training_state.checkpoint_dir(run, step)
    facts = {"step": step, "tokens": 0, "corpus": "", "validation_loss": loss}
    training_state.save_checkpoint(
        folder, training_state.take_snapshot(model, {"exp_avg.model.norm.weight": torch.ones(32)}, facts)
    )
    return folder


def test_latest_valid_skips_and_reports_corrupted_checkpoints(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    flip_bit(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors", 40_000)
    (tmp_path / "checkpoints" / ".tmp-step-00000004").mkdir()
    said: list[str] = []
    assert training_state.latest_valid(tmp_path, said.append) == training_state.checkpoint_dir(tmp_path, 2)
    assert len(said) == 1
    assert "step-00000003 is skipped" in said[0]
    assert "damaged" in said[0]


def test_prune_checkpoints_keeps_the_last_and_the_best(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, 2.4], 1):
        checkpoint(tmp_path, step, loss)
    training_state.prune_checkpoints(tmp_path, keep_last=2, keep_best=True)
    assert [path.name for path in training_state.list_checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]
    training_state.prune_checkpoints(tmp_path, keep_last=2, keep_best=False)
    assert [path.name for path in training_state.list_checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]


def test_random_state_is_restored():
    """Restored twice, they give the same numbers twice, the second half of a pair of normal ones included."""

    def draw():
        normal = np.random.standard_normal(3)
        return random.gauss(0, 1), random.random(), normal.tolist(), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.standard_normal()
    tensors = training_state.rng_state_tensors()
    training_state.restore_rng_state(tensors)
    first = draw()
    draw()
    training_state.restore_rng_state(tensors)
    assert draw() == first


def test_checkpoint_refuses_a_newer_format(tmp_path):
    folder = checkpoint(tmp_path, 1)
    facts = json.loads((folder / "training" / "state.json").read_text())
    (folder / "training" / "state.json").write_text(json.dumps(facts | {"format_version": 99}))
    with pytest.raises(InvalidFileError, match="has format 99"):
        training_state.read_metadata(folder)


def test_load_does_not_read_the_optimizer(tmp_path):
    """A damaged optimizer file does not keep a model from being loaded from its run."""
    folder = checkpoint(tmp_path, 1)
    flip_bit(folder / "training" / "optimizer.safetensors", 1500)
    assert loading.resolve_model_path(tmp_path) == folder
    shutil.copytree(folder, tmp_path / "alone")
    loading.load(tmp_path / "alone")
    flip_bit(tmp_path / "alone" / "model.safetensors", 99_000)
    with pytest.raises(InvalidFileError, match="damaged"):
        loading.load(tmp_path / "alone")


@pytest.mark.parametrize("message", ["Error while serializing: I/O error: No space left on device (os error 28)"])
def test_safetensors_errors_report_a_full_disk(tmp_path, message):
    def fill(temporary: Path) -> None:
        (temporary / "half").write_text("x")
        raise SafetensorError(message)

    with pytest.raises(MissingResourceError, match="the disk is full.*are free"):
        atomic.write_dir_atomic(tmp_path / "step-1", fill, {})
    assert list(tmp_path.iterdir()) == []


def test_config_without_sizes_is_refused(folder):
    content = json.loads((folder / "config.json").read_text())
    del content["hidden_size"]
    with pytest.raises(InvalidFileError, match="does not say hidden_size"):
        families.from_hugging_face(content)


# What earlier versions wrote


@pytest.mark.parametrize("number", range(1, training_state.FORMAT_VERSION + 1))
def test_runs_of_every_format_resume(tmp_path, number):
    """Kept as they were written: the model speaks, and two further steps are what they would have been then.

    Format 2 has a decision of the guard in it, which must be kept to.
    """
    shutil.copytree(Path(__file__).parent / "fixtures" / f"format-{number}", tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "expected.json").read_text())
    assert loading.load(tmp_path / "run").config.hidden_size == 16
    train(tmp_path / "run" / "recipe.toml", tmp_path / "run", steps=6)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    for record, then in zip(records[4:], expected, strict=True):
        assert record["step"] == then["step"]
        assert record["loss"] == pytest.approx(then["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-4)
    assert records[-1]["batch"] == (9 if number == 2 else 5)
