"""The chunked loss, held to its definition by torch, and to what it must never hold in memory."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smolforge.data.batches import IGNORE_INDEX
from smolforge.models.decoder import build
from smolforge.testing import tiny_config
from smolforge.training import loss as loss_module
from smolforge.training.loss import logits_to_gradient, loss_sum

BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def _chunks_of_16(monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda device: 16)


def definition(hidden, head, labels, z_loss=0.0):
    """Cross-entropy plus z-loss, from all logits at once and differentiated by torch."""
    logits, flat = F.linear(hidden, head).flatten(0, 1), labels.flatten()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = wide.logsumexp(-1)[flat != IGNORE_INDEX].square().sum()
    return F.cross_entropy(wide, flat, reduction="sum", ignore_index=IGNORE_INDEX) + z_loss * z


def problem(rows=3, length=25, width=24, vocabulary=97, dtype=torch.float32, spread=1.0):
    """States, head and labels of which the model is far from sure, some ignored."""
    hidden = torch.randn(rows, length, width, dtype=dtype, requires_grad=True)
    head = (spread * torch.randn(vocabulary, width, dtype=dtype)).requires_grad_()
    labels = torch.randint(vocabulary, (rows, length))
    labels[:1, : length // 2] = IGNORE_INDEX
    return hidden, head, labels


def gradients(function, hidden, head, labels, z_loss=0.0):
    """The value, and the gradients of states and head."""
    value = function(hidden, head, labels, z_loss=z_loss)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach(), *torch.autograd.grad(value, (hidden, head))


def off(found, expected):
    """Relative distance of two tensors."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("shape", [(3, 25), (2, 16), (1, 1), (1, 17), (4, 4)])
def test_loss_equals_the_definition(dtype, bound, z_loss, shape):
    asked = *problem(*shape, dtype=dtype), z_loss
    for found, expected in zip(gradients(loss_sum, *asked), gradients(definition, *asked), strict=True):
        assert found.dtype == dtype
        assert off(found, expected) < bound


@pytest.mark.parametrize("size", [1, 7, 75, 1000])
def test_loss_does_not_depend_on_the_chunk_size(size, monkeypatch):
    asked = problem(dtype=torch.float64)
    expected = gradients(loss_sum, *asked)
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda device: size)
    for found, right in zip(gradients(loss_sum, *asked), expected, strict=True):
        assert off(found, right) < 1e-13


@pytest.mark.parametrize("tokens", [40, 0])
def test_loss_without_labels_is_zero_with_zero_gradient(tokens):
    hidden, head, _ = problem(1, tokens)
    for value in gradients(loss_sum, hidden, head, torch.full((1, tokens), IGNORE_INDEX), 1e-2):
        assert not value.any()


def test_z_loss_is_reported_separately_without_gradient():
    hidden, head, labels = problem(dtype=torch.float64)
    total, z = loss_sum(hidden, head, labels, z_loss=1e-2)
    assert not z.requires_grad
    torch.testing.assert_close(total - z, definition(hidden, head, labels))
    torch.testing.assert_close(z, definition(hidden, head, labels, 1e-2) - definition(hidden, head, labels))
    assert loss_sum(hidden, head, labels)[1] == 0


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_passes_gradcheck(z_loss):
    hidden, head, labels = problem(2, 10, 3, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda states, matrix: loss_sum(states, matrix, labels, z_loss=z_loss), (hidden, head)
    )


def test_loss_backward_repeats_but_has_no_second_derivative():
    hidden, head, labels = problem()
    total, _ = loss_sum(hidden, head, labels)
    first, second = (torch.autograd.grad(total, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_gives_every_model_weight_its_gradient(tied):
    model = build(tiny_config(tie_word_embeddings=tied), dtype=torch.float64)
    ids = torch.randint(320, (3, 25))
    loss_sum(model.hidden_states(ids), model.lm_head_weight, ids, z_loss=1e-3)[0].backward()
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    definition(model.hidden_states(ids), model.lm_head_weight, ids, 1e-3).backward()
    for gradient, weight in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-9, atol=1e-12)


def test_loss_refuses_labels_outside_the_vocabulary():
    hidden, head, labels = problem()
    labels[2, 3] = 97
    with pytest.raises(RuntimeError, match="out of bounds"):
        loss_sum(hidden, head, labels)


# What is made on the way


class Watch(TorchDispatchMode):
    """Sees every tensor that is made, backward included, and the dtype of every matrix product."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else [made]
        self.largest = max([self.largest, *(each.numel() for each in tensors if isinstance(each, torch.Tensor))])
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.products.append(args[-1].dtype)
        return made


@pytest.mark.parametrize("precision", [nullcontext(), BFLOAT16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_never_holds_all_logits(precision, z_loss):
    """80 tokens by 97 of vocabulary: nothing made may be larger than a chunk's logits or the head."""
    hidden, head, labels = problem(2, 40)
    with Watch() as plainly, precision:
        gradients(definition, hidden, head, labels, z_loss)
    with Watch() as ours, precision:
        gradients(loss_sum, hidden, head, labels, z_loss)
    assert plainly.largest == 80 * 97
    assert ours.largest == 97 * 24


@pytest.mark.parametrize(
    ("of_states", "of_head", "enabled", "products"),
    [(True, True, True, 3), (True, False, True, 2), (False, True, True, 2), (True, True, False, 1)],
)
def test_loss_computes_only_the_gradients_wanted(of_states, of_head, enabled, products):
    """Evaluation and a frozen head pay for one and two matrix products a chunk."""
    hidden, head, labels = problem(2, 40)
    with Watch() as watch, torch.set_grad_enabled(enabled):
        total, _ = loss_sum(hidden.requires_grad_(of_states), head.requires_grad_(of_head), labels)
    assert len(watch.products) == products * 5
    assert total.requires_grad == enabled
    expected = definition(hidden, head, labels)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    if enabled:
        total.backward()
        assert (hidden.grad is not None, head.grad is not None) == (of_states, of_head)


def test_loss_works_in_inference_mode():
    hidden, head, labels = problem()
    with torch.inference_mode():
        total, _ = loss_sum(hidden, head, labels)
    torch.testing.assert_close(total, definition(hidden, head, labels).detach())


# In bfloat16


def test_loss_under_autocast_equals_fp32_up_to_rounding():
    hidden, head, labels = problem(4, 100, 64, 500, spread=0.2)
    with BFLOAT16:
        found = gradients(loss_sum, hidden, head, labels, 1e-3)
    expected = gradients(definition, hidden, head, labels, 1e-3)
    assert [each.dtype for each in found] == [torch.float32] * 3
    assert off(found[0], expected[0]) < 1e-4  # a mean over many tokens
    assert off(found[1], expected[1]) < 2**-7
    assert off(found[2], expected[2]) < 2**-7


def test_head_gradient_is_accumulated_in_fp32(monkeypatch):
    """Four hundred chunks of one frequent label: a sum in bfloat16 stands still long before the end."""
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda device: 1)
    hidden, head = (torch.randn(1, 400, 8) + 1).requires_grad_(), torch.zeros(50, 8, requires_grad=True)
    labels = torch.zeros(1, 400, dtype=torch.int64)
    exact = gradients(definition, hidden.double(), head.double(), labels)[2]
    with BFLOAT16:
        found = gradients(loss_sum, hidden, head, labels)[2]
        plain = gradients(definition, hidden, head, labels)[2]
    coarse = torch.zeros(50, 8, dtype=torch.bfloat16)
    for state in hidden.detach().bfloat16()[0]:
        coarse += (torch.full((50,), 1 / 50) - F.one_hot(torch.tensor(0), 50))[:, None].bfloat16() * state
    assert off(coarse, exact) > 2**-6
    assert off(found, exact) < 2**-9
    assert off(found, exact) <= off(plain, exact)


def test_into_gradient_of_a_confident_token_keeps_precision():
    """p - 1 is -0.0003 here, but 1 - 1 once p itself has been rounded."""
    logits, label = torch.zeros(1, 40, dtype=torch.bfloat16), torch.tensor([5])
    logits[0, 5] = 11.75
    exact = logits.double().softmax(-1) - F.one_hot(label, 40)
    logits_to_gradient(logits, label, 0.0)
    torch.testing.assert_close(logits.double(), exact, rtol=2**-8, atol=0)


def test_loss_matmuls_under_autocast_are_bfloat16():
    hidden, head, labels = problem(2, 40)
    with Watch() as watch, BFLOAT16:
        gradients(loss_sum, hidden, head, labels)
    assert watch.products == [torch.bfloat16] * 15


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_loss_takes_bfloat16_states_with_any_head_dtype(other):
    """Each gradient is in the dtype of what it is of."""
    hidden, head, labels = problem(spread=0.3)
    low, matrix = hidden.detach().bfloat16().requires_grad_(), head.detach().to(other).requires_grad_()
    total, of_states, of_head = gradients(loss_sum, low, matrix, labels)
    expected = gradients(definition, hidden, head, labels)
    assert (total.dtype, of_states.dtype, of_head.dtype) == (torch.float32, torch.bfloat16, other)
    for found, right in zip((total, of_states, of_head), expected, strict=True):
        assert off(found, right) < 2**-6


def test_loss_under_autocast_keeps_float64():
    asked = problem(dtype=torch.float64)
    with BFLOAT16:
        found = gradients(loss_sum, *asked)
    for value, right in zip(found, gradients(definition, *asked), strict=True):
        assert off(value, right) < 1e-12


# With torch.compile


def test_loss_works_after_a_compiled_model():
    _, head, labels = problem()
    body = torch.nn.Sequential(torch.nn.Embedding(97, 24), torch.nn.Linear(24, 24), torch.nn.SiLU())
    asked = [head, *body.parameters()]
    expected = torch.autograd.grad(loss_sum(body(labels.clamp(min=0)), head, labels)[0], asked)
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(loss_sum(compiled(labels.clamp(min=0)), head, labels)[0], asked)
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_gradient_compiles_as_one_graph(dtype):
    logits, labels = torch.randn(16, 97, dtype=dtype), torch.randint(97, (16,))
    labels[3] = IGNORE_INDEX
    same = logits.clone()
    expected = logits_to_gradient(logits, labels, 1e-2)
    found = torch.compile(logits_to_gradient, backend="aot_eager", fullgraph=True)(same, labels, 1e-2)
    torch.testing.assert_close((*found, same), (*expected, logits))
