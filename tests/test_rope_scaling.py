"""Rotary scaling, linear and Llama 3's: held to Transformers, on every path, in every file, through a whole run."""

import json
import shutil

import pytest
import torch
from conftest import NANO
from safetensors.torch import load_file
from test_families import greedy_ids, oracle
from test_gguf import WIDE, rewritten, saved
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import smolforge
from smolforge import cli
from smolforge.checkpoint import families, gguf, huggingface, loading
from smolforge.checkpoint.gguf import rotary
from smolforge.config import ModelConfig
from smolforge.config.base import validate_settings
from smolforge.config.load import read_recipe, to_recipe, write_recipe
from smolforge.config.model import RopeScaling
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.transformers import to_transformers
from smolforge.generation.cpu_decoding import PrepackedModel
from smolforge.models.attention import CausalAttention
from smolforge.models.decoder import inverse_frequencies
from smolforge.testing import tiny_config, tiny_model
from smolforge.verification import reference_model

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA_3_2 = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
SCALINGS = pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
LENGTH = 120
"""Beyond the original context."""


def scaled_config(scaling: dict, **changes) -> ModelConfig:
    return tiny_config(rope_scaling=scaling, head_dim=16, **changes)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, LLAMA_3_2, LLAMA_3_2 | {"high_freq_factor": 8.0}])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_inverse_frequencies_equal_transformers_to_the_bit(scaling, head_dim):
    config = tiny_config(rope_scaling=scaling, head_dim=head_dim, rope_theta=1e5)
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](oracle(config).config)
    ours = inverse_frequencies(config)
    assert torch.equal(ours, theirs)
    assert factor == 1.0
    assert not torch.equal(ours, inverse_frequencies(tiny_config(head_dim=head_dim, rope_theta=1e5)))


@SCALINGS
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "starcoder2"])
@torch.no_grad()
def test_scaled_model_equals_transformers_on_every_path(tmp_path, family, scaling):
    torch.manual_seed(0)
    config = (
        scaled_config(scaling, model_type=family)
        if family != "qwen2"
        else tiny_config(model_type=family, rope_scaling=scaling)
    )
    theirs = oracle(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs").eval()
    assert ours.config.rope_scaling == RopeScaling.model_validate(scaling)
    ids = torch.randint(config.vocab_size, (2, LENGTH))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
    text = theirs.generate(ids[:1, :100], max_new_tokens=16, do_sample=False)[0, 100:].tolist()
    assert greedy_ids(ours, ids[0, :100].tolist(), 16) == text, "through the KV cache"
    if family == "llama":
        positions = torch.arange(LENGTH)[None]
        prepacked = PrepackedModel(ours)
        logits = prepacked.logits(prepacked.hidden_states(ids, positions, CausalAttention()))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    reference = reference_model.logits(dict(huggingface.load(tmp_path / "theirs").named_parameters()), config, ids[0])
    torch.testing.assert_close(reference, expected[0], atol=1e-4, rtol=0)
    huggingface.save(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)


def test_rotary_settings_are_read_from_old_and_new_keys():
    plain = families.to_hugging_face(tiny_config())
    del plain["rope_parameters"]
    old = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    for change in (
        old,
        {"rope_scaling": LINEAR},
        {"rope_parameters": LINEAR | {"rope_theta": 1e4}},
        old | {"rope_parameters": LINEAR},
    ):
        assert families.from_hugging_face(plain | change).rope_scaling == RopeScaling.model_validate(LINEAR)
    written = families.to_hugging_face(scaled_config(LLAMA3))
    assert written["rope_scaling"] == LLAMA3
    assert written["rope_parameters"] == LLAMA3 | {"rope_theta": 1e4}
    assert families.from_hugging_face(written) == scaled_config(LLAMA3)
    assert "rope_scaling" not in families.to_hugging_face(tiny_config())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 4.0}}, f"rope_type is '{kind}', which is not implemented")
            for kind in ("yarn", "dynamic", "longrope", "su", "mrope", "proportional")
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type is 'yarn', which is not"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing, which is needed by rope_type linear"),
        ({"rope_scaling": {"factor": 2.0}}, "factor means nothing to rope_type default"),
        ({"rope_scaling": LINEAR | {"low_freq_factor": 1.0}}, "low_freq_factor means nothing to rope_type linear"),
        ({"rope_scaling": LINEAR | {"factor": 0.5}}, "factor: Input should be greater than or equal to 1"),
        ({"rope_scaling": LINEAR | {"factor": "4"}}, "factor: Input should be a valid number"),
        ({"rope_scaling": LINEAR | {"beta_fast": 32}}, "beta_fast: Extra inputs are not permitted"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor (1.0) must be above low_freq_factor"),
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "rope_scaling and rope_parameters differ"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], which is no table of rotary settings"),
        ({"rope_scaling": LINEAR | {"rope_type": ["linear"]}}, "rope_type is ['linear'], which is not implemented"),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_config_json_refuses_other_rotary_scaling_by_name(change, said):
    content = families.to_hugging_face(tiny_config())
    del content["rope_parameters"]
    with pytest.raises(InvalidFileError) as caught:
        families.from_hugging_face(content | change)
    assert said in str(caught.value)


def test_recipe_refuses_rotary_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="rope_scaling.rope_type is 'yarn'; it should be default, linear or llama3"):
        validate_settings(ModelConfig, {"rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(ConfigError, match="low_freq_factor is missing, which is needed by rope_type llama3"):
        validate_settings(ModelConfig, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})


@SCALINGS
@torch.no_grad()
def test_mistake_of_leaving_scaling_out_is_named(scaling):
    config = scaled_config(scaling)
    model, ids = tiny_model(rope_scaling=scaling, head_dim=16), torch.randint(320, (LENGTH,))
    (name,) = [name for name in reference_model.mistakes(config) if "left out" in name]
    assert name == f"rotary scaling of type {scaling['rope_type']} left out"
    left_out = reference_model.logits(model.state_dict(), config, ids, options=reference_model.mistakes(config)[name])
    plain = tiny_model(head_dim=16)
    torch.testing.assert_close(left_out, plain(ids[None])[0], atol=1e-4, rtol=0)


# In GGUF.


@SCALINGS
@torch.no_grad()
def test_gguf_keeps_scaling(tmp_path, scaling):
    source = saved(tmp_path / "source", rope_scaling=scaling, head_dim=16, **WIDE)
    assert to_gguf(source, tmp_path / "it.gguf", "f32").max_abs_logit_diff == 0
    before, after = smolforge.load(source), smolforge.load(tmp_path / "it.gguf")
    assert after.config.rope_scaling == before.config.rope_scaling
    ids = torch.randint(320, (1, LENGTH))
    assert torch.equal(before(ids), after(ids))
    to_transformers(tmp_path / "it.gguf", tmp_path / "back")
    assert smolforge.load(tmp_path / "back").config.rope_scaling == before.config.rope_scaling
    read = gguf.GGUFReader(tmp_path / "it.gguf")
    if scaling is LINEAR:
        assert (read.metadata["llama.rope.scaling.type"], read.metadata["llama.rope.scaling.factor"]) == ("linear", 4)
    else:
        expected = inverse_frequencies(tiny_config(head_dim=16)) / inverse_frequencies(before.config)
        torch.testing.assert_close(read["rope_freqs.weight"], expected, rtol=1e-6, atol=0)


def test_gguf_reads_linear_scaling_as_llama_cpp_does(tmp_path):
    """Without a type a factor is linear, an old key is read too, and none switches it off (llama-model.cpp)."""
    to_gguf(saved(tmp_path / "source"), tmp_path / "it.gguf", "f32")
    for values, factor in (
        ({"factor": 4.0}, 4.0),
        ({"type": "linear", "factor": 2.5}, 2.5),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear"}, None),
        ({"factor": 0.0}, None),
    ):
        wiped = {"llama__rope__scaling__type": None, "llama__rope__scaling__factor": None}
        rewritten(
            tmp_path / "it.gguf", **wiped | {f"llama__rope__scaling__{key}": value for key, value in values.items()}
        )
        assert loading.read_config(tmp_path / "it.gguf").rope_scaling.factor == factor
    rewritten(tmp_path / "it.gguf", **wiped, llama__rope__scale_linear=8.0)
    assert loading.read_config(tmp_path / "it.gguf").rope_scaling.factor == 8.0


@pytest.mark.parametrize("original", [1024, 4096, 8192, 6000])
@pytest.mark.parametrize(("factor", "high"), [(8.0, 4.0), (32.0, 4.0), (3.3, 5.0)])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e5), (64, 5e5), (128, 5e5)])
def test_llama3_settings_are_derived_from_divisors(original, factor, high, head_dim, theta):
    scaling = LLAMA3 | {"factor": factor, "high_freq_factor": high, "original_max_position_embeddings": original}
    config = tiny_config(rope_scaling=scaling, head_dim=head_dim, rope_theta=theta)
    divisors, plain = rotary.frequency_divisors(config), tiny_config(head_dim=head_dim, rope_theta=theta)
    assert rotary.scaling_of_divisors(divisors, plain, "it.gguf") == config.rope_scaling
    scaled_low = config.rope_scaling.model_copy(
        update={"low_freq_factor": 2.0, "high_freq_factor": 2 * high, "original_max_position_embeddings": 2 * original}
    )
    same = rotary.frequency_divisors(config.model_copy(update={"rope_scaling": scaled_low}))
    assert rotary.scaling_of_divisors(same, plain, "it.gguf") == config.rope_scaling, "only the quotients count"


def test_divisors_that_no_scaling_has_are_refused(tmp_path):
    config = tiny_config(head_dim=64)
    for divisors in (
        torch.linspace(1, 8, 32),
        torch.linspace(8, 1, 32),
        torch.full((32,), 2.0),
        torch.full((32,), -1.0),
        torch.zeros(32),
        torch.full((32,), float("nan")),
        torch.full((32,), float("inf")),
    ):
        with pytest.raises(InvalidFileError, match="has divisors in rope_freqs.weight that are not Llama 3's"):
            rotary.scaling_of_divisors(divisors, config, "it.gguf")
    with pytest.raises(InvalidFileError, match="does not fit: one divisor for each two channels"):
        rotary.scaling_of_divisors(torch.ones(8), config, "it.gguf")
    with pytest.raises(InvalidFileError, match="without rope.scaling.factor beside it"):
        rotary.scaling_of_divisors(torch.ones(32), tiny_config(head_dim=64, rope_scaling=LINEAR), "it.gguf")


def test_llama3_scaling_is_refused_where_llama_cpp_has_none(tmp_path):
    source = saved(tmp_path / "m", model_type="qwen3", rope_scaling=LLAMA3, head_dim=16)
    with pytest.raises(ConfigError, match="llama.cpp has no llama3 rotary scaling in its qwen3 models; --to transf"):
        to_gguf(source, tmp_path / "it.gguf")


def test_verify_says_that_transformers_reads_no_scaling_of_a_gguf(tmp_path, capsys):
    to_gguf(saved(tmp_path / "m", rope_scaling=LINEAR), tmp_path / "it.gguf", "f32")
    assert cli.run(["verify", str(tmp_path / "it.gguf"), "--out", str(tmp_path / "verify.json")]) == 1
    assert "it misses the rotary scaling" in capsys.readouterr().out


# Through a run.


def test_recipe_keeps_scaling(tmp_path):
    (tmp_path / "recipe.toml").write_text(write_recipe(to_recipe({"model": {"rope_scaling": LLAMA3}})))
    assert read_recipe(tmp_path / "recipe.toml").model.rope_scaling == RopeScaling.model_validate(LLAMA3)
    flags = {"model.rope_scaling.rope_type": "linear", "model.rope_scaling.factor": "2"}
    assert read_recipe("nano", flags).model.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


@pytest.mark.long
def test_scaling_survives_a_run(tmp_path, text_file, capsys):
    content = NANO | {"data": {"sources": [str(text_file)]}, "model": NANO["model"] | {"rope_scaling": LLAMA3}}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    run = tmp_path / "run"
    smolforge.train(tmp_path / "recipe.json", run=run)
    last = run / "checkpoints/step-00000008"
    before = load_file(last / huggingface.WEIGHTS)
    shutil.rmtree(last)
    assert smolforge.train(tmp_path / "recipe.json", run=run).metrics["step"] == 8, "resumed from step 4"
    assert all(torch.equal(before[name], weight) for name, weight in load_file(last / huggingface.WEIGHTS).items())
    trained = loading.load(run)
    assert trained.config.rope_scaling == RopeScaling.model_validate(LLAMA3)
    assert "[model.rope_scaling]" in (run / "recipe.toml").read_text()
    with pytest.raises(ConfigError, match=r"model\.rope_scaling\.factor \(8\.0, now 4\.0\)"):
        smolforge.train(tmp_path / "recipe.json", run=run, steps=9, **{"model.rope_scaling.factor": 4.0})
    assert cli.run(["inspect", str(loading.resolve_model_path(run)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["rope_scaling"] == LLAMA3
    flags = ["--model.rope-scaling.rope-type", "linear", "--model.rope-scaling.factor", "2"]
    plain = NANO | {"data": {"sources": [str(text_file)]}}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    words = ["train", str(tmp_path / "plain.json"), "--run", str(tmp_path / "longer"), "--train.steps", "1"]
    warm_up = ["--optim.schedule.warmup-steps", "0"]
    smolforge.train(tmp_path / "plain.json", run=tmp_path / "base", steps=4)
    assert cli.run([*words, *warm_up, "--init-from", str(tmp_path / "base"), *flags]) == 0
    assert loading.load(tmp_path / "longer").config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_inspect_shows_scaling_of_a_file(tmp_path, capsys):
    saved(tmp_path / "m", rope_scaling=LINEAR)
    assert cli.run(["inspect", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "config.rope_scaling.rope_type" in shown
    assert "linear" in shown
    assert "low_freq_factor" not in shown
