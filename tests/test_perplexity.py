"""Loss over a text: every token once, the mean exact, context as promised."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from smolforge.config import Data
from smolforge.data.batches import IGNORE_INDEX
from smolforge.data.corpus import HELD_OUT
from smolforge.data.prepare.build import prepare
from smolforge.errors import InvalidFileError
from smolforge.evaluation import loss_by_position, measure, measure_corpus, windows
from smolforge.testing import tiny_model


@given(total=st.integers(1, 60), length=st.integers(1, 12), data=st.data())
def test_windows_count_every_token_once_with_its_context(total, length, data):
    stride = data.draw(st.integers(1, length))
    ids = np.arange(1, total + 1)
    inputs, labels = windows(ids, 0, length, stride=stride)
    counted = labels != IGNORE_INDEX
    assert labels[counted].tolist() == ids.tolist()
    assert (inputs[counted] == labels[counted] - 1).all()
    rows, places = counted.nonzero(as_tuple=True)
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        if row > 0:
            assert place >= length - stride


def test_loss_equals_the_definition():
    model, ids = tiny_model(), np.random.default_rng(0).integers(3, 320, 100)
    found = measure(model, ids, 0, sequence_length=128)
    with torch.no_grad():
        logits = model(torch.tensor([[0, *ids[:-1]]]))[0]
    target = torch.from_numpy(ids)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == target).double().mean().item())
    assert found["tokens"] == 100


def test_loss_with_document_masking_equals_each_document_alone():
    """The first token of each is predicted after the end-of-text token of the one before."""
    model, texts = tiny_model(), [[5, 9, 7, 0], [3, 0], [8, 8, 4, 6, 1, 0]]
    losses, before = [], [0]
    for text in texts:
        with torch.no_grad():
            first, rest = model(torch.tensor([before]))[0, -1:], model(torch.tensor([text]))[0, :-1]
        losses.append(F.cross_entropy(torch.cat([first, rest]), torch.tensor(text), reduction="sum"))
        before = text
    ids = np.concatenate(texts)
    found = measure(model, ids, 0, sequence_length=16, intra_document_masking=True)
    assert found["loss"] == pytest.approx(sum(losses).item() / len(ids), rel=1e-5)
    assert found["loss"] != pytest.approx(measure(model, ids, 0, sequence_length=16)["loss"], rel=1e-4)


def test_bits_per_byte_of_a_uniform_model_is_exact(tmp_path, tokenizer, text_file):
    """A model that knows nothing spends log2 V bits on every token, the ends of documents included."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    corpus = prepare(Data(sources=(str(text_file),)), tmp_path / "corpus", tokenizer)
    found, size = measure_corpus(model, corpus, 32), corpus.size(HELD_OUT)
    assert found["tokens"] == size["tokens"]
    assert found["bits_per_byte"] == pytest.approx(math.log2(320) * size["tokens"] / size["bytes"], rel=1e-5)


def test_measure_corpus_leaves_the_model_unchanged(tmp_path, tokenizer, text_file):
    model = tiny_model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    corpus = prepare(Data(sources=(str(text_file),)), tmp_path / "corpus", tokenizer)
    measure_corpus(model, corpus, 32)
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_measure_corpus_refuses_an_empty_validation_split(tmp_path, tokenizer, text_file):
    corpus = prepare(Data(sources=(str(text_file),), held_out=0.0), tmp_path / "corpus", tokenizer)
    with pytest.raises(InvalidFileError, match="no held-out text"):
        measure_corpus(tiny_model(), corpus, 32)


def test_loss_by_position_equals_the_loss_of_each_token():
    model = tiny_model()
    ids = np.arange(100, dtype=np.uint16) * 7 % 320
    found = loss_by_position(model, ids, 0, length=32)
    assert found.shape == (3, 32)
    row = torch.tensor([[0, *ids[:31]]], dtype=torch.int64)
    with torch.no_grad():
        expected = F.cross_entropy(model(row)[0], torch.tensor(ids[:32].astype(np.int64)), reduction="none")
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5)
    whole = measure(model, ids[:96], 0, sequence_length=32)["loss"]
    assert found.mean() == pytest.approx(whole, rel=1e-5)
    with pytest.raises(InvalidFileError, match="less than one window of 200"):
        loss_by_position(model, ids, 0, length=200)
