"""The engine: what a request gives alone it gives in any company, and no slot is ever lost."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from smolforge.config import Generation
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.generation.cpu_decoding import MAX_BLOCKED_ROWS, PrepackedModel, prepack
from smolforge.generation.engine import PREFILL_CHUNK_TOKENS, Engine, Request
from smolforge.generation.samplers import LogitBias, PresencePenalty, SamplerChain, make_sampler
from smolforge.generation.stream import TextEngine
from smolforge.models.attention import KVCache
from smolforge.models.quantized import QuantizationScheme, quantize
from smolforge.testing import tiny_model

GREEDY = make_sampler(Generation(temperature=0))
TIE = 1e-4
model_of = functools.cache(tiny_model)


def breaks(logits, seen):
    raise InvalidFileError("broken")


def run(engine):
    """Ids of each request's answer, when nothing more is asked."""
    found = {}
    while engine.busy:
        for token in engine.step():
            found.setdefault(token.row, []).append(token.id)
    return found


def alone(model, prompt, count):
    """Ids and their log-probabilities, which feel what is in the cache long before the ids do."""
    engine = Engine(model, 1, 128)
    engine.submit(Request(prompt, GREEDY, count, top_logprobs=0))
    tokens = [token for _ in range(count) for token in engine.step()]
    return [token.id for token in tokens], [token.logprobs.logprob for token in tokens]


def ties(model, prompt, one, other):
    """Whether two answers are the same; they may part where the two likeliest tokens are nearer than TIE."""
    place = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    if place is None:
        return 0
    with torch.no_grad():
        top = model(torch.tensor([list(prompt) + one[:place]]))[0, -1].topk(2).values
    assert top[0] - top[1] < TIE
    return 1


PLANS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=7)


@settings(max_examples=10)
@given(plan=PLANS, slots=st.integers(1, 5), seed=st.integers(0, 2))
def test_engine_greedy_ids_do_not_depend_on_other_requests(plan, slots, seed):
    """Requests come at any step, of any length, and wait, join and leave as they do."""
    model, chance = model_of(seed), torch.Generator().manual_seed(seed)
    engine = Engine(model, slots, 128)
    prompts = [torch.randint(3, 320, (length,), generator=chance).tolist() for _, length, _ in plan]
    due, found, step, near = sorted(range(len(plan)), key=lambda i: plan[i][0]), {}, 0, 0
    numbers = {}
    while due or engine.busy:
        while due and plan[due[0]][0] <= step:
            which = due.pop(0)
            numbers[engine.submit(Request(prompts[which], GREEDY, plan[which][2], top_logprobs=0))] = which
        for token in engine.step():
            found.setdefault(numbers[token.row], []).append(token)
        step += 1
        assert engine.used_slots <= slots
    for which, (_, _, count) in enumerate(plan):
        ids, logprobs = alone(model, prompts[which], count)
        tied = ties(model, prompts[which], [token.id for token in found[which]], ids)
        near += tied
        if not tied:
            assert [token.logprobs.logprob for token in found[which]] == pytest.approx(logprobs, abs=1e-5)
    assert near <= 1
    assert engine.used_tokens == 0


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 60), st.integers(1, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("break"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=25)
@given(actions=ACTIONS, slots=st.integers(1, 4))
def test_engine_loses_no_slot_on_cancels_and_errors(actions, slots):
    """Random arrivals, cancellations and errors: a cancelled request says nothing more, all others end as asked."""
    model = model_of()
    engine, gone, wanted, found = Engine(model, slots, 128), set(), {}, {}

    for what, one, other in actions:
        if what == "submit":
            wanted[engine.submit(Request([5] * one, GREEDY, other))] = other
        elif what == "cancel":
            engine.cancel(one)
            gone |= {one} & set(wanted)
        elif what == "break":
            engine.submit(Request([5], SamplerChain((breaks,), greedy=True), 3))
            with pytest.raises(InvalidFileError):
                while True:
                    for token in engine.step():
                        found.setdefault(token.row, []).append(token.id)
            assert not engine.busy
            gone |= set(wanted)
        else:
            for _ in range(one):
                before = {token: len(ids) for token, ids in found.items() if token in gone}
                for token in engine.step():
                    found.setdefault(token.row, []).append(token.id)
                assert before == {token: len(ids) for token, ids in found.items() if token in gone}
        assert engine.used_slots <= slots
        assert len({row.request_id for row in engine.decoding}) == len(engine.decoding)
    while engine.busy:
        for token in engine.step():
            found.setdefault(token.row, []).append(token.id)
    assert (engine.used_slots, engine.used_tokens, len(engine.waiting)) == (0, 0, 0)
    for number, count in wanted.items():
        if number not in gone:
            assert len(found[number]) == count


def test_cancelled_request_frees_its_slot_within_a_step():
    engine = Engine(tiny_model(), 1, 128)
    first = engine.submit(Request([5, 6], GREEDY, 100))
    second = engine.submit(Request([7, 8], GREEDY, 1))
    assert [token.row for token in engine.step()] == [first]
    engine.cancel(first)
    assert [token.row for token in engine.step()] == [second]
    assert not engine.busy


def test_stop_sequence_frees_its_slot_at_once():
    model = tiny_model()
    engine = Engine(model, 1, 128)
    writer = TextEngine(engine, model.tokenizer)
    prompt = model.tokenizer.encode("the model")
    first = writer.submit(Request(prompt, GREEDY, 60))
    text = "".join(piece.text for _ in range(61) for _, piece in writer.step())
    assert text
    writer.submit(Request(prompt, GREEDY, 60), stop=(text[4:6],))
    pieces = []
    while engine.busy:
        pieces += [piece for _, piece in writer.step()]
    assert pieces[-1].finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == text[: text.find(text[4:6])]
    assert not writer.buffers
    assert first == 0


def test_chunked_prefill_does_not_block_other_requests():
    model = tiny_model(max_position_embeddings=2048)
    long = torch.randint(3, 320, (2 * PREFILL_CHUNK_TOKENS + 100,)).tolist()
    engine = Engine(model, 2, 2048)
    one = engine.submit(Request([4, 5, 6], GREEDY, 50))
    engine.step()
    other = engine.submit(Request(long, GREEDY, 5))
    steps = [engine.step() for _ in range(4)]
    assert [{token.row for token in step} for step in steps] == [{one}, {one}, {one, other}, {one, other}]
    with torch.no_grad():
        assert steps[2][-1].id == int(model(torch.tensor([long]))[0, -1].argmax())


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, PREFILL_CHUNK_TOKENS + 70])
def test_echo_logprobs_equal_one_forward_pass(length):
    model = tiny_model(max_position_embeddings=1024)
    prompt = torch.randint(3, 320, (length,)).tolist()
    engine = Engine(model, 1, 1024)
    engine.submit(Request(prompt, GREEDY, 1, top_logprobs=3, echo=True))
    tokens = []
    while engine.busy:
        tokens += engine.step()
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt]))[0].log_softmax(-1)
    assert [token.id for token in tokens[:-1]] == prompt
    assert [token.is_prompt for token in tokens] == [True] * length + [False]
    assert tokens[0].logprobs is None
    for place, token in enumerate(tokens[1:]):
        assert abs(token.logprobs.logprob - logprobs[place, token.id].item()) < 1e-5
        assert [value for _, value in token.logprobs.top_logprobs] == sorted(
            (v for _, v in token.logprobs.top_logprobs), reverse=True
        )
        best = logprobs[place].topk(3)
        assert torch.allclose(best.values, torch.tensor([value for _, value in token.logprobs.top_logprobs]), atol=1e-5)
    assert tokens[-1].logprobs.logprob == tokens[-1].logprobs.top_logprobs[0][1], "the same number, not one near it"


def test_echo_scores_a_prompt_without_generating():
    engine = Engine(tiny_model(), 1, 16)
    engine.submit(Request([5] * 16, GREEDY, 0, top_logprobs=1, echo=True))
    tokens = engine.step()
    assert [token.finish_reason for token in tokens] == [None] * 15 + ["length"]
    assert not engine.busy


def test_engine_refuses_requests_that_do_not_fit():
    engine = Engine(tiny_model(), 1, 16)
    for prompt, said in (([], "at least one token"), ([5] * 16, "takes 16 with its answer")):
        with pytest.raises(ConfigError, match=said):
            engine.submit(Request(prompt, GREEDY, 1))
    assert not engine.busy


def test_penalties_count_only_generated_tokens():
    logits, seen = torch.zeros(6), torch.tensor([1, 1, 2, 2, 3])
    assert PresencePenalty(0.5, 0.25, 2)(logits, seen).tolist() == [0, 0, -1.0, -0.75, 0, 0]
    assert LogitBias(((4, 2.0), (0, -1.0)))(logits, seen).tolist() == [-1, 0, 0, 0, 2, 0]


# The packed weights


@settings(max_examples=25)
@given(rows=st.integers(1, 9), chunks=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_prepacked_model_equals_the_model(rows, chunks, seed):
    model = model_of(seed)
    network = prepack(model)
    assert isinstance(network, PrepackedModel)
    ids = torch.randint(320, (rows, sum(chunks)), generator=torch.Generator().manual_seed(seed))
    cache, start = KVCache(model.config, rows, 64, like=model.lm_head_weight), 0
    with torch.inference_mode():
        expected = model(ids)
        for length in chunks:
            positions = torch.arange(start, start + length).expand(rows, -1)
            states = network.hidden_states(ids[:, start : start + length], positions, cache.view(positions))
            found = network.logits(states)
            torch.testing.assert_close(found, expected[:, start : start + length], atol=1e-4, rtol=1e-4)
            start += length


def test_prepack_leaves_unsupported_models_alone():
    model = tiny_model()
    for other in (
        tiny_model(model_type="qwen2"),
        tiny_model(model_type="qwen3"),
        tiny_model(model_type="starcoder2"),
        tiny_model(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1),
        tiny_model().to(torch.bfloat16),
    ):
        assert prepack(other) is other
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert prepack(model) is model


@pytest.mark.parametrize("scheme", [QuantizationScheme(8, None, True), QuantizationScheme(4, 32, True)])
def test_echo_logprobs_do_not_depend_on_earlier_requests(scheme):
    """The first request finds nothing laid out, the second finds integers laid out for answers."""
    model = tiny_model(hidden_size=64, intermediate_size=96)
    quantize(model, scheme)
    engine, said = Engine(model, 1, 128), []
    for _ in range(2):
        engine.submit(Request([5, 9, 20, 7], GREEDY, 2, top_logprobs=0, echo=True))
        tokens = []
        while engine.busy:
            tokens += engine.step()
        said.append([token.logprobs.logprob for token in tokens[1:]])
    assert isinstance(engine.decoding_model, PrepackedModel)
    assert said[1] == pytest.approx(said[0], abs=1e-6)


def test_engine_greedy_batch_equals_transformers():
    model = tiny_model(2)
    theirs = LlamaForCausalLM(LlamaConfig(**model.config.model_dump(exclude={"model_type"}))).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    prompts = [torch.randint(3, 320, (length,)).tolist() for length in (3, 11, 20, 7, 1, 40)]
    engine = Engine(model, MAX_BLOCKED_ROWS + 1, 128)
    for prompt in prompts:
        engine.submit(Request(prompt, GREEDY, 24))
    found, near = run(engine), 0
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        near += ties(model, prompt, found[number], expected[0, len(prompt) :].tolist())
    assert near == 0


def test_engine_rows_keep_their_kv_cache_when_they_move():
    """The first leaves, the last takes its slot, and the prompt half read takes that one's."""
    model = model_of(0, max_position_embeddings=2048)
    chance = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 320, (n,), generator=chance).tolist() for n in (9, 30, 50, PREFILL_CHUNK_TOKENS + 40)]
    counts, found = (5, 12, 12, 6), {0: [], 1: [], 2: [], 3: []}
    engine = Engine(model, 4, 1024)
    for prompt, count in zip(prompts, counts, strict=True):
        engine.submit(Request(prompt, GREEDY, count, top_logprobs=0))
    while engine.busy:
        for token in engine.step():
            found[token.row].append(token)
    for number, prompt in enumerate(prompts):
        ids = [token.id for token in found[number]]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
        expected = [logprobs[len(prompt) - 1 + place, token].item() for place, token in enumerate(ids)]
        assert [token.logprobs.logprob for token in found[number]] == pytest.approx(expected, abs=1e-5)
