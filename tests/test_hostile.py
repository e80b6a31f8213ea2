"""Files that lie, burst or never end: one sentence and the right exit code, at once, and no code of theirs is run."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolforge import cli
from smolforge.checkpoint import huggingface
from smolforge.testing import tiny_config, tiny_model

SECONDS = 2


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return tmp_path / "model"


@pytest.fixture(autouse=True, scope="module")
def _imports_are_done():
    """What a command imports at its first call is no part of what a file costs."""
    cli.run(["inspect", "smollm2-nano"])
    cli.run(["generate", "nobody/nothing", "--prompt", "a"])


def refused(capsys, *words: object, code: int = 3) -> str:
    """The one sentence of a command that is refused in time."""
    begun = time.process_time()  # of a processor: other programs may be busy
    found = cli.run([str(word) for word in words])
    taken = time.process_time() - begun
    err = capsys.readouterr().err
    assert found == code, err
    assert taken < SECONDS
    assert err.count("\n") == 1
    assert err.startswith("smolforge: ")
    assert "this should not have happened" not in err
    assert len(err) < 1400
    return err


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHTS = {
    "nothing": b"",
    "half a length": b"\x08\x00",
    "header beyond the file": header(b"{}", 2**40),
    "header of 2^63": header(b"{}", 2**63),
    "no JSON": header(b"<html>"),
    "a list": header(b"[]"),
    "data missing": header(json.dumps({"a": ONE}).encode()),
    "overlapping": header(json.dumps({"a": ONE, "b": ONE}).encode()) + b"\0" * 8,
    "a gap": header(json.dumps({"a": ONE | {"data_offsets": [8, 16]}}).encode()) + b"\0" * 16,
    "absurd shape": header(json.dumps({"a": ONE | {"shape": [2**62, 2**62]}}).encode()) + b"\0" * 8,
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_malformed_are_refused(folder, capsys, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(capsys, "generate", folder, "--prompt", "a")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_weights_truncated_are_refused(folder, capsys, share):
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    refused(capsys, "generate", folder, "--prompt", "a")


NOT_MIXTRALS = dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved"))
CONFIGS = {
    "wide": ({"hidden_size": 10**12}, "hidden_size"),
    "deep": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "as deep as may be": ({"num_hidden_layers": 4096}, "has 20 tensors where config.json makes it 36,866"),
    "as many experts as may be": (
        {"model_type": "mixtral", "num_hidden_layers": 4096, "num_local_experts": 4096, **NOT_MIXTRALS},
        "has 20 tensors where config.json makes it",
    ),
    "negative": ({"num_attention_heads": -4}, "num_attention_heads"),
    "a text": ({"hidden_size": "32"}, "hidden_size"),
    "a truth": ({"num_key_value_heads": True}, "num_key_value_heads"),
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
    "odd theta": ({"rope_parameters": {"rope_theta": 1e-300}}, "rope_theta"),
    "odd layers": ({"layer_types": 5}, "layer_types"),
    "long": ({"model_type": "x" * 100_000}, "model_type"),
    "escape sequences": ({"model_type": "\x1b[31m\x07"}, "model_type"),
}


@pytest.mark.parametrize(("change", "said"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("verb", ["generate", "inspect"])
def test_config_with_hostile_values_is_refused(folder, capsys, verb, change, said):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    if verb == "inspect" and "tensors" in said:
        assert cli.run(["inspect", str(folder)]) == 0  # the shape alone is no lie
        return
    err = refused(capsys, verb, folder, *(["--prompt", "a"] if verb == "generate" else []))
    assert said in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": [' + b"{}," * 2_000_000 + b"{}]}", b"{"]
)
def test_config_that_is_no_json_object_is_refused(folder, capsys, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(capsys, "inspect", folder)


def test_config_that_never_ends_is_refused(folder, capsys):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "is no regular file" in refused(capsys, "inspect", folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert "is no regular file" in refused(capsys, "generate", folder, "--prompt", "a")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\nb\x1b[31m.safetensors", "x.bin", 7])
def test_index_pointing_elsewhere_is_refused(folder, capsys, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "which is no .safetensors file beside it; it is not followed" in refused(capsys, "generate", folder)


def test_index_must_match_its_shards(folder, capsys):
    huggingface.save(tiny_model(), folder, max_shard_bytes=30_000)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = huggingface.weight_files(folder)[0].name
    index.write_text(json.dumps(content))
    assert "does not hold what model.safetensors.index.json says" in refused(
        capsys, "generate", folder, "--prompt", "a"
    )


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_dtype_are_refused(folder, capsys, kind):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(kind) for name, tensor in tensors.items()}, folder / "model.safetensors")
    said = refused(capsys, "generate", folder, "--prompt", "a")
    assert "quantised weights are read only as export has them" in said


def edit_tokenizer(folder: Path, change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_tokenizer_that_expands_text_is_refused(folder, capsys):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    edit_tokenizer(
        folder, lambda content: content.update(normalizer={"type": "Sequence", "normalizers": [replace] * 5})
    )
    assert "times longer; none needs that" in refused(capsys, "generate", folder, "--prompt", "a")


def test_tokenizer_of_another_model_is_refused(folder, capsys):
    def shift(content):
        content["model"]["vocab"] = {token: number + 1000 for token, number in content["model"]["vocab"].items()}

    edit_tokenizer(folder, shift)
    assert "they do not belong together" in refused(capsys, "generate", folder, "--prompt", "a")


def test_tokenizer_that_cannot_encode_is_refused(folder, capsys):
    model = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1}, "unk_token": "nope"}
    edit_tokenizer(folder, lambda content: content.update(model=model, added_tokens=[]))
    assert "cannot encode the text" in refused(capsys, "generate", folder, "--prompt", "words")


def test_weights_with_nan_are_refused(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert cli.run(["generate", str(folder), "--prompt", "a"]) == 3
    assert "its weights are damaged" in capsys.readouterr().err


def test_generate_handles_extreme_settings(folder, capsys):
    assert cli.run(["generate", str(folder), "--prompt", "a", "--temperature", "1e-300", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    for words, said in (
        (["--repetition-penalty", "1e-300"], "repetition_penalty"),
        (["--device", "meta"], "device is 'meta'; it should be auto, cpu, cuda or mps"),
    ):
        assert said in refused(capsys, "generate", folder, "--prompt", "a", *words, code=2)


def test_model_names_that_do_not_exist_are_refused(tmp_path, capsys, hub):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "is a link to nothing" in refused(capsys, "generate", tmp_path / "loop", "--prompt", "a")
    refused(capsys, "generate", "x" * 300, code=2)
    assert "is a shape with random weights" in refused(capsys, "verify", "smollm2-nano", code=2)
    assert hub.requests == []


def test_config_limits_allow_every_known_model():
    assert tiny_config(vocab_size=2**24, hidden_size=2**14, intermediate_size=2**18, num_hidden_layers=200)
