"""The released SmolLM2-135M-Instruct, as llama.cpp rounded it to 4 bits (Q4_1): what random weights cannot show.

`make .released` brings the file. It is not the original bfloat16 release: its matrices are on Q4_1's grid.
Transformers takes 20 s to read it. So the short form computes with Transformers' model of the weights that we read, and
the long one proves that those are the weights, settings and tokenizer which Transformers reads.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import RELEASED, needs_released
from test_chat_session import Typed
from test_server import Running, events
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smolforge import cli
from smolforge.cli.flags import LoadingFlags
from smolforge.config import Generation
from smolforge.evaluation.multiple_choice import Item, score
from smolforge.generation import engine
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate, generate_tokens
from smolforge.models.stats import parameter_counts
from smolforge.tokenizer import Tokenizer
from smolforge.verification import HARD_TEXTS, checks
from smolforge.verification.transformers_reference import Oracle

pytestmark = needs_released
GREEDY = make_sampler(Generation(temperature=0))
MAX_LOGIT_DIFF = 2e-5
"""Logits are up to 34. Measured 0.0 with one thread, where both do the same; 1.7e-5 in rows of up to 8,192 tokens."""
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEXT = "Gravity is the force that pulls things down. The Moon goes around the Earth, and both go around the Sun. "


def user(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def theirs(released):
    """Transformers' model with these weights in place."""
    config = LlamaConfig(**released.config.model_dump(exclude={"model_type"}))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(released.state_dict(), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


@pytest.fixture(scope="module")
def row(released):
    return torch.tensor([(released.tokenizer.encode(TEXT) + released.tokenizer.encode("".join(HARD_TEXTS)))[:80]])


@pytest.fixture(scope="module")
def expected(theirs, row):
    """Transformers' logits of that row."""
    with torch.inference_mode():
        return theirs(row).logits[0]


def test_released_model_has_the_published_shape(released):
    assert sum(parameter_counts(released.config).values()) == 134_515_008
    assert torch.stack([weight.isfinite().all() for weight in released.parameters()]).all()
    assert released.tokenizer.eos_id == 2


# Transformers


@torch.inference_mode()
def test_released_logits_equal_transformers(released, row, expected):
    assert (released(row)[0] - expected).abs().max().item() < MAX_LOGIT_DIFF


def test_released_greedy_text_equals_transformers(released, theirs):
    """Each token of an answer must be the one that Transformers finds likeliest after those before it."""
    (answer,) = generate(released, [TEXT], temperature=0, max_new_tokens=8)
    ids = [*released.tokenizer.encode(TEXT), *answer.token_ids]
    with torch.inference_mode():
        likeliest = theirs(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert likeliest[-1 - len(answer.token_ids) : -1] == list(answer.token_ids)


def test_released_tokenizer_equals_the_published_one(released, shared):
    published = Tokenizer.load(shared / "smollm2-tokenizer")
    for text in (*HARD_TEXTS, TEXT):
        assert released.tokenizer.encode(text) == published.encode(text)
        assert released.tokenizer.decode(published.encode(text)) == text


def test_released_chat_prompt_is_the_published_one(released):
    ids = released.tokenizer.chat(user("hi"))
    assert released.tokenizer.backend.decode(ids, skip_special_tokens=False) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.long
def test_released_file_is_read_as_transformers_reads_it(released):
    """Weights to the bit, settings, chat prompts, and greedy text by their own generate().

    Its tokenizer of a .gguf splits numbers otherwise than the published one, to which hard texts are held above.
    """
    oracle = Oracle(RELEASED, torch.float32)
    read = oracle.model.state_dict()
    for name, weight in released.state_dict().items():
        assert torch.equal(weight, read[name]), name
    settings = released.config.model_dump()
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "max_position_embeddings"):
        assert settings[name] == getattr(oracle.model.config, name)
    assert released.config.rms_norm_eps == pytest.approx(oracle.model.config.rms_norm_eps, rel=1e-6)  # fp32 in the file
    assert released.config.rope_theta == oracle.model.config.rope_parameters["rope_theta"]
    tokenizer = AutoTokenizer.from_pretrained(RELEASED.parent, gguf_file=RELEASED.name)
    for chat in (user("hi"), [{"role": "system", "content": ""}, *user("hi")]):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert released.tokenizer.chat(chat) == tokenizer.encode(prompt, add_special_tokens=False)
    prompts = [released.tokenizer.encode(text) for text in (TEXT, "Once upon a time", "def fibonacci(n):\n    ")]
    for prompt in (*prompts, released.tokenizer.chat(user("What is gravity?"))):
        tokens = generate_tokens(released, [prompt], GREEDY, max_new_tokens=24)
        assert [token.id for token in tokens] == oracle.greedy(prompt, 24)


@pytest.mark.long
def test_released_file_holds_in_verify(whole_checks, compiling, tmp_path, capsys):
    """As a command: parameters, logits in fp32 and bfloat16, greedy text, the cache, the tied head."""
    out = str(tmp_path / "v.json")
    words = ["--against", "transformers", "--max-length", "1024", "--json", "--out", out]
    assert cli.run(["verify", str(RELEASED), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "v.json").read_text())
    assert report["max_abs_logit_diff"] < MAX_LOGIT_DIFF
    assert (report["greedy_match"], report["parameters"]) == (True, 134_515_008)
    by_name = {check["name"]: check for check in report["checks"]}
    assert {"logits float32", "logits bfloat16", "greedy", "cached", "tied head"} <= set(by_name)
    assert all(check["holds"] for check in by_name.values())


# The cache and the scores of a prompt


@pytest.mark.long
def test_released_model_with_a_cache_equals_a_full_pass(released, row):
    check = checks.check_cache(released, row[0, :12].tolist())
    assert check.holds, check.message


@pytest.mark.long
def test_released_prompt_scores_equal_transformers(released, row, expected, monkeypatch):
    """Read in chunks of 32 tokens, with the answer's first token after them."""
    monkeypatch.setattr(engine, "PREFILL_CHUNK_TOKENS", 32)
    requests = engine.Engine(released, 1, 128)
    requests.submit(engine.Request(row[0].tolist(), GREEDY, 1, top_logprobs=3, echo=True))
    tokens = [token for _ in range(3) for token in requests.step()]
    logprobs = expected.log_softmax(-1)
    assert tokens[0].logprobs is None
    for place, token in enumerate(tokens[1:]):
        assert token.logprobs.logprob == pytest.approx(logprobs[place, token.id].item(), abs=1e-4)
        assert [value for _, value in token.logprobs.top_logprobs] == pytest.approx(
            logprobs[place].topk(3).values.tolist(), abs=1e-4
        )
    assert tokens[-1].id == int(expected[-1].argmax())


@pytest.mark.long
def test_released_item_scores_equal_transformers(released, theirs):
    """What multiple choice is decided by: the log-probability of each answer, of a question at a time."""
    query = "Question: What is the capital of France?\nAnswer:"
    item = Item("0", (query,), ("Paris", "a kind of cheese"), 0)
    (ours,) = score(released, [item])
    encode, values = released.tokenizer.encode, []
    for choice in item.choices:
        ids = encode(f"{query} {choice}")
        with torch.inference_mode():
            logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(logprobs[place - 1, ids[place]].item() for place in range(len(encode(query)), len(ids))))
    assert ours.logprobs == pytest.approx(values, abs=1e-4)
    assert ours.correct()["acc"]


# A chat that stops


@pytest.mark.long
def test_released_chat_stops_at_the_command_line_and_in_the_server(released, monkeypatch, capsys):
    """The same text, ended by the model; as one piece it is in the long form below."""
    monkeypatch.setattr(LoadingFlags, "load", lambda *_: released)
    assert chat_lines(monkeypatch, capsys, QUESTION) == [ANSWER]
    request = {"messages": user(QUESTION), "temperature": 0, "max_tokens": 40, "stream": True}
    with Running(model=released, context=256) as server:
        streamed = [event["choices"][0] for event in events(server.post("/v1/chat/completions", **request))]
    assert "".join(choice["delta"].get("content") or "" for choice in streamed) == ANSWER
    assert streamed[-1]["finish_reason"] == "stop"


def chat_lines(monkeypatch, capsys, *questions):
    """Return what `smolforge chat` answers to these lines, without the prompts; no answer may reach its limit."""
    monkeypatch.setattr("sys.stdin", Typed(*questions))
    assert cli.run(["chat", str(RELEASED), "--temperature", "0", "--max-new-tokens", "90"]) == 0
    said = capsys.readouterr()
    assert "max_new_tokens lets it go on" not in said.err
    return [line.removeprefix("> ") for line in said.out.splitlines() if line != "> "]


@pytest.mark.long
def test_released_conversation_is_answered_as_a_whole(released, monkeypatch, capsys):
    """Each turn goes on from the keys and values of the last, and is what the whole conversation gives."""
    monkeypatch.setattr(LoadingFlags, "load", lambda *_: released)
    first, second = chat_lines(monkeypatch, capsys, QUESTION, "And of Italy?")
    conversation = [*user(QUESTION), {"role": "assistant", "content": first}, *user("And of Italy?")]
    (whole,) = generate(released, [conversation], temperature=0, max_new_tokens=90)
    assert (first, second, whole.finish_reason) == (ANSWER, whole.text, "stop")
    (alone,) = generate(released, [user(QUESTION)], temperature=0, max_new_tokens=90)
    assert (alone.text, alone.finish_reason) == (ANSWER, "stop")


@pytest.mark.long
def test_released_server_answers_many_as_it_answers_one(released):
    """Twelve clients at once, on four slots."""
    questions = [QUESTION, "What is 2+2?", "What is gravity?", "Say hello."] * 3

    def ask(question):
        body = {"messages": user(question), "temperature": 0, "max_tokens": 24}
        return server.post("/v1/chat/completions", **body).json()["choices"][0]

    with Running(model=released, context=256) as server:
        server.http.timeout = 600
        reference = {question: ask(question) for question in questions[:4]}
        with ThreadPoolExecutor(len(questions)) as clients:
            answers = list(clients.map(ask, questions))
        assert server.idle()
    assert answers == [reference[question] for question in questions]
    said = reference[QUESTION]
    assert (said["message"]["content"], said["finish_reason"]) == (ANSWER, "stop")
