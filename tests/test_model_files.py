"""Model folders as other people have them: inert tensors and keys, prefixes, shards, pickles. All load, or say why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from smolforge import cli, load
from smolforge.checkpoint import families, huggingface
from smolforge.config.model import FAMILIES
from smolforge.errors import InvalidFileError
from smolforge.models.decoder import inverse_frequencies
from smolforge.testing import tiny_config, tiny_model
from smolforge.verification import checks

IDS = torch.arange(40)[None] * 7 % 320


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model folder as Transformers writes it."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tie_word_embeddings=False)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Replace the tensors of a folder by what `change` makes of them."""
    path = folder / huggingface.WEIGHTS
    save_file({name: value.clone() for name, value in change(load_file(path)).items()}, path, huggingface.METADATA)


def edit_config(folder: Path, **changes) -> None:
    path = folder / huggingface.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(IDS)


def theirs(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def refusal(folder: Path) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(InvalidFileError) as caught:
        load(folder)
    return str(caught.value)


# Tensors and keys without effect


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "names", [["model.rotary_emb.inv_freq"], [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(2)]]
)
def test_rotary_buffers_are_ignored(folder, names, dtype):
    before, frequencies = logits(folder), inverse_frequencies(load(folder).config)
    rewrite(folder, lambda tensors: tensors | {name: frequencies.to(dtype) for name in names})
    assert torch.equal(logits(folder), before)
    assert torch.allclose(before, theirs(folder), atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda f: f / 2, lambda f: f * float("nan"), lambda f: f[:-1], lambda f: f.clamp(min=0.01)]
)
def test_rotary_buffers_of_other_values_are_refused(folder, change):
    """A buffer is where a scaled rotation hides."""
    frequencies = change(inverse_frequencies(load(folder).config))
    rewrite(folder, lambda tensors: tensors | {"model.rotary_emb.inv_freq": frequencies})
    assert re.search(
        r"model.rotary_emb.inv_freq holds other frequencies than rope_theta 10000 in config.json", refusal(folder)
    )


def test_buffers_are_not_counted_as_parameters(folder, capsys):
    frequencies = inverse_frequencies(load(folder).config)
    rewrite(folder, lambda tensors: tensors | {"model.rotary_emb.inv_freq": frequencies})
    assert checks.check_parameters(load(folder), folder).holds
    assert cli.run(["inspect", str(folder), "--debug"]) == 0
    err = capsys.readouterr().err
    assert err.count("bos_token_id") == 1, "each line once"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.masked_bias", "model.rotary_emb.cos", "score.weight"])
def test_other_tensors_are_refused_by_name(folder, name):
    rewrite(folder, lambda tensors: tensors | {name: torch.zeros(2)})
    assert refusal(folder).endswith(f"has 1 tensors this model has no place for, the first {name}")


def test_config_keys_without_effect_are_ignored_and_listed(folder, capsys):
    before = logits(folder)
    inert = {
        "_attn_implementation": "sdpa",
        "_attn_implementation_internal": None,
        "keys_to_ignore_at_inference": ["past_key_values"],
        "base_model_tp_plan": {"layers.*.self_attn.q_proj": "colwise"},
        "attention_bias": None,
        "mlp_bias": None,
        "attention_dropout": None,
        "initializer_range": None,
        "tie_word_embeddings": None,
        "rope_scaling": None,
        "_commit_hash": "4e20de36",
    }
    edit_config(folder, **inert)
    assert torch.equal(logits(folder), before)
    assert cli.run(["inspect", str(folder), "--debug"]) == 0
    assert "keys_to_ignore_at_inference" in capsys.readouterr().err
    assert cli.run(["inspect", str(folder)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_null_settings_are_defaults(family):
    content = families.to_hugging_face(tiny_config(model_type=family))
    for name in {*content} - {*families.REQUIRED_KEYS, "model_type", "num_key_value_heads", "architectures"}:
        without = {key: value for key, value in content.items() if key != name}
        assert families.from_hugging_face(content | {name: None}) == families.from_hugging_face(without), name
    assert families.from_hugging_face(content | {"num_key_value_heads": None}).num_key_value_heads == 4
    with pytest.raises(InvalidFileError, match="does not say hidden_size"):
        families.from_hugging_face(content | {"hidden_size": None})


# Names


def prefixed(prefix: str):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def in_layers(tensors):
    return {re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name): value for name, value in tensors.items()}


@pytest.mark.parametrize("change", [*map(prefixed, ("_orig_mod.", "module.", "module._orig_mod.")), in_layers])
def test_names_inside_wrappers_load(folder, change):
    before = logits(folder)
    rewrite(folder, change)
    assert torch.equal(logits(folder), before)


@pytest.mark.long
def test_names_inside_wrappers_load_in_every_verb(folder, capsys):
    before = logits(folder)
    rewrite(folder, prefixed("module._orig_mod."))
    assert cli.run(["generate", "model", "--prompt", "a", "--max-new-tokens", "2", "--debug"]) == 0
    assert "tensors are renamed, such as module._orig_mod.lm_head.weight to lm_head.weight" in capsys.readouterr().err
    assert cli.run(["verify", "model", "--against", "transformers"]) == 1
    assert "export --to transformers makes a folder that it reads" in capsys.readouterr().out
    assert cli.run(["export", "model", "--to", "transformers", "--out", "out"]) == 0
    assert torch.allclose(theirs(Path("out")), before, atol=1e-4)


@pytest.mark.long
def test_names_of_a_wrapped_model_load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(folder)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        save_file({name: value.clone() for name, value in wrapped.state_dict().items()}, folder / huggingface.WEIGHTS)
        assert torch.equal(logits(folder), before)


def test_prefixes_of_some_names_are_refused(folder):
    rewrite(folder, lambda tensors: {("module." if "norm" in name else "") + name: tensors[name] for name in tensors})
    assert "has names with and without a wrapper's prefix, such as " in refusal(folder)


def test_names_that_become_one_are_refused(folder):
    rewrite(folder, lambda tensors: tensors | in_layers(tensors))
    assert re.search(r"has both \S+ and \S+, which are the same tensor", refusal(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_saved_without_head_loads_if_tied(tmp_path, family):
    model = tiny_model(model_type=family, tie_word_embeddings=True)
    huggingface.save(model, tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32).save_pretrained(tmp_path / "decoder")
    assert torch.equal(logits(tmp_path / "decoder"), logits(tmp_path / "whole"))
    edit_config(tmp_path / "decoder", tie_word_embeddings=False)
    assert "has no lm_head.weight, and config.json does not tie the head" in refusal(tmp_path / "decoder")


# Files


@pytest.fixture
def sharded(folder, tmp_path) -> Path:
    huggingface.save(load(folder), tmp_path / "sharded", max_shard_bytes=60_000)
    assert len(huggingface.weight_files(tmp_path / "sharded")) >= 3
    return tmp_path / "sharded"


def test_shards_without_an_index_load(folder, sharded, capsys):
    (sharded / huggingface.INDEX).unlink()
    assert torch.equal(logits(sharded), logits(folder))
    assert cli.run(["inspect", str(sharded)]) == 0
    huggingface.weight_files(sharded)[1].unlink()
    assert re.search(r"lacks model-00002-of-\d+.safetensors, and has no model.safetensors.index.json", refusal(sharded))


def test_shards_of_two_sets_or_with_the_same_tensor_are_refused(sharded):
    (sharded / huggingface.INDEX).unlink()
    first, second, *_ = huggingface.weight_files(sharded)
    save_file(load_file(first) | load_file(second), second)
    assert "which another file of" in refusal(sharded)
    first.rename(sharded / "model-00001-of-00099.safetensors")
    assert "has shards of 000" in refusal(sharded)


def test_shards_without_an_index_load_from_the_hub(hub, sharded):
    files = {path.name: path.read_bytes() for path in sharded.iterdir() if path.name != huggingface.INDEX}
    hub.add("mylab/sharded", files)
    assert torch.equal(logits("mylab/sharded"), logits(sharded))
    hub.add("mylab/part", {name: content for name, content in files.items() if "-00002-" not in name})
    assert "mylab/part lacks model-00002-of-" in refusal("mylab/part")


def pickle(folder: Path, names: list[str]) -> None:
    """Replace a folder's weights by pickles of these names; the tied tensors of a state dict share memory."""
    tensors = load_file(folder / huggingface.WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.layers.0.input_layernorm.weight"]
    for number, name in enumerate(names):
        part = sorted(tensors)[number :: len(names)]
        torch.save({key: tensors[key] for key in part}, folder / name)
    (folder / huggingface.WEIGHTS).unlink()
    torch.save({"lr": 1e-3}, folder / "training_args.bin")
    torch.save({"step": 1}, folder / "optimizer.pt")


PICKLES = (
    ["pytorch_model.bin"],
    ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    ["model.pt"],
    ["pytorch_model.pth"],
)


@pytest.mark.parametrize("names", PICKLES)
def test_pickled_weights_are_refused_with_a_command_that_converts_them(folder, names, monkeypatch):
    before = load(folder)
    pickle(folder, names)
    sentence = refusal(folder)
    assert f"only pickled weights ({names[0]})" in sentence
    command = re.search(r'python -c "(.*)" (\S+)$', sentence)
    assert command, sentence
    monkeypatch.setattr(sys, "argv", ["-c", command[2]])
    exec(command[1], {})  # the long test runs it as it stands
    after = load(folder)
    assert torch.equal(after.lm_head_weight, before.lm_head_weight)
    assert torch.equal(after.model.norm.weight, before.model.layers[0].input_layernorm.weight)


@pytest.mark.long
def test_command_that_converts_pickled_weights_runs_in_a_shell(folder, tmp_path):
    folder = folder.rename(tmp_path / "a folder's name")
    pickle(folder, ["pytorch_model.bin"])
    command = refusal(folder).partition("theirs: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert logits(folder).isfinite().all()
