"""One stream of tokens: samplers held to Transformers', greedy text to its generate, rows to themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from smolforge.config import Generation
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.generation.samplers import MinP, RepetitionPenalty, Temperature, TopK, TopP, make_sampler
from smolforge.generation.stream import StopBuffer, Token, generate, generate_tokens, stream
from smolforge.testing import tiny_model, tiny_tokenizer

GREEDY = make_sampler(Generation(temperature=0))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Temperature(0.7), TemperatureLogitsWarper(0.7)),
        (TopK(5), TopKLogitsWarper(5)),
        (TopP(0.6), TopPLogitsWarper(0.6)),
        (TopP(0.001), TopPLogitsWarper(0.001)),
        (MinP(0.2), MinPLogitsWarper(0.2)),
        (RepetitionPenalty(1.3), RepetitionPenaltyLogitsProcessor(1.3)),
    ],
)
def test_samplers_equal_transformers(ours, theirs):
    for seed in range(20):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
        seen = torch.tensor([3, 7, 9])
        torch.testing.assert_close(ours(logits, seen), theirs(seen[None], logits[None].clone())[0])


def test_sampler_chain_draws_the_right_distribution():
    choose, generator = make_sampler(Generation(temperature=0.5, top_k=3, top_p=None)), torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = torch.bincount(torch.tensor([choose(logits, [], generator) for _ in range(4000)]), minlength=4) / 4000
    expected = torch.tensor([2.0, 1.0, 0.0, float("-inf")]).div(0.5).softmax(-1)
    assert (drawn - expected).abs().max() < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_greedy_decoding_equals_transformers(seed):
    model = tiny_model(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**model.config.model_dump(exclude={"model_type"}))).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    prompt = torch.randint(3, 320, (1, 12))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = [token.id for token in generate_tokens(model, prompt.tolist(), GREEDY, max_new_tokens=64)]
    assert found == expected[0, 12:].tolist()


@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 9))
def test_greedy_batch_equals_each_prompt_alone(lengths, seed):
    """Except from where the two likeliest tokens lie within 1e-4: there rounding may choose."""
    model = tiny_model(seed)
    prompts = [torch.randint(3, 320, (length,)).tolist() for length in lengths]
    rows = {row: [] for row in range(len(prompts))}
    for token in generate_tokens(model, prompts, GREEDY, max_new_tokens=20):
        rows[token.row].append(token.id)
    ties = 0
    for row, prompt in enumerate(prompts):
        alone = [token.id for token in generate_tokens(model, [prompt], GREEDY, max_new_tokens=20)]
        if rows[row] != alone:
            place = next(place for place, pair in enumerate(zip(rows[row], alone, strict=True)) if pair[0] != pair[1])
            with torch.no_grad():
                top = model(torch.tensor([prompt + alone[:place]]))[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-4
            ties += 1
    assert ties <= 1


def test_sampled_batch_equals_each_prompt_alone():
    model, options = tiny_model(), {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    together = generate(model, ["the model", "a token follows", "x"], **options)
    for prompt, completion in zip(["the model", "a token follows", "x"], together, strict=True):
        assert generate(model, [prompt], **options) == [completion]
    assert generate(model, ["the model"], **options | {"seed": 6}) != together[:1]


def test_stream_joins_to_the_full_text():
    model = tiny_model()
    pieces = list(stream(model, "the model", max_new_tokens=40, seed=1, temperature=1.0))
    (whole,) = generate(model, ["the model"], max_new_tokens=40, seed=1, temperature=1.0)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert model.tokenizer.decode(whole.token_ids) == whole.text


def test_eos_ends_generation_and_is_not_shown():
    """Whichever token the tokenizer calls the end: here one the model is known to say."""
    model = tiny_model()
    (free,) = generate(model, ["the model reads"], temperature=0, max_new_tokens=30)
    end = free.token_ids[6]
    place = free.token_ids.index(end)
    model.tokenizer.eos_id = end
    (ended,) = generate(model, ["the model reads"], temperature=0, max_new_tokens=30)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: place + 1]
    assert ended.text == model.tokenizer.decode(free.token_ids[:place])


def feed(words, stop):
    """What `Text` gives out for one token a character, and whether it stopped."""
    tokenizer = tiny_tokenizer()
    text, given = StopBuffer(tokenizer, stop), []
    ids = [tokenizer.encode(letter)[0] for letter in words]
    for place, token in enumerate(ids):
        piece = text.push(Token(0, token, "length" if place == len(ids) - 1 else None), tokenizer.eos_ids)
        given += [piece] if piece else []
        if text.stopped:
            break
    return given, text.stopped


@settings(deadline=None)
@given(words=st.text("abc", min_size=1, max_size=15), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_buffer_cuts_at_the_first_stop_sequence(words, stop):
    given_out, stopped = feed(words, stop)
    text = "".join(piece.text for piece in given_out)
    ends = [words.find(word) + len(word) for word in stop if word in words]
    if not ends:
        assert (text, stopped) == (words, False)
    else:
        seen = words[: min(ends)]  # what had been generated when a stop string first was whole
        assert stopped
        assert text == seen[: min(seen.find(word) for word in stop if word in seen)]
    for place in range(len(given_out)):
        shown = "".join(piece.text for piece in given_out[: place + 1])
        assert not any(word in shown for word in stop)


def test_stop_sequence_ends_generation():
    model = tiny_model()
    (free,) = generate(model, ["the"], temperature=0, max_new_tokens=40)
    word = free.text[5:8]
    (cut,) = generate(model, ["the"], temperature=0, max_new_tokens=40, stop=(word,))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(word)]
    assert len(cut.token_ids) < len(free.token_ids)


def test_generate_stops_at_the_context_length():
    model = tiny_model()
    (whole,) = generate(model, ["a " * 40], temperature=0, max_new_tokens=500)
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) + len(model.tokenizer.encode("a " * 40)) == 128
    with pytest.raises(ConfigError, match="this model takes 128 with its answer"):
        generate(model, ["7" * 128])


def test_generate_refuses_invalid_settings():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"there is no setting 'temprature'\. Did you mean temperature\?"):
        generate(model, ["x"], temprature=1)
    with pytest.raises(ConfigError, match=r"top_p is 2; it should be a finite number above 0 and at most 1, or none"):
        generate(model, ["x"], top_p=2)
    model.tokenizer = None
    with pytest.raises(InvalidFileError, match="without a tokenizer"):
        generate(model, ["x"])
    assert generate(model, []) == []
