"""Weights as integers: rounded as they should be, read back to the bit, known to every verb, refused where broken."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import NANO
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_nanotron import write as nanotrons
from test_study import conducted, study_file
from transformers import AutoModelForCausalLM

import smolforge
from smolforge import cli
from smolforge.checkpoint import huggingface, loading, peft_adapter, quantization
from smolforge.config import Lora, custom_classes
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.quantize import to_quantized
from smolforge.exporters.texts import measured_text
from smolforge.exporters.transformers import to_transformers
from smolforge.generation.cpu_decoding import PrepackedModel, prepack
from smolforge.models import lora, quantized
from smolforge.models.attention import KVCache
from smolforge.models.quantized import (
    QuantizationScheme,
    dequantize,
    nearest_integers,
    pack,
    quantize,
    search_grid,
    unpack,
)
from smolforge.testing import failing, sentences, tiny_model
from smolforge.verification import verify

SCHEMES = {
    "int8": QuantizationScheme(8, None, True),
    "int8, embedding kept": QuantizationScheme(8),
    "int4": QuantizationScheme(4, 32, True),
    "int4, embedding kept": QuantizationScheme(4, 32),
    "int4, zero points": QuantizationScheme(4, 32, True, zero_point=True),
}
TIMES = {"ROUNDS": 1, "PREFILL_TOKENS": 8, "DECODE_TOKENS": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


def quantize_weight(weight, bits, size=None):
    grid = search_grid(weight, QuantizationScheme(bits, size))
    return nearest_integers(weight, grid, bits), grid.scale


def model():
    return tiny_model(**WIDE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    made = model()
    huggingface.save(made, folder, made.tokenizer)
    return folder


@pytest.fixture(scope="module")
def exported(plain):
    """A folder of each scheme, and what its table says."""
    text = plain.parent / "text.txt"
    text.write_text(sentences(20))
    with pytest.MonkeyPatch.context() as patch:
        for name, few in TIMES.items():
            patch.setattr(f"smolforge.exporters.quantize.{name}", few)
        made = {
            name: to_quantized(plain, plain.parent / name, scheme, text=text, calibrate="none")
            for name, scheme in SCHEMES.items()
        }
    return {name: (plain.parent / name, table) for name, table in made.items()}


@pytest.mark.parametrize(("bits", "size"), [(8, None), (4, 32), (4, 64)])
def test_quantize_weight_equals_a_plain_loop(bits, size):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(bits))
    integers, scale = quantize_weight(weight, bits, size)
    half, width = 2 ** (bits - 1), size or 64
    for row in range(3):
        for group in range(64 // width):
            own = weight[row, group * width : (group + 1) * width].tolist()
            tried = {}
            for clip in quantized.CLIPS[bits]:
                step = torch.tensor(clip * (max(map(abs, own)) / (half - 0.5))).bfloat16().item()
                found = [max(-half, min(half - 1, round(each / step))) for each in own]
                tried[sum((n * step - each) ** 2 for n, each in zip(found, own, strict=True))] = step, found
            step, found = tried[min(tried)]
            assert scale[row, group].item() == step
            assert integers[row, group * width : (group + 1) * width].tolist() == found


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=64, max_size=64),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([None, 32, 64]),
)
def test_quantize_weight_error_is_at_most_half_a_step(values, bits, size):
    weight = torch.tensor([values])
    integers, scale = quantize_weight(weight, bits, size)
    assert torch.equal(unpack(pack(integers, bits), bits), integers)
    back = dequantize(unpack(pack(integers, bits), bits), scale)
    step = scale.float().repeat_interleave(size or 64, 1)
    inside = (integers > -(2 ** (bits - 1))) & (integers < 2 ** (bits - 1) - 1)
    assert ((back - weight).abs() <= step / 2 * (1 + 1e-5) + 1e-30)[inside].all()
    plain = weight.unflatten(-1, (-1, size or 64)).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    assert ((back - weight).square().sum() <= (64 * (plain * 1.01).square().sum())).all()
    assert (back[weight == 0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_quantize_weight_is_no_worse_than_numpy_rounding(data):
    """Plain symmetric rounding, written again without torch; 4 bits, which may cut, must lose no more in squares."""
    bits, size = data.draw(st.sampled_from([(8, 64), (4, 32), (4, 64)]))
    seed, power = data.draw(st.integers(0, 2**31)), data.draw(st.integers(-20, 20))
    weight = (np.random.default_rng(seed).standard_normal((4, 128)) * 2.0**power).astype(np.float32)
    groups = weight.reshape(4, -1, size)
    half = 2 ** (bits - 1)
    exact = np.abs(groups).max(-1, keepdims=True) / (half - 0.5)
    scale = torch.from_numpy(exact).bfloat16().float().numpy()
    plain = np.clip(np.round(groups / scale), -half, half - 1)
    integers, found = quantize_weight(torch.from_numpy(weight), bits, size)
    ours, theirs = integers.numpy().reshape(plain.shape), found.float().numpy()[..., None]
    if bits == 8:
        assert (ours == plain).all()
        assert (theirs == scale).all()
    assert ours.min() >= -half
    assert ours.max() < half
    lost, least = (((n * step - groups) ** 2).sum(-1) for n, step in ((ours, theirs), (plain, scale)))
    assert (lost <= least * (1 + 1e-5)).all()
    assert (
        lost <= size * (0.76 * scale[..., 0]) ** 2
    ).all()  # half a step, or cut where bfloat16 rounded the scale down
    nearest = np.clip(np.round(groups / theirs), -half, half - 1)
    assert (ours == nearest).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_quantize_weight_handles_tiny_and_huge_values(size):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * size
    for bits, group in ((8, None), (4, 32)):
        integers, scale = quantize_weight(weight, bits, group)
        back = dequantize(unpack(pack(integers, bits), bits), scale)
        assert (back - weight).abs().max() < 0.11 * weight.abs().max()


def test_pack_puts_the_first_integer_in_the_low_bits():
    assert pack(torch.tensor([[-8, -7, 7, 0, 0, 0, 0, 0]], dtype=torch.int8), 4).item() == 0x88888F10 - 2**32
    assert pack(torch.tensor([[-128, -127, 127, 0]], dtype=torch.int8), 8).item() == 0x80FF0100 - 2**32


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_model_survives_save_and_load(exported, plain, name):
    folder, _ = exported[name]
    wanted, found = loading.load(plain), smolforge.load(str(folder))
    for rest in wanted.parameters():
        rest.data.copy_(rest.bfloat16() if rest.ndim == 1 else rest)
    quantize(wanted, SCHEMES[name])
    if not SCHEMES[name].embedding:
        wanted.model.embed_tokens.weight.data.copy_(wanted.model.embed_tokens.weight.bfloat16())
    assert found.quantization == SCHEMES[name]
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids), wanted(ids))
        again = folder.parent / f"{name} again"
        huggingface.save(found, again, found.tokenizer, dtype=torch.bfloat16)
        assert torch.equal(loading.load(again)(ids), wanted(ids))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_quantized_layer_equals_the_dequantized_matmul():
    made, x = model(), torch.randn(3, 64)
    before = copy.deepcopy(made)
    quantize(made, QuantizationScheme(4, 32))
    for name, layer in quantized.quantized_layers(made).items():
        integers, scale = quantize_weight(before.get_submodule(name).weight, 4, 32)
        matrix = (integers.float().unflatten(-1, (-1, 32)) * scale.float()[..., None]).flatten(-2)
        rows = x if layer.in_features == 64 else torch.cat([x, x[:, :32]], 1)
        torch.testing.assert_close(layer(rows), rows @ matrix.T)
        assert 0 < (matrix - before.get_submodule(name).weight).abs().max() < 0.1


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_sizes_equal_hand_arithmetic(exported, name):
    folder, table = exported[name]
    scheme, config = SCHEMES[name], loading.read_config(folder)
    c, f, v, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    matrices = [(c, c), (c // 2, c), (c // 2, c), (c, c), (f, c), (f, c), (c, f)]
    group_bytes = 2.5 if scheme.zero_point else 2
    disk = sum(o * i * scheme.bits // 8 + group_bytes * o * (i // (scheme.group_size or i)) + 16 for o, i in matrices)
    disk *= layers
    disk += (v * c + 2 * v + 16) if scheme.embedding else 2 * v * c
    norms = (2 * layers + 1) * c
    assert table.after.tensor_bytes == disk + 2 * norms
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert table.after.bytes_on_disk == disk + 2 * norms + 8 + header
    assert table.after.bytes_in_memory == disk + 4 * norms + (0 if scheme.embedding else 2 * v * c)
    assert (
        table.before.tensor_bytes
        == table.before.bytes_in_memory
        == 4 * sum(o * i for o, i in matrices) * layers + (4 * v * c + 4 * norms)
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_cpu_decoding_is_near_the_quantized_model(exported, name):
    made = loading.load(exported[name][0])
    ids, network = torch.arange(5, 45)[None], prepack(made)
    assert isinstance(network, PrepackedModel)
    cache, found = KVCache(made.config, 1, 64, like=made.model.norm.weight), []
    with torch.inference_mode():
        wanted = made(ids)[0]
        read = network.logits(network.hidden_states(ids, torch.arange(40)[None], cache.view(torch.arange(40)[None])))[0]
        for place in range(40):
            at = torch.tensor([[place]])
            found.append(network.logits(network.hidden_states(ids[:, place : place + 1], at, cache.view(at))[:, 0]))
    torch.testing.assert_close(read, wanted, atol=1e-4, rtol=1e-4)  # a prompt, in fp32
    spread = wanted.std().item()
    assert 0 < (torch.cat(found) - wanted).abs().max() < 0.05 * spread  # an answer, factors in bfloat16
    assert (torch.cat(found).argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.9


def test_quantized_model_works_with_every_verb(exported, plain, capsys):
    folder, _ = exported["int4"]
    for words in (
        ["generate", folder, "--prompt", "the model", "--max-new-tokens", 4, "--seed", 0, "--json"],
        ["evaluate", folder, "--text", plain.parent / "text.txt", "--json"],
        ["verify", folder, "--out", folder / "verify.json"],
        ["inspect", folder, "--json"],
    ):
        assert cli.run([str(word) for word in words]) == 0, words
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["quantization"] == {
        "bits": 4,
        "group_size": 32,
        "embedding": True,
        "zero_point": False,
        "calibrated": False,
    }
    assert facts["memory_bytes"] == sum(each.nbytes for each in loading.load(folder).parameters())


def test_export_prints_the_quantization_table_and_json(plain, tmp_path, capsys, monkeypatch):
    for name, few in TIMES.items():
        monkeypatch.setattr(f"smolforge.exporters.quantize.{name}", few)
    words = ["export", str(plain), "--to", "int8", "--text", str(plain.parent / "text.txt")]
    (plain.parent / "text.txt").write_text(sentences(20))
    assert cli.run([*words, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("arithmetic", "bits a byte", "same likeliest token", "answering, tokens/s"))
    assert cli.run([*words, "--out", str(tmp_path / "b"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["after"]["loss"] == pytest.approx(made["before"]["loss"], rel=5e-3)
    assert made["after"]["top1_agreement"] > 0.9
    assert 0 < made["max_abs_logit_diff"] < 1
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_quantization_refuses_unsupported_uses(exported, plain, tmp_path, capsys):
    folder, _ = exported["int8"]
    for to, what in ((to_transformers, ()), (to_quantized, (QuantizationScheme(8),))):
        with pytest.raises(ConfigError, match="is of integers"):
            to(folder, tmp_path / "out", *what)
    with pytest.raises(ConfigError, match="is of integers"):
        to_gguf(folder, tmp_path / "no.gguf")
    with pytest.raises(ConfigError, match="has integers, .* transformers cannot know; without --against"):
        verify(folder, against=("transformers",))
    small = [
        "--train.sequence-length",
        "64",
        "--train.batch-tokens",
        "256",
        "--data.sources",
        str(plain / "config.json"),
    ]
    assert (
        cli.run(["train", "recipes/nano.toml", "--run", str(tmp_path / "run"), "--init-from", str(folder), *small]) == 2
    )
    assert "holds integers, which do not learn" in capsys.readouterr().err
    assert not (tmp_path / "run" / "corpus").exists()
    with pytest.raises(ConfigError, match="has 96 inputs, which groups of 64 do not divide"):
        to_quantized(plain, tmp_path / "out", QuantizationScheme(4, 64), calibrate="none")
    mixture = tiny_model(model_type="mixtral")
    with pytest.raises(ConfigError, match="experts of a mixtral"):
        quantize(mixture, QuantizationScheme(8))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def quick(monkeypatch):
    for name, few in TIMES.items():
        monkeypatch.setattr(f"smolforge.exporters.quantize.{name}", few)


def exporting(source, out, *words, to="int4"):
    rounding = ["--calibrate", "none"] if to == "int4" and "--calibrate" not in words else []
    return cli.run(["export", str(source), "--to", to, "--out", str(out), *map(str, words), *rounding])


@pytest.mark.parametrize("kind", ["adapter", "nanotron", "q8_0", "f16"])
def test_quantize_accepts_adapter_nanotron_and_gguf(kind, plain, tmp_path, quick, capsys):
    if kind == "adapter":
        source, made = tmp_path / "adapter", model()
        lora.add_lora(made, Lora(rank=2), 0)
        learned = {name: torch.full_like(each, 0.01) for name, each in lora.lora_parameters(made).items()}
        peft_adapter.write_adapter(source, peft_adapter.adapter_config(Lora(rank=2), str(plain)), learned)
    elif kind == "nanotron":
        source = nanotrons(tmp_path / "nanotron", model())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(plain / name, source)
    else:
        to_gguf(plain, source := tmp_path / "it.gguf", kind)
    (tmp_path / "text.txt").write_text(sentences(20))
    assert exporting(source, tmp_path / "out", "--text", tmp_path / "text.txt", "--json") == 0, capsys.readouterr()
    before = json.loads(capsys.readouterr().out)["before"]
    assert 0.8 < before["tensor_bytes"] / before["bytes_on_disk"] <= 1
    assert loading.load(tmp_path / "out").quantization == QuantizationScheme(4, 32, True)
    report = ["verify", str(tmp_path / "out"), "--against", str(source), "--out", str(tmp_path / "v.json")]
    assert cli.run(report) == 0, capsys.readouterr()


def test_adapter_of_a_quantized_base_is_refused(exported, tmp_path):
    made = model()
    lora.add_lora(made, Lora(rank=2), 0)
    content = peft_adapter.adapter_config(Lora(rank=2), str(exported["int4"][0]))
    peft_adapter.write_adapter(
        tmp_path / "adapter", content, {name: each.detach() for name, each in lora.lora_parameters(made).items()}
    )
    with pytest.raises(
        InvalidFileError, match="holds integers; let base_model_name_or_path there name the model that was"
    ):
        loading.load(tmp_path / "adapter")


def test_failed_quantize_leaves_no_files(plain, tmp_path, quick, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("smolforge.exporters.quantize.measure_speeds", interrupted)
    assert exporting(plain, tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with failing(tmp_path, 3):
        assert exporting(plain, tmp_path / "out") == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_position_embeddings": 3}, "has a context of 3 tokens, and its speed is measured in 4 or more"),
        ({"intermediate_size": 90}, "has 90 inputs, which groups of 32 do not divide; int8 asks for widths that 4"),
        ({"model_type": "mixtral"}, "integers for them are not implemented; int8 asks .* --to gguf .* and experts"),
    ],
)
def test_quantize_refuses_unsupported_models(changes, said, tmp_path):
    made = tiny_model(**WIDE | changes)
    huggingface.save(made, tmp_path / "model", made.tokenizer)
    with pytest.raises(ConfigError, match=said):
        to_quantized(tmp_path / "model", tmp_path / "out", QuantizationScheme(4, 32), calibrate="none")
    assert not (tmp_path / "out").exists()


def test_quantize_times_a_short_context(tmp_path, quick):
    made = tiny_model(**WIDE, max_position_embeddings=4)
    huggingface.save(made, tmp_path / "model", made.tokenizer)
    assert (
        to_quantized(
            tmp_path / "model", tmp_path / "out", QuantizationScheme(4, 32), calibrate="none"
        ).after.decode_tokens_per_second
        > 0
    )


def test_quantize_names_weights_with_nan(tmp_path):
    made = model()
    made.model.layers[0].mlp.up_proj.weight.data[3, 3] = torch.nan
    huggingface.save(made, tmp_path / "model", made.tokenizer)
    with pytest.raises(InvalidFileError, match=r"layers\.0\.mlp\.up_proj\.weight of .*/model holds NaN"):
        to_quantized(tmp_path / "model", tmp_path / "out", QuantizationScheme(8))


@pytest.mark.parametrize(
    "words",
    [
        ("int8", "--group-size", 32),
        ("int4", "--group-size", 0),
        ("int4", "--dtype", "float16"),
        ("int4", "--type", "q8_0"),
        ("gguf", "--embedding", "bfloat16"),
        ("transformers", "--text", "a.txt"),
        ("int8", "--dry-run"),
    ],
)
def test_export_refuses_flags_without_effect(words, plain, tmp_path, capsys):
    to, *rest = words
    assert exporting(plain, tmp_path / "out", *rest, to=to) == 2
    said = capsys.readouterr().err
    assert f"{rest[0]} is not for --to" in said or "group-size is 0; it should be 32 or 64" in said
    assert not (tmp_path / "out").exists()


def test_verify_compares_quantized_weights_with_their_source(exported, plain, tmp_path, capsys):
    folder, report = exported["int4"][0], tmp_path / "verify.json"
    words = ["verify", str(folder), "--out", str(report), "--against"]
    assert cli.run([*words, str(plain)]) == 0
    (found,) = (each for each in json.loads(report.read_text())["checks"] if each["name"] == "rounded")
    before, after = loading.load(plain), loading.load(folder)
    names = [name for name, weight in before.named_parameters() if weight.ndim == 2]
    exact = torch.cat([before.get_parameter(name).detach().flatten() for name in names])
    kept = torch.cat([after.get_submodule(name.removesuffix(".weight")).weight.flatten() for name in names])
    assert found["figures"]["relative_error"] == pytest.approx(((exact - kept).norm() / exact.norm()).item(), rel=1e-4)
    other = tiny_model(seed=1, **WIDE)
    huggingface.save(other, tmp_path / "other", other.tokenizer)
    assert cli.run([*words, str(tmp_path / "other")]) == 1
    assert "are not what rounding" in capsys.readouterr().out
    assert cli.run([*words, str(folder)]) == 2
    assert cli.run(["verify", str(plain), "--out", str(report), "--against", str(folder)]) == 2
    assert "holds no integers" in capsys.readouterr().err


LAB = """
import torch
from torch import nn
from smolforge.models.decoder import MLP

class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5

class Halved(MLP):
    def __init__(self, config):
        super().__init__(config)
        self.down_proj = Half(config.intermediate_size, config.hidden_size, bias=False)

class Scaled(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight_scale = nn.Parameter(torch.full((config.hidden_size,), 0.7))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * self.weight_scale
"""


def test_quantize_leaves_custom_layers_alone(tmp_path, quick, monkeypatch):
    """A linear layer with another forward is left alone; a parameter named as part of a quantised matrix is none."""
    (tmp_path / "quantlab.py").write_text(LAB)
    monkeypatch.chdir(tmp_path)
    custom_classes.import_classes(["quantlab:Halved", "quantlab:Scaled"])
    made = tiny_model(**WIDE, feed_forward="quantlab:Halved", normalization="quantlab:Scaled")
    huggingface.save(made, tmp_path / "model", made.tokenizer)
    to_quantized(tmp_path / "model", tmp_path / "out", QuantizationScheme(8))
    before, after = loading.load(tmp_path / "model"), loading.load(tmp_path / "out")
    assert type(after.model.layers[0].mlp.down_proj).__name__ == "Half"
    assert len(quantized.quantized_layers(after)) == 6 * len(after.model.layers)
    wanted, found = (each(torch.arange(40)[None]) for each in (before, after))
    torch.testing.assert_close(found, wanted, atol=0.1 * wanted.std().item(), rtol=0)


def test_quantize_measures_a_run_in_its_own_windows(text_file, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    run = smolforge.train(recipe, run=tmp_path / "run", steps=8)
    text = measured_text(run.model, loading.resolve_model_path(tmp_path / "run"), None)
    assert (text.name, text.window) == ("what the run held out", NANO["train"]["sequence_length"])
    assert measured_text(run.model, loading.resolve_model_path(tmp_path / "run"), text_file).window == text.window
    assert measured_text(run.model, tmp_path / "elsewhere", text_file).window == 128
    corpus = tmp_path / "run" / "corpus" / "corpus.json"
    corpus.write_text(json.dumps(json.loads(corpus.read_text()) | {"fingerprint": "of another"}))
    other = measured_text(run.model, loading.resolve_model_path(tmp_path / "run"), None)
    assert (other.name, other.window) == ("the documentation of Python's language", text.window)


LAYER = "model.layers.0.self_attn.q_proj"


def nan(tensors):
    tensors[f"{LAYER}.weight_scale"][0] = torch.nan


def zero(tensors):
    tensors[f"{LAYER}.weight_scale"][0] = 0


def below_zero(tensors):
    tensors[f"{LAYER}.weight_scale"][0] *= -1


def lacking(tensors):
    del tensors[f"{LAYER}.weight_scale"]


def narrow(tensors):
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"][:, 1:].contiguous()


def another(tensors):
    tensors[f"{LAYER}.weight_shape"] = torch.tensor([64, 63])


def floats(tensors):
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"].float()


def half(tensors):
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"].half()


def beside(tensors):
    tensors[f"{LAYER}.weight_zero_point"] = torch.zeros(64, 2)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (nan, "weight_scale holds what is no scale"),
        (zero, "weight_scale holds what is no scale"),
        (below_zero, "weight_scale holds what is no scale"),
        (lacking, "lacks 1 of"),
        (narrow, "weight_packed has shape"),
        (another, "weight_shape is"),
        (floats, "weight_packed holds float32; it should hold int32"),
        (half, "weight_scale holds float16; it should hold bfloat16"),
        (beside, "has no place for|have no place for|has 1 tensors this model has no place for"),
    ],
)
def test_load_refuses_corrupted_quantized_tensors(exported, tmp_path, break_it, said):
    content = (exported["int4"][0] / "config.json").read_text()
    tensors = load_file(exported["int4"][0] / "model.safetensors")
    break_it(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidFileError, match=said):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"quant_method": ["compressed-tensors"]},
        {"config_groups": {}},
        {"config_groups": []},
        {"ignore": []},
        {"format": "int-quantized"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"num_bits": 3},
        {"num_bits": True},
        {"group_size": 0},
        {"group_size": 2**60},
        {"group_size": "32"},
        {"group_size": 48},
        {"symmetric": None},
        {"zp_dtype": "torch.float16"},
        {"actorder": "static"},
    ],
)
def test_load_refuses_other_quantization_schemes(exported, tmp_path, change):
    folder = exported["int4, embedding kept"][0]
    content = json.loads((folder / "config.json").read_text())
    said = content[quantization.KEY]
    key = next(iter(change))
    (said["config_groups"]["group_0"]["weights"] if key in weight_keys() else said).update(change)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InvalidFileError, match=f"{NAMED.get(key, key)}.* implemented|do not divide"):
        loading.load(tmp_path)


NAMED = {"config_groups": "num_bits and group_size"}


def weight_keys():
    return ("num_bits", "group_size", "symmetric", "actorder", "zp_dtype")


def test_load_refuses_quantized_weights_without_settings(exported, tmp_path):
    folder = exported["int8"][0]
    content = json.loads((folder / "config.json").read_text())
    del content[quantization.KEY]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InvalidFileError, match="lacks"):
        loading.load(tmp_path)


def test_load_accepts_equivalent_quantization_settings(exported, tmp_path):
    folder = exported["int4, embedding kept"][0]
    content = json.loads((folder / "config.json").read_text())
    said = content[quantization.KEY]
    said |= {"version": "0.20.0", "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}}
    said["config_groups"]["group_0"] |= {"format": "pack-quantized", "input_activations": None}
    said["config_groups"]["group_0"]["weights"] |= {"actorder": None, "observer": "mse", "zp_dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert loading.load(tmp_path).quantization == QuantizationScheme(4, 32)


@pytest.mark.parametrize("name", ["int8, embedding kept", "int4, embedding kept"])
def test_quantized_model_equals_transformers(exported, name):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    theirs = AutoModelForCausalLM.from_pretrained(exported[name][0], dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(smolforge.load(exported[name][0])(ids), theirs(ids).logits)


def test_study_can_measure_loss_added_by_int4(tmp_path):
    path = study_file(tmp_path, {"study": {"seeds": [0], "metric": "loss_added_by_int4", "group_size": 16}})
    found, _ = conducted(path, tmp_path / "out")
    for variant in found.variants:
        for seed, value in variant.values.items():
            kept = tmp_path / "out" / "rounded" / f"{variant.name}-seed-{seed}.json"
            stored = json.loads(kept.read_text())
            assert value == stored["after"] - stored["before"] != 0
            run = found.runs[kept.stem]
            assert stored["before"] == pytest.approx(run.measured[-1]["validation_loss"], rel=0.05)
            kept.write_text(json.dumps(stored | {"after": stored["before"] + 1.0}))
    again, _ = conducted(path, tmp_path / "out")
    assert [value for each in again.variants for value in each.values.values()] == pytest.approx(
        [1.0] * len(again.runs)
    )
