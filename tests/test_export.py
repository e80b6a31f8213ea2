"""What is handed on is read by others, and says the same there."""

import json

import pytest
import torch
from test_families import FAMILIES, oracle, random_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolforge import cli
from smolforge.checkpoint import huggingface, loading
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.exporters.transformers import to_transformers
from smolforge.testing import failing, tiny_model


@pytest.fixture
def folder(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return tmp_path / "model"


def test_to_transformers_writes_a_clean_equal_model(folder, tmp_path, whole_checks):
    generation = json.loads((folder / "generation_config.json").read_text()) | {
        "temperature": 0.2,
        "do_sample": True,
        "num_beams": 9,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    made = to_transformers(folder, tmp_path / "out")
    assert made.dtype == "float32"
    assert made.rounding_logit_diff == 0
    assert made.max_abs_logit_diff < 1e-5
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == set(made.files)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= there
    assert not there & {"manifest.json", "training"}
    with huggingface.SafetensorsReader(tmp_path / "out") as tensors:
        assert "lm_head.weight" not in tensors.shapes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert theirs.generation_config.temperature == 0.2
    assert theirs.generation_config.num_beams != 9
    text = "the model reads a token"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, tiny_model()(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_transformers_shards_every_family_in_bfloat16(tmp_path, family):
    oracle(random_config(family, 6)).save_pretrained(tmp_path / "source")
    made = to_transformers(tmp_path / "source", tmp_path / "out", "bfloat16", max_shard_bytes=50_000)
    assert "model.safetensors.index.json" in made.files
    assert made.dtype == "bfloat16"
    assert made.rounding_logit_diff > 0
    if family != "mixtral":  # where a token may round to another expert
        assert made.rounding_logit_diff < 0.5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert to_transformers(tmp_path / "out", tmp_path / "again").dtype == "bfloat16"


def test_to_transformers_keeps_special_token_ids(folder, tmp_path):
    content = json.loads((folder / "config.json").read_text()) | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(content))
    to_transformers(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 2)


def test_to_transformers_keeps_no_model_with_other_logits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("smolforge.models.decoder.apply_rope", lambda x, angles: x)
    with pytest.raises(InvalidFileError, match="does not say the same in Transformers: logits differ by"):
        to_transformers(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_to_transformers_detects_changed_weights(folder, tmp_path, monkeypatch):
    right = huggingface.disk_tensors
    monkeypatch.setattr(huggingface, "disk_tensors", lambda *given: {n: t * 1.5 for n, t in right(*given).items()})
    with pytest.raises(AssertionError, match="was not written as it is"):
        to_transformers(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "said"), [(1e5, "has values that torch.float16 cannot hold"), (float("nan"), "holds NaN or infinity")]
)
def test_to_transformers_refuses_values_a_dtype_cannot_hold(tmp_path, value, said):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = value
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    with pytest.raises(InvalidFileError, match=said):
        to_transformers(tmp_path / "model", tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_to_transformers_keeps_an_empty_folder_on_failure(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with failing(tmp_path, after=1), pytest.raises(MissingResourceError):
        to_transformers(folder, tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert to_transformers(folder, tmp_path / "out").greedy_match


def test_to_transformers_leaves_nothing_on_a_full_disk(folder, tmp_path):
    with failing(tmp_path, after=1), pytest.raises(MissingResourceError, match="the disk is full"):
        to_transformers(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_export_command_reports_the_comparison(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["export", str(folder), "--to", "transformers", "--out", str(out), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "Transformers loads it and says the same: logits within" in said
    assert "rounding to bfloat16 changed them by" in said
    assert cli.run(["export", str(folder), "--to", "transformers", "--out", str(out)]) == 2
    assert "is there already; name a new folder" in capsys.readouterr().err
    assert cli.run(["export", str(out), "--to", "transformers", "--out", str(tmp_path / "b"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["greedy_match"] is True
    assert content["files"]["model.safetensors"] > 0
    assert loading.load(tmp_path / "b").config == loading.load(folder).config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "int8"], "dtype is 'int8'; it should be one of float32, bfloat16"),
        (["--max-shard-size", "many"], "max-shard-size is 'many'; it should be a size such as 500MB"),
        (["--max-shard-size", "0.1"], "max-shard-size is '0.1'"),
        (["--max-shard-size", "9" * 400 + "GB"], "it should be a size such as 500MB"),
    ],
)
def test_export_command_refuses_invalid_values(folder, tmp_path, capsys, words, said):
    assert cli.run(["export", str(folder), "--to", "transformers", "--out", str(tmp_path / "o"), *words]) == 2
    assert said in capsys.readouterr().err


def test_to_transformers_refuses_presets(tmp_path):
    with pytest.raises(ConfigError):
        to_transformers("smollm2-nano", tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "words", "said"),
    [
        ("gguf", ["--dtype", "bfloat16"], "--dtype is not for --to gguf, which takes --type, --text"),
        ("transformers", ["--type", "q8_0"], "--type is not for --to transformers"),
        ("transformers", ["--public"], "--public is not for --to transformers"),
        ("adapter", ["--max-shard-size", "1GB"], "--max-shard-size is not for --to adapter, which takes no more"),
        ("space", ["--scores", "a.json"], "--scores is not for --to space, which takes --dtype, --license"),
        ("hub", ["--embedding", "bfloat16"], "--embedding is not for --to hub"),
        ("int8", ["--dry-run"], "--dry-run is not for --to int8"),
    ],
)
def test_export_command_refuses_flags_of_other_formats(tmp_path, capsys, to, words, said):
    assert cli.run(["export", "nothing", "--to", to, "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
