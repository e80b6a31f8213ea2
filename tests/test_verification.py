"""`verify` says yes to what is right, and no, with the cause, to every mistake people make."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, oracle, random_config

from smolforge import cli, verification
from smolforge.atomic import file_digest
from smolforge.checkpoint import huggingface, loading
from smolforge.config import ModelConfig
from smolforge.errors import ConfigError
from smolforge.models.attention import CausalAttention
from smolforge.models.decoder import Attention, RMSNorm, build, rope_cos_sin
from smolforge.testing import tiny_config, tiny_model, tiny_tokenizer
from smolforge.verification import HARD_TEXTS, checks, reference_model
from smolforge.verification.releases import Golden, Release, published_releases
from smolforge.verification.transformers_reference import compare_logits

pytestmark = pytest.mark.usefixtures("compiling")
SHAPE = tiny_config(num_hidden_layers=3, rope_theta=1e5)
PROMPT = [5, 9, 77, 3, 12, 200]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A model that Transformers made and spoke, and what is known of it: a release like the real ones."""
    folder = tmp_path_factory.mktemp("released") / "Tiny-1M"
    torch.manual_seed(7)
    theirs = oracle(SHAPE)
    theirs.save_pretrained(folder)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    first = out.logits[0][0].topk(5)
    golden = Golden(
        PROMPT, out.sequences[0, len(PROMPT) :].tolist(), top_ids=first.indices.tolist(),
        top_logits=first.values.tolist(),
    )  # fmt: skip
    count = sum(weight.numel() for weight in theirs.parameters())
    hashes = {"model.safetensors": file_digest(folder / "model.safetensors")["sha256"]}
    return folder, Release("someone/Tiny-1M", SHAPE.model_dump(), count, sha256=hashes, golden=[golden])


@pytest.fixture
def copy(release, tmp_path):
    """The released folder, to be damaged; its name still says what it is."""
    import shutil

    return shutil.copytree(release[0], tmp_path / "Tiny-1M")


def edit(folder, change=lambda tensors: None, **config):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))


def failing(report) -> set[str]:
    return {check.name for check in report.checks if not check.holds}


def test_verify_accepts_the_release(release, whole_checks):
    folder, known = release
    report = verification.verify(folder, releases=[known])
    assert report.holds, failing(report)
    assert report.release == known.id
    assert [check.name for check in report.checks] == [
        "parameters", "finite", "logits float32", "greedy", "cached", "logits bfloat16", "golden", "identity",
        "tied head",
    ]  # fmt: skip
    content = report.as_json()
    assert content["parameters"]["total"] == known.parameters
    assert content["max_abs_logit_diff"] < 1e-5
    assert content["greedy_match"] is True
    lengths = [row["tokens"] for row in content["checks"][2]["figures"]["rows"]]
    assert max(lengths) == SHAPE.max_position_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts_every_family(tmp_path, family, whole_checks):
    theirs = oracle(random_config(family, 5))
    theirs.save_pretrained(tmp_path)
    report = verification.verify(tmp_path, releases=[])
    assert report.holds, [check for check in report.checks if not check.holds]


# The definition, which the causes are tried on


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_reference_model_equals_the_model_and_transformers(family, seed):
    config = random_config(family, seed)
    theirs = oracle(config)
    ours, ids = build(config, seed), torch.randint(config.vocab_size, (30,))
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
        expected = ours(ids[None])[0]
        assert (reference_model.logits(ours.state_dict(), config, ids) - expected).abs().max() < 2e-5
        if family != "mixtral":  # whose names in memory are Transformers' own
            state = theirs.state_dict()
            assert (reference_model.logits(state, config, ids) - theirs(ids[None]).logits[0]).abs().max() < 2e-5


def test_reference_model_mistakes_all_change_the_logits():
    """A mistake that changed nothing could be named for any difference."""
    config = tiny_config(num_hidden_layers=2, rope_theta=3e4)
    model, ids = tiny_model(num_hidden_layers=2, rope_theta=3e4), torch.randint(320, (30,))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    right, not_runnable = reference_model.logits(model.state_dict(), config, ids), []
    for name, reading in reference_model.mistakes(config).items():
        try:
            wrong = reference_model.logits(model.state_dict(), config, ids, options=reading)
        except (KeyError, RuntimeError):
            not_runnable.append(name)
            continue
        assert (wrong - right).abs().max() > 1e-5, name
    assert len(not_runnable) <= 1, "a mistake needs tensors that this model does not have"


# Mistakes in the code


def with_interleaved_rotation(monkeypatch):
    def rotate(x, angles):
        cos, sin = (each[..., : each.shape[-1] // 2].repeat_interleave(2, -1) for each in angles)
        first, second = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack([-second, first], -1).flatten(-2) * sin

    monkeypatch.setattr("smolforge.models.decoder.apply_rope", rotate)


def with_rotation_along_heads(monkeypatch):
    from smolforge.models.decoder import apply_rope

    def along_heads(x, angles):
        turned = rope_cos_sin(SHAPE, torch.arange(x.shape[1])[None], x.dtype)
        return apply_rope(x.transpose(1, 2), turned).transpose(1, 2)

    monkeypatch.setattr("smolforge.models.decoder.apply_rope", along_heads)


def without_causal_mask(monkeypatch):
    monkeypatch.setattr(
        CausalAttention, "attend", lambda self, layer, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )


def with_another_eps(monkeypatch):
    right = RMSNorm.__init__
    monkeypatch.setattr(RMSNorm, "__init__", lambda self, width, eps: right(self, width, 1e-6))


def with_keys_as_values(monkeypatch):
    right = Attention.forward

    def forward(self, x, angles, memory):
        self.k_proj, self.v_proj = self.v_proj, self.k_proj
        try:
            return right(self, x, angles, memory)
        finally:
            self.k_proj, self.v_proj = self.v_proj, self.k_proj

    monkeypatch.setattr(Attention, "forward", forward)


def with_wrong_grouping(monkeypatch):
    def attend(self, layer, q, k, v):
        times = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), is_causal=True)

    monkeypatch.setattr(CausalAttention, "attend", attend)


def with_scaled_embedding(monkeypatch):
    right = loading.load

    def load(*args, **named):
        model = right(*args, **named)
        model.model.embed_tokens.register_forward_hook(lambda _, __, out: out * SHAPE.hidden_size**0.5)
        return model

    monkeypatch.setattr(loading, "load", load)


def with_another_theta(monkeypatch):
    wrong = SHAPE.model_copy(update={"rope_theta": 1e4})
    monkeypatch.setattr(
        "smolforge.models.decoder.rope_cos_sin", lambda config, positions, dtype: rope_cos_sin(wrong, positions, dtype)
    )


CODE_FAULTS = {
    with_interleaved_rotation: "interleaved rotation",
    with_rotation_along_heads: "rotation along the heads",
    without_causal_mask: "no causal mask",
    with_another_eps: "wrong eps: 1e-06",
    with_keys_as_values: "k_proj and v_proj swapped",
    with_wrong_grouping: "wrong head grouping",
    with_scaled_embedding: "embedding multiplied by the root of hidden_size",
    with_another_theta: "wrong theta: it uses 10000",
}


@pytest.mark.parametrize("fault", CODE_FAULTS, ids=lambda fault: fault.__name__)
def test_verify_names_the_cause_of_code_faults(release, fault, monkeypatch):
    folder, known = release
    fault(monkeypatch)
    report = verification.verify(folder, ["transformers"], releases=[known])
    assert "logits float32" in failing(report)
    assert report.cause is not None
    assert CODE_FAULTS[fault] in report.cause


def test_verify_detects_a_kv_cache_fault(release, monkeypatch):
    from smolforge.models.attention import KVCacheView

    right = KVCacheView.__init__

    def one_short(self, cache, positions, first=0):
        right(self, cache, positions, first)
        self.is_prefill = self.mask_is_full = False
        self.mask_bias[..., 1:2] = float("-inf")

    monkeypatch.setattr(KVCacheView, "__init__", one_short)
    report = verification.verify(release[0], ["transformers"], releases=[])
    assert "cached" in failing(report)
    assert "logits float32" not in failing(report)


def test_verify_detects_rope_in_bfloat16(release, monkeypatch):
    """As before in fp32, and less exact in bfloat16 than it should be."""

    def coarse(config, positions, dtype):
        return rope_cos_sin(config, positions * 1.02 if dtype == torch.bfloat16 else positions, dtype)

    monkeypatch.setattr("smolforge.models.decoder.rope_cos_sin", coarse)
    report = verification.verify(release[0], ["transformers"], releases=[])
    assert failing(report) == {"logits bfloat16"}
    assert report.cause is not None
    assert "bfloat16" in report.cause


# Mistakes in the files of a named release


def test_verify_names_a_changed_rope_theta(release, copy):
    """Transformers reads the same wrong file, so only what is published can tell."""
    edit(copy, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    report = verification.verify(copy, releases=[release[1]])
    assert failing(report) == {"identity", "golden"}
    assert report.cause == "wrong theta: rope_theta is 10000.0, the release has 100000.0"


def test_verify_names_a_missing_tensor(release, copy):
    edit(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    report = verification.verify(copy, releases=[release[1]])
    assert failing(report) == {"files"}
    assert report.cause is not None
    assert "the first model.layers.1.self_attn.k_proj.weight" in report.cause


def exchange(one: str, other: str):
    def change(tensors):
        for name in [name for name in tensors if one in name]:
            tensors[name], tensors[name.replace(one, other)] = tensors[name.replace(one, other)], tensors[name]

    return change


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("layers.0.", "layers.2.", "swapped tensors, layers 0 and 2 are in each other's place"),
        ("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj", "swapped tensors, k_proj and v_proj of layer 1"),
        ("gate_proj", "up_proj", "gate_proj and up_proj swapped"),
    ],
)
def test_verify_names_swapped_tensors(release, copy, one, other, said):
    edit(copy, exchange(one, other))
    report = verification.verify(copy, releases=[release[1]])
    assert failing(report) == {"identity", "golden"}
    assert report.cause is not None
    assert said in report.cause


def test_verify_names_interleaved_rope_weights(release, copy):
    """As nanotron's interleaved checkpoints have them, when nobody permuted them on conversion."""

    def interleave(tensors):
        for name in tensors:
            if "q_proj" in name or "k_proj" in name:
                heads = tensors[name].unflatten(0, (-1, 2, SHAPE.resolved_head_dim // 2))
                tensors[name] = heads.transpose(1, 2).flatten(0, 2).contiguous()

    edit(copy, interleave)
    report = verification.verify(copy, releases=[release[1]])
    assert report.cause is not None
    assert "interleaved rotation" in report.cause


def test_verify_names_an_untied_head(release, copy):
    def untie(tensors):
        tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])

    edit(copy, untie, tie_word_embeddings=False)
    report = verification.verify(copy, releases=[release[1]])
    assert failing(report) == {"identity", "golden"}
    assert report.cause is not None
    assert report.cause.startswith("untied head: tie_word_embeddings is False")


def test_verify_detects_noise_without_a_known_cause(release, copy):
    def disturb(tensors):
        tensors["model.norm.weight"] += torch.randn(SHAPE.hidden_size)

    edit(copy, disturb)
    report = verification.verify(copy, releases=[release[1]])
    assert failing(report) == {"identity", "golden"}
    assert report.cause is not None
    assert "none of the known mistakes explains it" in report.cause


def test_verify_knows_a_renamed_release_by_its_hash(release, tmp_path):
    import shutil

    folder = shutil.copytree(release[0], tmp_path / "mine")
    assert verification.verify(folder, ["golden"], releases=[release[1]]).release == "someone/Tiny-1M"
    edit(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert verification.verify(folder, ["golden"], releases=[release[1]]).release is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_refuses_non_finite_weights(copy, value):
    edit(copy, lambda tensors: tensors["model.embed_tokens.weight"][300].fill_(value))
    report = verification.verify(copy, releases=[])
    assert failing(report) == {"finite"}
    assert report.cause == "1 tensors hold NaN or infinity, the first model.embed_tokens.weight"
    json.dumps(report.as_json(), allow_nan=False)


def test_verify_refuses_non_finite_logits(release, monkeypatch):
    """In one long row only, where no short one shows it."""

    def broken(config, positions, dtype):
        cos, sin = rope_cos_sin(config, positions, dtype)
        return (cos * float("nan"), sin) if positions.shape[1] > 100 else (cos, sin)

    monkeypatch.setattr("smolforge.models.decoder.rope_cos_sin", broken)
    report = verification.verify(release[0], ["transformers"], releases=[])
    assert "logits float32" in failing(report)
    json.dumps(report.as_json(), allow_nan=False)


def test_verify_ignores_the_generation_config(copy):
    hostile = {"num_beams": 3, "no_repeat_ngram_size": 2, "guidance_scale": 1.5, "forced_eos_token_id": 0}
    (copy / "generation_config.json").write_text(json.dumps(hostile | {"stop_strings": ["a"], "penalty_alpha": 0.6}))
    assert verification.verify(copy, ["transformers"], releases=[]).holds


def test_verify_accepts_a_release_in_other_files(release, tmp_path):
    """In fp32 and in shards its hash is another, and what it says the same."""
    folder = tmp_path / "Tiny-1M"
    huggingface.save(loading.load(release[0]), folder, max_shard_bytes=20_000)
    report = verification.verify(folder, ["golden"], releases=[release[1]])
    assert report.holds, failing(report)
    assert "the files are not, byte for byte" in next(each.message for each in report.checks if each.name == "identity")


def test_verify_names_the_cause_before_harmless_differences(release, copy):
    edit(copy, exchange("layers.0.", "layers.2."), initializer_range=0.02)
    cause = verification.verify(copy, ["golden"], releases=[release[1]]).cause
    assert cause is not None
    assert "layers 0 and 2" in cause


def test_verify_golden_alone_refuses_an_unknown_model(release):
    report = verification.verify(release[0], ["golden"], releases=[])
    assert failing(report) == {"golden"}
    assert report.cause is not None
    assert "no published reference" in report.cause


def test_golden_check_refuses_constant_logits(release):
    model = loading.load(release[0])
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert not verification.checks.check_golden(model, release[1]).holds


def test_greedy_check_uses_the_logits_of_transformers(release, monkeypatch, whole_checks):
    """Logits of zero are all near ties to themselves."""
    monkeypatch.setattr(
        "smolforge.models.decoder.LanguageModel.logits", lambda self, hidden: F.linear(hidden, self.lm_head_weight) * 0
    )
    report = verification.verify(release[0], ["transformers"], releases=[])
    assert {"logits float32", "greedy"} <= failing(report)


def test_tied_head_check_detects_separate_storage(release, monkeypatch, whole_checks):
    monkeypatch.setattr(
        "smolforge.models.decoder.LanguageModel.lm_head_weight",
        property(lambda self: self.model.embed_tokens.weight.clone()),
    )
    report = verification.verify(release[0], ["transformers"], releases=[])
    assert failing(report) == {"tied head"}


def test_parameter_check_detects_a_wrong_count(release, monkeypatch):
    monkeypatch.setattr(verification.checks, "parameter_counts", lambda config: {"embedding": 1})
    check = verification.checks.check_parameters(loading.load(release[0]), release[0])
    assert not check.holds


def test_verify_without_transformers_names_the_extra(release, monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.run(["verify", str(release[0]), "--out", str(tmp_path / "v.json")]) == 4
    assert 'pip install "smolforge[verify]"' in capsys.readouterr().err
    assert cli.run(["verify", str(release[0]), "--max-length", "0", "--against", "golden"]) == 2


# What is published


def test_published_releases_have_consistent_numbers():
    known = {each.id: each for each in published_releases()}
    base = known["HuggingFaceTB/SmolLM2-135M"]
    assert base.config == ModelConfig()
    assert base.parameters == 134_515_008
    assert sum(entry.confidence == "high" for entry in base.golden) == 2
    assert known["HuggingFaceTB/SmolLM2-135M-Instruct"].eos_token_id == 2
    for each in known.values():
        from smolforge.models.stats import parameter_counts

        assert sum(parameter_counts(each.config).values()) == each.parameters
        for entry in each.golden:
            assert max([*entry.prompt_ids, *entry.greedy_ids]) < each.config.vocab_size


def test_golden_texts_equal_the_reference_file(shared):
    facts = json.loads((shared / "reference" / "golden.json").read_text())["entries"]
    ours = [(each.id, entry) for each in published_releases() for entry in each.golden]
    assert len(ours) == len(facts)
    for fact in facts:
        (entry,) = (
            entry
            for name, entry in ours
            if name == fact["model"] and list(entry.prompt_ids) == fact["prompt_ids"]
            and list(entry.greedy_ids) == fact["greedy_ids"]
        )  # fmt: skip
        assert entry.confidence == fact["confidence"]
        assert list(entry.top_logits) == fact.get("step0_top5", {}).get("logits", [])


# Measuring


def test_compared_equals_a_hand_computed_difference():
    theirs, ours = torch.randn(700, 50), torch.randn(700, 50)
    found = compare_logits(ours, torch.Tensor.float, theirs, their_head=torch.Tensor.float)
    assert found.max_abs_diff == pytest.approx((ours - theirs).abs().max().item())
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((theirs.argmax(-1) == ours.argmax(-1)).float().mean().item())
    assert not found.holds
    assert compare_logits(theirs, torch.Tensor.float, theirs, their_head=torch.Tensor.float).holds


# The command


def test_verify_command_writes_a_report(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["verify", str(release[0])]) == 0
    said = capsys.readouterr().out
    assert "holds  logits float32" in said
    assert "all holds; verify.json has the figures" in said
    assert json.loads((tmp_path / "verify.json").read_text())["holds"] is True


def test_verify_command_exits_1_with_the_cause(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_interleaved_rotation(monkeypatch)
    assert cli.run(["verify", str(release[0]), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["holds"] is False
    assert "interleaved rotation" in content["cause"]


def test_verify_checks_every_checkpoint_of_a_run(tmp_path):
    from smolforge.checkpoint import training_state
    from smolforge.testing import flip_bit

    model = tiny_model()
    for step in (1, 2):
        training_state.save_checkpoint(
            training_state.checkpoint_dir(tmp_path, step), training_state.take_snapshot(model, {}, {"step": step})
        )
    assert verification.verify(tmp_path, ["transformers"], releases=[]).holds
    flip_bit(training_state.checkpoint_dir(tmp_path, 1) / "training" / "random.safetensors", 4000)
    report = verification.verify(tmp_path, ["transformers"], releases=[])
    assert failing(report) == {"step-00000001"}
    assert [check.name for check in verification.verify(tmp_path, ["files"]).checks] == [
        "step-00000001",
        "step-00000002",
    ]
    assert "step-00000001/training/random.safetensors is damaged" in report.checks[0].message
    assert report.cause == report.checks[0].message
    report = verification.verify(training_state.checkpoint_dir(tmp_path, 1), ["transformers"], releases=[])
    assert failing(report) == {"files"}


def test_verify_refuses_what_is_not_a_model(tmp_path, capsys):
    with pytest.raises(ConfigError, match="against is 'torch'; it should be files, transformers or golden"):
        verification.verify(tmp_path, ["torch"])
    with pytest.raises(ConfigError, match="there is no folder .*nothing"):
        verification.verify(tmp_path / "nothing", ["files"])
    assert "nothing says what it should be" in verification.verify(tmp_path, ["files"]).cause
    assert cli.run(["verify", str(tmp_path), "--out", str(tmp_path / "v.json")]) == 1
    assert "is not a model folder" in capsys.readouterr().out
    assert cli.run(["verify", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tokenizer_is_compared_with_transformers(tmp_path, family):
    """AutoTokenizer of a newer Transformers does not read a qwen2 folder's tokenizer.json: it splits as Qwen does."""
    model = tiny_model(model_type=family)
    huggingface.save(model, tmp_path, model.tokenizer)
    check = checks.check_tokenizer(model.tokenizer, tmp_path, HARD_TEXTS)
    assert check.holds, check.message
    auto_differs = check.figures["auto_tokenizer_differs"] > 0
    assert auto_differs == ("PreTrainedTokenizerFast" in check.message)
    assert family == "qwen2" or not auto_differs
    other = tiny_tokenizer(vocab_size=280)
    assert not checks.check_tokenizer(other, tmp_path, HARD_TEXTS).holds
