"""What a token costs: by hand, and as torch counts it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smolforge.config import ModelConfig, presets
from smolforge.models.decoder import build
from smolforge.models.stats import flops_per_token
from smolforge.testing import tiny_config
from smolforge.training.loss import loss_sum

FAMILIES = {
    "llama": {"model_type": "llama"},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
    "starcoder2": {"model_type": "starcoder2"},
}
LENGTH = 64


def counted(config, backend=SDPBackend.MATH, loss=lambda model, hidden, ids: model.logits(hidden).sum()):
    """FLOPs a token of forward and backward, as torch's counter has them."""
    model, ids = build(config), torch.randint(320, (2, LENGTH))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
        hidden, balance = model.hidden_states_and_aux_loss(ids)
        (loss(model, hidden, ids) + balance).backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_per_token_equals_torch_flop_counter(family):
    config = tiny_config(**FAMILIES[family])
    assert counted(config) == flops_per_token(config, LENGTH, "full")


def test_flops_per_token_adds_what_torch_does_not_count():
    """Attention in its fused form on a CPU, and a product that is added into the gradient of the head in place."""
    config = tiny_config()
    width, head = config.num_attention_heads * config.resolved_head_dim, config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * width * LENGTH
    full = flops_per_token(config, LENGTH, "full")
    uncounted, counted_by_torch_2_15 = full - attention, full + attention // 6  # the backward pass forms scores anew
    assert counted(config, SDPBackend.FLASH_ATTENTION) in (uncounted, counted_by_torch_2_15)
    assert (
        counted(config, loss=lambda model, hidden, ids: loss_sum(hidden, model.lm_head_weight, ids)[0])
        == full - 2 * head
    )
    assert flops_per_token(config, LENGTH) == full - attention // 2


@pytest.mark.parametrize(("attention", "mega"), [("causal", 1019.2), ("full", 1231.6)])
def test_flops_per_token_of_smollm2_135m_equals_a_hand_count(attention, mega):
    layer = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
    matrices = 30 * layer + 49152 * 576
    assert matrices == 134_479_872
    each = {"causal": 6, "full": 12}[attention]
    flops = flops_per_token(ModelConfig.model_validate(presets.shape("smollm2-135m")), 2048, attention)
    assert flops == 6 * matrices + each * 30 * 576 * 2048
    assert round(flops / 1e6, 1) == mega
