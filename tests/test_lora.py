"""Low-rank updates: against peft on the same numbers, merged, resumed, and files that are not what they should be."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import tomli_w
import torch
from children import train_until
from conftest import NANO
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from smolforge import cli, load, train
from smolforge.checkpoint import huggingface, loading, peft_adapter, training_state
from smolforge.config import Lora
from smolforge.config.load import read_recipe, to_recipe
from smolforge.config.model import FAMILIES
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.generation.cpu_decoding import prepack
from smolforge.models import lora
from smolforge.models.decoder import build
from smolforge.runs import estimate
from smolforge.runs.estimate import trainable_parameter_count
from smolforge.runs.resolve import resolve_recipe
from smolforge.testing import in_child, tiny_config, tiny_model
from smolforge.training.loss import loss_sum

TARGETS = Lora().targets
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of Transformers


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.run([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def disturbed(model: nn.Module) -> None:
    """Give B values, so that the updates do something."""
    generator = torch.Generator().manual_seed(1)
    for name, value in lora.lora_parameters(model).items():
        if name.endswith(lora.B):
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.05)


@pytest.fixture
def base(tmp_path) -> Path:
    """A model folder that Transformers reads."""
    model = tiny_model()
    huggingface.save(model, tmp_path / "base", model.tokenizer)
    return tmp_path / "base"


@pytest.fixture
def recipe(tmp_path, base, text_file) -> Path:
    tree = NANO | {"data": {"sources": [str(text_file)]}, "init_from": str(base), "tokenizer": str(base)}
    tree |= {"lora": {"rank": 4, "alpha": 8.0}, "optim": NANO["optim"] | {"learning_rate": 1e-2}}
    path = tmp_path / "lora.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 8), st.floats(0.5, 32))
def test_lora_merge_equals_the_unmerged_model(family, rank, alpha):
    model = build(tiny_config(model_type=family))
    targets = ("c_fc", "o_proj") if family == "starcoder2" else ("q_proj", "v_proj")
    ids = torch.arange(20)[None]
    before = model(ids)
    lora.add_lora(model, Lora(rank=rank, alpha=alpha, targets=targets), seed=0)
    assert torch.equal(model(ids), before), "B is 0 at first"
    disturbed(model)
    assert prepack(model) is model, "a shortcut for decoding would pass the updates by"
    unmerged, folded = model(ids), dict(lora.merged_parameters(model))
    assert not torch.allclose(unmerged, before)
    lora.merge(model)
    torch.testing.assert_close(model(ids), unmerged, atol=1e-5, rtol=0)
    assert folded.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(folded[name], weight) for name, weight in model.named_parameters())


def test_lora_of_full_rank_reaches_every_matrix():
    """What full tuning can do, updates of full rank can: here the very matrix of another model."""
    model, other = build(tiny_config(), 1), build(tiny_config(), 2)
    full = min(model.config.hidden_size, model.config.intermediate_size)
    lora.add_lora(model, Lora(rank=full, alpha=float(full)), seed=0)
    theirs = dict(other.named_modules())
    for name, layer in lora.lora_layers(model).items():
        u, s, v = torch.linalg.svd((theirs[name].weight - layer.weight).double(), full_matrices=False)
        pad = full - len(s)
        layer.lora_B.data.copy_(nn.functional.pad(u * s, (0, pad)))
        layer.lora_A.data.copy_(nn.functional.pad(v, (0, 0, 0, pad)))
    lora.merge(model)
    for name, weight in other.named_parameters():
        if name.removesuffix(".weight").rpartition(".")[2] in TARGETS:
            torch.testing.assert_close(model.get_parameter(name), weight, atol=1e-5, rtol=1e-4)


def test_lora_trains_and_counts_only_its_matrices():
    model = build(tiny_config())
    lora.add_lora(model, Lora(rank=3), seed=0)
    ids = torch.arange(20)[None]
    loss, _ = loss_sum(model.hidden_states(ids), model.lm_head_weight, ids)
    loss.backward()
    have = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert have == lora.lora_parameters(model).keys()
    tree = NANO | {"init_from": "x", "lora": {"rank": 3}}
    assert trainable_parameter_count(to_recipe(tree)) == sum(
        value.numel() for value in lora.lora_parameters(model).values()
    )


def test_time_budget_measures_steps_with_lora(recipe, monkeypatch):
    """They are quicker than the model's, and need less memory."""
    measured, known = [], estimate.build_optimizers
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0)
    monkeypatch.setattr(
        estimate, "build_optimizers", lambda model, settings: measured.append(model) or known(model, settings)
    )
    assert estimate.tokens_per_second(read_recipe(recipe)) > 0
    assert [len(lora.lora_layers(model)) for model in measured] == [2 * len(TARGETS)]


def test_lora_outputs_and_gradients_equal_peft(base):
    """Logits, loss gradients of A and B, on the same numbers; then the file both ways."""
    ours = load(base)
    settings = Lora(rank=4, alpha=8.0)
    lora.add_lora(ours, settings, seed=0)
    disturbed(ours)
    folder = base.parent / "adapter"
    peft_adapter.write_adapter(folder, peft_adapter.adapter_config(settings, str(base)), lora.lora_parameters(ours))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, folder, is_trainable=True)
    ids = torch.arange(24)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    loss, _ = loss_sum(ours.hidden_states(ids)[:, :-1], ours.lm_head_weight, ids[:, 1:])
    (loss / 23).backward()
    theirs(ids, labels=ids).loss.backward()
    found = {
        name.removeprefix(peft_adapter.PREFIX): each for name, each in theirs.named_parameters() if each.requires_grad
    }
    assert len(found) == len(lora.lora_parameters(ours))
    for name, weight in lora.lora_parameters(ours).items():
        other = found[f"{name}.default.weight"]
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-6, rtol=1e-4)
    theirs.save_pretrained(base.parent / "theirs")
    torch.testing.assert_close(load(base.parent / "theirs")(ids), ours(ids), atol=1e-5, rtol=1e-5)


def test_lora_run_exports_an_adapter_that_peft_reads(recipe, base, tmp_path, capsys):
    code, _, err = call(capsys, "train", recipe, "--run", tmp_path / "run")
    assert (
        code,
        f"; low-rank updates of {trainable_parameter_count(read_recipe(recipe)):,} learn" in " ".join(err.split()),
    ) == (
        0,
        True,
    )
    run = train(recipe, tmp_path / "run")
    newest = training_state.list_checkpoints(run.folder)[-1]
    ids = torch.arange(24)[None]
    merged, before = load(run.folder), load(base)
    assert torch.equal(merged(ids), run.model(ids))
    assert not torch.equal(merged(ids), before(ids))
    for name, weight in before.named_parameters():
        if name.removesuffix(".weight").rpartition(".")[2] not in TARGETS:
            assert torch.equal(weight, merged.get_parameter(name)), name
    assert AutoModelForCausalLM.from_pretrained(newest).config.model_type == "llama"
    code, out, _ = call(capsys, "export", run.folder, "--to", "adapter", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["max_abs_logit_diff"] <= 1e-5
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    torch.testing.assert_close(theirs(ids).logits, merged(ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load(tmp_path / "out")(ids), merged(ids), atol=1e-5, rtol=1e-5)
    assert load(tmp_path / "out").tokenizer.fingerprint == merged.tokenizer.fingerprint
    code, _, err = call(capsys, "export", base, "--to", "adapter", "--out", tmp_path / "none")
    assert code == 2
    assert "was not trained with --lora.rank" in err
    assert call(capsys, "generate", tmp_path / "out", "--prompt", "a")[0] == 0


def change_one(file: Path) -> None:
    found = load_file(file)
    name = next(iter(found))
    save_file(found | {name: found[name] + 1}, file)


def test_adapter_works_wherever_a_model_is_named(recipe, base, tmp_path, capsys):
    """It speaks as it was tuned, is exported whole, verified once it is, and begins another run, low-rank or not."""
    chats = tmp_path / "chats.jsonl"
    said = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text(json.dumps({"messages": said}))
    talking = ("--data.sources", chats, "--data.format", "chat", "--data.held-out", 0, "--train.steps", 2)
    code, _, err = call(capsys, "train", recipe, "--run", tmp_path / "run", *talking)
    assert code == 0, err
    out = tmp_path / "adapter"
    assert call(capsys, "export", tmp_path / "run", "--to", "adapter", "--out", out)[0] == 0
    ours = load(out)
    assert ours.tokenizer.template is not None and load(base).tokenizer.template is None
    code, _, err = call(capsys, "verify", out, "--out", tmp_path / "v.json")
    assert (code, "export --to transformers makes one" in err) == (2, True)
    assert call(capsys, "export", out, "--to", "transformers", "--out", tmp_path / "whole")[0] == 0
    ids = torch.arange(24)[None]
    assert torch.equal(load(tmp_path / "whole")(ids), ours(ids))
    said = json.loads((tmp_path / "whole" / "generation_config.json").read_text())
    assert said["eos_token_id"] == [ours.tokenizer.eos_id, load(base).tokenizer.eos_id] == [2, 0]
    still = ("--optim.learning-rate", 1e-9, "--optim.schedule.final-learning-rate", 1e-10)
    begun = ("train", recipe, "--init-from", out, "--tokenizer", out, *talking, *still)
    for name, rank in (("full", "none"), ("low", 2)):
        code, _, err = call(capsys, *begun, "--run", tmp_path / name, "--lora.rank", rank)
        assert code == 0, err
        torch.testing.assert_close(load(tmp_path / name)(ids), ours(ids), atol=1e-4, rtol=1e-4)
    change_one(out / peft_adapter.WEIGHTS)
    code, _, err = call(capsys, *begun, "--run", tmp_path / "low", "--lora.rank", 2)
    assert (code, "whose weights are others now" in err) == (3, True), err


def test_adapter_keeps_the_hub_name_of_its_base(hub, recipe, base):
    """Whether its commit is looked up or given, or the adapter would name a folder of this machine's cache."""
    commit = hub.add("org/base", base)
    for asked in ("org/base", f"org/base@{commit}"):
        begun = resolve_recipe(read_recipe(recipe, {"init_from": asked})).init_from
        assert begun == f"org/base@{commit}"
        said = peft_adapter.adapter_config(Lora(rank=2), begun)
        assert (said["base_model_name_or_path"], said["revision"]) == ("org/base", commit)


def test_resume_reads_the_base_model_once(recipe, tmp_path, monkeypatch):
    train(recipe, tmp_path / "run", steps=4)
    asked = []
    known = loading.fingerprint
    monkeypatch.setattr(loading, "fingerprint", lambda model: asked.append(model) or known(model))
    train(recipe, tmp_path / "run", steps=5)
    assert len(asked) == 1


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5, "name": "muon"}])
def test_lora_resumes_bit_for_bit_after_sigkill(recipe, tmp_path, changes):
    tree = recipe.read_text().replace("[optim]", f"[optim]\n{tomli_w.dumps(changes)}")
    recipe.write_text(tree)
    whole = train(recipe, tmp_path / "whole")
    assert in_child(train_until, 6, recipe, tmp_path / "parts", {}) == -9
    parts = train(recipe, tmp_path / "parts")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    one, other = (training_state.list_checkpoints(run.folder)[-1] for run in (whole, parts))
    for file in ("adapter/adapter_model.safetensors", "training/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_resume_refuses_a_changed_base_model(recipe, base, tmp_path, capsys):
    train(recipe, tmp_path / "run", steps=4)
    model = tiny_model()
    model.model.norm.weight.data += 1
    huggingface.save(model, base, model.tokenizer)
    code, _, err = call(capsys, "train", recipe, "--run", tmp_path / "run", "--train.steps", 6)
    assert code == 3
    assert "whose weights are others now" in err
    shutil.rmtree(base)
    code, _, err = call(capsys, "train", recipe, "--run", tmp_path / "run", "--train.steps", 6)
    assert code == 2
    assert "there is no model" in err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora.targets": "q_proj,wq"}, "lora.targets has 'wq'; the linear layers of this model are q_proj"),
        ({"lora.rank": 0}, "lora.rank is"),
        ({"lora.rank": 1000}, "lora.rank is 1000; no matrix of lora.targets has a higher one than"),
        ({"init_from": "none"}, "name one with init_from"),
        ({"special_tokens": "<a>"}, "need an embedding that learns"),
    ],
)
def test_lora_config_errors_are_one_sentence(recipe, tmp_path, capsys, settings, said):
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    code, _, err = call(capsys, "train", recipe, "--run", tmp_path / "run", *flags)
    assert code == 2, err
    assert said in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora is 'True', which is not implemented"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which is not implemented"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"peft_type": "IA3"}, "only LORA is implemented"),
        ({"r": 5}, "has rank 4"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"base_model_name_or_path": None}, "does not say which model"),
        ({"base_model_name_or_path": "SELF"}, "names itself as the model it changes"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4, but adapter_config.json says 2"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern of 'q_proj' is '2'; it should be a number above 0"),
        ({"alpha_pattern": {"(?=q)q_proj": 2}}, "alpha_pattern has '.*', which is not read"),
        ({"alpha_pattern": {"((a|a)+)+$": 2, "(.*.*)+x{999999}": 1}}, "alpha_pattern has '.*', which is not read"),
        ({"alpha_pattern": [1]}, "alpha_pattern is '.1.'; it should be a table"),
        ({"modules_to_save": ["embed_tokens"]}, "lacks 'embed_tokens', which modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    ],
)
def test_adapter_refuses_unsupported_peft_settings(base, tmp_path, change, said):
    settings = Lora(rank=4, targets=("q_proj",))
    model = load(base)
    lora.add_lora(model, settings, 0)
    if change.get("base_model_name_or_path") == "SELF":
        change = {"base_model_name_or_path": str(tmp_path / "a")}
    peft_adapter.write_adapter(
        tmp_path / "a", peft_adapter.adapter_config(settings, str(base)) | change, lora.lora_parameters(model)
    )
    with pytest.raises((InvalidFileError, ConfigError), match=said):
        load(tmp_path / "a")


PEFT_SETTINGS = {
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 7}, "target_modules": "all-linear"},
    "alpha_pattern": {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 40}},
    "rslora_patterns": {"use_rslora": True, "alpha_pattern": {"(q|v)_proj": 5}, "rank_pattern": {".*1.*v_proj": 3}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*|.*down_proj"},
    "target_modules": {"target_modules": r"model\.layers\.\d+\.(mlp\.up|self_attn\.o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms_saved": {"modules_to_save": ["norm", "input_layernorm"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
}


def peft_adapter_folder(base: Path, out: Path, **changes) -> tuple[nn.Module, torch.Tensor]:
    """Write an adapter with peft, everything that it trains random; return peft's model and its logits."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]} | changes)
    theirs = peft.get_peft_model(plain, config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data += torch.randn(weight.shape, generator=generator) * 0.1
    theirs.save_pretrained(out)
    with torch.no_grad():
        return theirs, theirs(torch.arange(24)[None]).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_adapter_of_any_settings_equals_peft(tmp_path, name):
    """On Qwen2, which has biases, with a head of its own."""
    huggingface.save(tiny_model(model_type="qwen2", tie_word_embeddings=False), tmp_path / "base")
    _, expected = peft_adapter_folder(tmp_path / "base", tmp_path / "a", **PEFT_SETTINGS[name])
    with torch.no_grad():
        merged, plain = (load(tmp_path / folder)(torch.arange(24)[None]) for folder in ("a", "base"))
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=1e-5)
    assert (merged - plain).abs().max() > 0.01


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model._orig_mod."])
def test_adapter_inside_a_wrapper_loads(base, tmp_path, prefix):
    _, expected = peft_adapter_folder(base, tmp_path / "a")
    file = tmp_path / "a" / peft_adapter.WEIGHTS
    inner = peft_adapter.PREFIX if prefix.startswith(peft_adapter.PREFIX) else ""
    save_file({prefix + name.removeprefix(inner): value for name, value in load_file(file).items()}, file)
    torch.testing.assert_close(load(tmp_path / "a")(torch.arange(24)[None]), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding_layers`",
    "ignore:`lora_bias=True`",
    "ignore:Adapter 'default'",
)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora is 'True', which is not implemented"),
        ({"lora_bias": True}, "lora_bias is 'True', which is not implemented"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A', which is no tensor"),
        ({"modules_to_save": ["embed_tokens"]}, "has another model.embed_tokens.weight, and its base ties the head"),
        ({"modules_to_save": ["lm_head"]}, "has another lm_head.weight, and its base ties the head"),
    ],
)
def test_adapter_of_peft_that_is_not_implemented_is_refused_by_name(base, tmp_path, settings, said):
    """The base is tied."""
    peft_adapter_folder(base, tmp_path / "a", **settings)
    with pytest.raises(InvalidFileError, match=said):
        load(tmp_path / "a")


def test_adapter_beside_other_files_loads(base, tmp_path):
    """As TRL's trainer leaves it, with pickles that are no weights; and with the config of its base."""
    _, expected = peft_adapter_folder(base, tmp_path / "a")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        torch.save({}, tmp_path / "a" / name)
    shutil.copy(base / "config.json", tmp_path / "a")
    torch.testing.assert_close(load(tmp_path / "a")(torch.arange(24)[None]), expected, atol=2e-5, rtol=1e-5)
    torch.save(load_file(tmp_path / "a" / peft_adapter.WEIGHTS), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / peft_adapter.WEIGHTS).unlink()
    with pytest.raises(InvalidFileError, match=r"only pickled weights \(adapter_model.bin\).* python -c "):
        load(tmp_path / "a")


def test_adapter_with_the_tied_embedding_loads(base, tmp_path):
    theirs, expected = peft_adapter_folder(base, tmp_path / "a")
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "a" / peft_adapter.WEIGHTS)
    torch.testing.assert_close(load(tmp_path / "a")(torch.arange(24)[None]), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["cut", "lacks", "shape", "where", "name"])
def test_adapter_refuses_corrupted_files(base, tmp_path, fault):
    settings = Lora(rank=4, targets=("q_proj",))
    model = load(base)
    lora.add_lora(model, settings, 0)
    peft_adapter.write_adapter(
        tmp_path / "a", peft_adapter.adapter_config(settings, str(base)), lora.lora_parameters(model)
    )
    file = tmp_path / "a" / peft_adapter.WEIGHTS
    found = load_file(file)
    first = next(name for name in found if name.endswith("lora_B.weight"))
    match fault:
        case "cut":
            file.write_bytes(file.read_bytes()[:-10])
        case "lacks":
            del found[first]
        case "shape":
            found[first] = found[first][:-1].contiguous()
        case "where":
            found = {name.replace("layers.0", "layers.99"): each for name, each in found.items()}
        case "name":
            found["other"] = torch.zeros(1)
    if fault != "cut":
        save_file(found, file)
    with pytest.raises(InvalidFileError, match="adapter_model"):
        load(tmp_path / "a")
