"""Every family, held to Transformers' own class through files in its own names: strict in, loadable out."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from smolforge.checkpoint import families, huggingface
from smolforge.config import Generation, ModelConfig, Optim, presets
from smolforge.config.base import validate_settings
from smolforge.config.model import FAMILIES
from smolforge.data.batches import Batch
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models import moe
from smolforge.models.attention import KVCache
from smolforge.models.decoder import build
from smolforge.models.moe import MoE, balance_loss, grouped_linear, grouped_mm_kernel
from smolforge.models.stats import active_parameters, component, parameter_counts
from smolforge.testing import tiny_config
from smolforge.training.loop import forward_backward
from smolforge.training.loss import loss_sum
from smolforge.training.objective import Objective
from smolforge.training.optim import build_optimizers

GREEDY = make_sampler(Generation(temperature=0))


def random_config(family: str, seed: int) -> ModelConfig:
    pick = torch.Generator().manual_seed(seed)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=pick))]

    kv_heads = one_of(1, 2, 3)
    heads = kv_heads * one_of(1, 2, 3)
    head_dim = one_of(8, 16)
    eps = one_of(1e-5, 1e-6)
    own = {
        "llama": {"rms_norm_eps": eps, "head_dim": one_of(8, 16)},
        "qwen2": {"rms_norm_eps": eps},
        "qwen3": {"rms_norm_eps": eps, "head_dim": one_of(8, 16)},
        "mixtral": {"rms_norm_eps": eps, "num_local_experts": one_of(4, 8), "num_experts_per_tok": one_of(1, 2, 3)},
        "starcoder2": {"norm_epsilon": eps},
    }
    return tiny_config(
        model_type=family,
        vocab_size=one_of(64, 101, 320),
        hidden_size=heads * head_dim,
        intermediate_size=one_of(40, 64),
        num_hidden_layers=one_of(1, 2, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=one_of(1e4, 1e5, 1.3e5),
        tie_word_embeddings=one_of(True, False),
        **own[family],
    )


def oracle(config: ModelConfig):
    """Transformers' model of this shape, all its weights random, norms and biases too."""
    names = families.to_hugging_face(config)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**names, bos_token_id=None, eos_token_id=None, pad_token_id=None),
        attn_implementation="eager",
    )
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return theirs.eval()


def greedy_ids(model, prompt: list[int], count: int) -> list[int]:
    return [token.id for token in generate_tokens(model, [prompt], GREEDY, max_new_tokens=count)]


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 20))])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_checkpoints_equal_transformers_both_ways(tmp_path, family, seed):
    torch.manual_seed(seed)
    config = random_config(family, seed)
    theirs = oracle(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs")
    assert ours.config == config
    ids = torch.randint(config.vocab_size, (2, 50))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-4
        text = theirs.generate(ids[:1, :5], max_new_tokens=16, do_sample=False)[0, 5:].tolist()
    assert greedy_ids(ours, ids[0, :5].tolist(), 16) == text

    huggingface.save(ours, tmp_path / "ours")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        assert type(again) is type(theirs)
        assert (again(ids).logits - expected).abs().max() < 1e-5
    first, second = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_gradients_equal_transformers(tmp_path, family):
    config = random_config(family, 4)
    theirs = oracle(config)
    theirs.save_pretrained(tmp_path)
    ours = huggingface.load(tmp_path)
    ids = torch.randint(config.vocab_size, (2, 40))
    theirs(ids, labels=ids).loss.backward()
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    (loss_sum(ours.hidden_states(ids), ours.lm_head_weight, labels)[0] / (labels != -100).sum()).backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if ".experts." in name:
            continue  # Transformers keeps gate and up in one tensor in memory
        torch.testing.assert_close(weight.grad, expected[name].grad, atol=1e-6, rtol=1e-4)
    if family == "mixtral":
        layer = ours.model.layers[0].mlp.experts
        both = torch.cat([layer.gate_proj.grad, layer.up_proj.grad], 1)
        torch.testing.assert_close(both, expected["model.layers.0.mlp.experts.gate_up_proj"].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_equals_full_forward(family):
    model = build(random_config(family, 3)).eval()
    ids = torch.randint(model.config.vocab_size, (2, 20))
    cache, states = KVCache(model.config, 2, 20, like=model.lm_head_weight), []
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 20)):
            positions = torch.arange(start, end).expand(2, -1)
            states.append(model.hidden_states(ids[:, start:end], positions, cache.view(positions)))
        torch.testing.assert_close(torch.cat(states, 1), model.hidden_states(ids), atol=1e-5, rtol=1e-4)


def test_parameters_are_initialized_and_optimized():
    for family in FAMILIES:
        model = build(random_config(family, 2))
        for name, weight in model.named_parameters():
            assert torch.isfinite(weight).all()
            constant = component(name) == "norms" or name.endswith(".bias")
            assert (weight.std() > 0) == (not constant), name
        for name in ("adamw", "muon"):
            build_optimizers(model, validate_settings(Optim, {"name": name}))


# Experts


def mixture(**changes) -> ModelConfig:
    return tiny_config(model_type="mixtral", **{"num_local_experts": 8, "num_experts_per_tok": 2} | changes)


def test_balance_loss_equals_transformers():
    model = build(mixture(num_hidden_layers=3))
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, logits: seen.append(logits))
    _, balance = model.hidden_states_and_aux_loss(torch.randint(320, (2, 30)))
    expected = [load_balancing_loss_func((logits,), 8, 2) for logits in seen]
    torch.testing.assert_close(balance, torch.stack(expected).mean())


def test_balance_loss_is_lowest_for_even_routing():
    even = torch.full((64, 8), 1 / 8)
    assert balance_loss(even, torch.full((8,), 16)).item() == pytest.approx(2.0)
    skewed = torch.tensor([[0.65, *[0.05] * 7]]).expand(64, -1)
    assert balance_loss(skewed, torch.tensor([64, 64, 0, 0, 0, 0, 0, 0])).item() > 5


def test_balance_loss_evens_out_the_experts():
    """Trained with it, a skewed router uses its experts more alike than trained without."""

    def unevenness(coefficient: float) -> float:
        model = build(mixture(num_hidden_layers=1, router_aux_loss_coef=coefficient))
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight[0] *= 4
        (optimizer,) = build_optimizers(model, validate_settings(Optim, {}))
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            ids = torch.randint(320, (4, 33), generator=generator)
            losses = forward_backward(Objective(model), Batch(ids[:, :-1], ids[:, 1:]), ids[:, 1:].numel(), rows=2)
            optimizer.step()
            model.zero_grad()
        return losses["balance_loss"].item()

    assert unevenness(0.5) < unevenness(0.0) - 0.1


def test_balance_loss_is_weighted_by_labels():
    """The reported balance loss is the mean over micro-batches, weighted as the loss is."""
    model, ids = build(mixture()), torch.randint(320, (4, 16))
    whole = [model.hidden_states_and_aux_loss(part)[1] for part in ids.split(2)]
    losses = forward_backward(Objective(model), Batch(ids, ids), ids.numel(), rows=2)
    torch.testing.assert_close(losses["balance_loss"], torch.stack(whole).mean().detach())


def test_grouped_mm_equals_expert_by_expert():
    matrices = torch.randn(4, 24, 16, requires_grad=True)
    rows, counts = torch.randn(20, 16, requires_grad=True), torch.tensor([5, 0, 12, 3])
    found = {}
    for path in (grouped_linear, grouped_mm_kernel):
        out = path(rows, matrices, counts)
        found[path] = (out, *torch.autograd.grad(out.square().sum(), (rows, matrices)))
    for plain, fused in zip(*found.values(), strict=True):
        torch.testing.assert_close(plain, fused)


def test_grouped_mm_is_used_only_where_it_fits():
    bf16 = torch.bfloat16
    assert moe.supports_grouped_mm(torch.empty(2, 256, 64, dtype=bf16))
    assert not moe.supports_grouped_mm(torch.empty(2, 36, 64, dtype=bf16))
    assert not moe.supports_grouped_mm(torch.empty(2, 64, 36, dtype=bf16))
    assert not moe.supports_grouped_mm(torch.empty(2, 256, 64))


def test_moe_output_of_a_token_does_not_depend_on_others():
    layer = MoE(mixture())
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(3, 11, 32)
    with torch.no_grad():
        whole, _ = layer(x)
        alone, _ = layer(x[1:2, 4:5])
    torch.testing.assert_close(alone[0, 0], whole[1, 4], atol=1e-4, rtol=1e-5)


# Shapes and files


def test_active_parameters_equal_a_hand_count():
    config = ModelConfig.model_validate(presets.shape("moe-160m"))
    counts = parameter_counts(config)
    per_expert = 3 * 576 * 256
    assert counts["experts"] == 30 * 8 * per_expert
    assert sum(counts.values()) - active_parameters(config) == 30 * 6 * per_expert


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"num_local_experts": 4}, "num_local_experts means nothing to a llama model"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon means nothing to a llama model"),
        ({"model_type": "starcoder2", "rms_norm_eps": 1e-6}, "rms_norm_eps means nothing to a starcoder2 model"),
        ({"model_type": "starcoder2", "hidden_act": "silu"}, "hidden_act of a starcoder2 model is gelu_pytorch_tanh"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok (9) is more than"),
        (
            {"hidden_size": 10**12},
            "hidden_size is 1000000000000; it should be a whole number above 0 and at most 1048576",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_model_config_refuses_settings_of_other_families(shape, said):
    with pytest.raises(ConfigError) as caught:
        validate_settings(ModelConfig, shape)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, which is not implemented"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True, which is not implemented"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True, which is not implemented"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has other than full_attention",
        ),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096, which is not implemented"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("starcoder2", {"use_bias": True}, "use_bias is True, which is not implemented"),
        ("starcoder2", {"residual_dropout": 0.1}, "residual_dropout is 0.1"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "asks for code of its own (auto_map), which is never run"),
        ("llama", {"model_type": ["llama"]}, "which is not implemented"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_config_json_refuses_unsupported_features(family, change, said):
    content = families.to_hugging_face(random_config(family, 0)) | change
    with pytest.raises(InvalidFileError) as caught:
        families.from_hugging_face(content)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_scaling": {"rope_type": "default"}, "sliding_window": None, "quantization_config": None}),
        (
            "llama",
            {"partial_rotary_factor": 1.0, "is_encoder_decoder": False, "pretraining_tp": 2, "torchscript": False},
        ),
        ("llama", {"unsloth_fixed": True, "max_length": 20, "temperature": 0.7, "tokenizer_class": "LlamaTokenizer"}),
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24, "use_mrope": False}),
        ("qwen3", {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}),
        ("qwen3", {"sliding_window": 4096, "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_config_json_accepts_fields_without_effect(family, change):
    config = random_config(family, 0)
    content = families.to_hugging_face(config)
    content.pop("use_sliding_window", None)
    assert families.from_hugging_face(content | change) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_single_expert_equals_transformers_both_ways(tmp_path, family):
    """Its matrices are stacked like any other number's; dense families have none."""
    own = {"num_local_experts": 1, "num_experts_per_tok": 1} if family == "mixtral" else {}
    theirs = oracle(tiny_config(model_type=family, **own))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs")
    huggingface.save(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ids = torch.randint(320, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, ours(ids), atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_defaults_equal_transformers(family):
    content = dict.fromkeys(families.REQUIRED_KEYS, 64) | {"model_type": family, "num_attention_heads": 32}
    names = {name: value for name, value in content.items() if name != "model_type"}
    theirs, ours = AutoConfig.for_model(family, **names), families.from_hugging_face(content)
    for name in set(ours.family_fields()) - {"rope_theta", "rope_scaling", "model_type", "head_dim"}:
        assert ours.__dict__[name] == theirs.to_dict()[name], name
    assert ours.head_dim == (128 if family == "qwen3" else 2)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_sharded_weights_are_read_and_written(tmp_path):
    theirs = oracle(random_config("mixtral", 1))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(huggingface.weight_files(tmp_path / "theirs")) > 2
    ours = huggingface.load(tmp_path / "theirs")
    huggingface.save(ours, tmp_path / "ours", max_shard_bytes=20_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ids = torch.randint(ours.config.vocab_size, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits)
    (tmp_path / "ours" / huggingface.weight_files(tmp_path / "ours")[1].name).unlink()
    with pytest.raises(InvalidFileError, match=r"lacks model-00002-of-\d+\.safetensors, which its model"):
        huggingface.load(tmp_path / "ours")
