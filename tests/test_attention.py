"""What queries may look at: documents in one row are what each is alone, and no memory grows with the square.

test_model.py holds the cache to the same.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from smolforge.config.model import FAMILIES
from smolforge.models import attention
from smolforge.models.attention import CausalAttention, DocumentAttention, document_ids, packed_attention
from smolforge.models.decoder import build
from smolforge.testing import tiny_config, tiny_model

LENGTH = 12
SPLITS = st.lists(st.sets(st.integers(1, LENGTH - 1)).map(sorted), min_size=1, max_size=2)
"""For each row the places where another document begins; none and all of them included."""
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Work this small only gets slower when it is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbered(splits: list[list[int]]) -> Tensor:
    places = torch.arange(LENGTH)
    return torch.stack([(places[:, None] >= torch.tensor(starts).long()).sum(1) for starts in splits])


def spans(splits: list[list[int]]):
    """(row, start, end) of each document."""
    for row, starts in enumerate(splits):
        for start, end in zip([0, *starts], [*starts, LENGTH], strict=True):
            yield row, start, end


def sliced(packed: DocumentAttention, document: Tensor) -> DocumentAttention:
    return packed


def masked(packed: DocumentAttention, document: Tensor) -> DocumentAttention:
    """As under torch.compile on a processor."""
    packed.attend_documents = functools.partial(attention.masked_attention, packed.positions)
    return packed


def flexible(packed: DocumentAttention, document: Tensor) -> DocumentAttention:
    """As on a GPU; uncompiled it can be asked for on a processor too, though not for gradients."""
    with torch.compiler.set_stance("force_eager"):
        packed.attend_documents = attention.flex_document_attention(document)
    return packed


def gradients(model, states: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (states * weight).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@functools.cache
def model_of(key_heads: int, family: str = "llama"):
    return build(tiny_config(model_type=family, num_key_value_heads=key_heads), dtype=torch.float64)


@pytest.mark.parametrize("way", [sliced, masked])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@settings(deadline=None, max_examples=10)
@given(splits=SPLITS, seed=st.integers(0, 100))
def test_document_attention_equals_separate_documents(way, key_heads, splits, seed):
    """States and gradients; that positions restart and nothing leaks follows."""
    torch.manual_seed(seed)
    model, document = model_of(key_heads), numbered(splits)
    ids, weight = torch.randint(320, document.shape), torch.randn(*document.shape, 32, dtype=torch.float64)
    packed = way(DocumentAttention(document), document)
    together = model.hidden_states(ids, packed.positions, packed)
    alone = torch.empty_like(together)
    for row, start, end in spans(splits):
        alone[row, start:end] = model.hidden_states(ids[row : row + 1, start:end])[0]
    torch.testing.assert_close(together, alone, **EXACT)
    expected = gradients(model, alone, weight)
    for name, gradient in gradients(model, together, weight).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(deadline=None, max_examples=8)
@given(splits=SPLITS)
def test_flex_attention_equals_document_attention(splits):
    model, document = model_of(2), numbered(splits)
    ids, plain = torch.randint(320, document.shape), DocumentAttention(document)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        packed = flexible(DocumentAttention(document), document)
        states = model.hidden_states(ids, packed.positions, packed)
        torch.testing.assert_close(states, model.hidden_states(ids, plain.positions, plain), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_document_attention_works_for_every_family(family):
    model, splits = build(tiny_config(model_type=family)), [[1, 7], [], [5, 11]]
    ids, packed = torch.randint(320, (3, LENGTH)), DocumentAttention(numbered(splits))
    with torch.no_grad():
        together = model.hidden_states(ids, packed.positions, packed)
        for row, start, end in spans(splits):
            alone = model.hidden_states(ids[row : row + 1, start:end])[0]
            torch.testing.assert_close(together[row, start:end], alone, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=10)
@given(splits=SPLITS, data=st.data())
def test_document_attention_leaks_nothing_between_documents(splits, data):
    model, document = tiny_model(), numbered(splits)
    ids, packed = torch.randint(320, document.shape), DocumentAttention(document)
    row, start, end = data.draw(st.sampled_from(list(spans(splits))))
    changed = ids.clone()
    changed[row, start:end] = (changed[row, start:end] + 1) % 320
    with torch.no_grad():
        before, after = (model.hidden_states(each, packed.positions, packed) for each in (ids, changed))
    inside = torch.zeros(ids.shape, dtype=torch.bool)
    inside[row, start:end] = True
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_document_attention_equals_transformers_packing(attention):
    """It takes positions that restart for borders of documents."""
    config = tiny_config()
    theirs = LlamaForCausalLM(
        LlamaConfig(**config.model_dump(exclude={"model_type"}), attn_implementation=attention)
    ).double()
    ours, splits = build(config, dtype=torch.float64), [[1, 2, 9], [11]]
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    ids, packed = torch.randint(320, (2, LENGTH)), DocumentAttention(numbered(splits))
    found = ours.logits(ours.hidden_states(ids, packed.positions, packed))
    expected = theirs(ids, position_ids=packed.positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # its angles are rounded to fp32
    weight = torch.randn_like(found)
    gradient, other = gradients(ours, found, weight), gradients(theirs, expected, weight)
    for name, value in gradient.items():
        torch.testing.assert_close(value, other[name], atol=1e-4, rtol=1e-4)


def test_document_attention_of_one_document_is_causal():
    model, ids = model_of(2), torch.randint(320, (3, LENGTH))
    packed = DocumentAttention(torch.arange(3)[:, None].expand(3, LENGTH).contiguous())
    plain = model.hidden_states(ids)
    torch.testing.assert_close(model.hidden_states(ids, packed.positions, packed), plain, **EXACT)
    assert packed_attention(ids, None) == (None, None)
    assert torch.equal(model.hidden_states(ids, *packed_attention(ids, None)), plain)


@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_documents_end_with_their_separator(ids):
    document, places = [], []
    for place, token in enumerate(ids):
        new = place > 0 and ids[place - 1] == 0 and token != 0
        document.append(document[-1] + new if place else 0)
        places.append(0 if new or place == 0 else places[-1] + 1)
    row = torch.tensor([ids])
    assert document_ids(row, 0)[0].tolist() == document
    assert packed_attention(row, 0)[0][0].tolist() == places


def test_document_attention_compiles_to_one_program(compiling):
    model = build(tiny_config())
    program = torch.compile(model.hidden_states, backend="eager", fullgraph=True, dynamic=False)
    for seed, stance in enumerate(["default", "fail_on_recompile", "fail_on_recompile"]):
        ids = torch.randint(20, (2, 40), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), torch.compiler.set_stance(stance):
            found = program(ids, *packed_attention(ids, 0))
        torch.testing.assert_close(found, model.hidden_states(ids, *packed_attention(ids, 0)), atol=1e-5, rtol=1e-4)


# Memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor)]
        self.elements = max([self.elements, *(each.untyped_storage().nbytes() // 4 for each in made)])
        return result


def largest(way, length: int) -> int:
    places = torch.arange(length)[None]
    document = places // 100
    asked = CausalAttention() if way is None else way(DocumentAttention(document), document)
    with Largest() as seen:
        tiny_model().hidden_states(places % 320, context=asked).sum().backward()
    return seen.elements


@pytest.mark.parametrize("way", [None, sliced])
def test_attention_memory_is_linear_in_length(way):
    assert largest(way, 2048) == 2 * largest(way, 1024)


def test_attention_memory_check_detects_a_full_mask():
    assert largest(masked, 1024) >= 1024**2 / 4
