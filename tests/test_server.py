"""The server as clients meet it: a real one on a port, and the openai SDK, lm-evaluation-harness and curl's like."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolforge import cli, load
from smolforge.generation.engine import TokenLogprobs
from smolforge.generation.stream import generate
from smolforge.server import middleware
from smolforge.server.lifecycle import ServerConfig, build_server, serve
from smolforge.server.middleware import AccessRules
from smolforge.server.responses import TokenText
from smolforge.testing import tiny_model

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEY = "a-key-of-the-tests"


class Running:
    """A server in this process."""

    def __init__(self, key=None, model=None, **place):
        self.model = model or tiny_model()
        tokenizer = self.model.tokenizer
        if tokenizer.template is None:
            tokenizer.settings["chat_template"] = TEMPLATE
            tokenizer.template = tokenizer._chat_template()
        rules = AccessRules(key, max_body_bytes=100_000)
        self.server, self.desk = build_server(
            self.model, "tiny", ServerConfig(port=0, **{"context": 128, "slots": 4, **place}), rules=rules
        )
        self.engine = self.desk.text_engine.engine
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.desk.thread.start()
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=20)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.desk.drain(0.0)
        self.server.should_exit = True
        self.thread.join()

    def post(self, route, **body):
        return self.http.post(route, json=body)

    def idle(self, seconds=5):
        """Whether nothing is under way, or soon is."""
        end = time.monotonic() + seconds
        while (self.engine.busy or self.desk.streams or self.desk.active_choices) and time.monotonic() < end:
            time.sleep(0.005)
        return not (self.engine.busy or self.desk.streams or self.desk.active_choices)


@pytest.fixture(scope="module")
def running():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with Running() as server:
        yield server
        assert server.idle()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def keyed():
    with Running(KEY) as server:
        yield server


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events(response):
    """The data of each server-sent event, of which the last is [DONE]."""
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# What comes out


def test_completions_equal_generate(running, client):
    (expected,) = generate(running.model, ["the model"], temperature=0, max_new_tokens=20)
    found = client.completions.create(model="tiny", prompt="the model", max_tokens=20, temperature=0)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, len(expected.token_ids))
    assert found.id.startswith("cmpl-")
    assert found.object == "text_completion"


def test_completions_stream_joins_to_the_full_text(running, client):
    given = {"model": "tiny", "prompt": "the model", "max_tokens": 30, "seed": 3, "temperature": 1.0}
    whole = client.completions.create(**given)
    chunks = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_server_serves_quantized_and_gguf_models(small):
    with Running(model=load(small)) as server:
        (expected,) = generate(server.model, ["the model"], temperature=0, max_new_tokens=20)
        found = server.post("/v1/completions", model="tiny", prompt="the model", max_tokens=20, temperature=0).json()
        assert found["choices"][0]["text"] == expected.text
        said = server.post(
            "/v1/chat/completions", model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=5
        )
        assert said.json()["usage"]["completion_tokens"] <= 5
        assert server.idle()


def test_chat_completions_work_with_the_openai_sdk(client):
    given = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    whole = client.chat.completions.create(**given, max_completion_tokens=12, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**given, max_tokens=12, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].delta.content is None
    content = whole.choices[0].logprobs.content
    assert len(content) == 12
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in content)
    assert b"".join(bytes(each.bytes) for each in content).decode(errors="replace") == whole.choices[0].message.content


def test_completions_work_with_many_async_sdk_clients(running):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:

            async def one(number):
                stream = await client.completions.create(
                    model="tiny", prompt="the " * number, max_tokens=15, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(1, 8)))

    prompts = ["the " * number for number in range(1, 8)]
    expected = generate(running.model, prompts, temperature=0, max_new_tokens=15)
    assert asyncio.run(ask()) == [each.text for each in expected]


def test_completions_number_prompts_and_choices(running):
    body = running.post("/v1/completions", prompt=["the", "a"], n=2, max_tokens=6, seed=1, temperature=1.5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["text"] != body["choices"][1]["text"]
    again = running.post("/v1/completions", prompt="the", n=2, max_tokens=6, seed=1, temperature=1.5).json()
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in body["choices"][:2]]
    ids = [running.model.tokenizer.encode(text) for text in ("the", "a")]
    of_ids = running.post("/v1/completions", prompt=ids, n=2, max_tokens=6, seed=1, temperature=1.5).json()
    assert of_ids["choices"] == body["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_echo_the_prompt_and_its_logprobs(running, stream):
    given = {"prompt": "the model reads", "echo": True, "logprobs": 2, "max_tokens": 2, "temperature": 0}
    if stream:
        choices = [each["choices"][0] for each in events(running.post("/v1/completions", **given, stream=True))]
        text = "".join(choice["text"] for choice in choices)
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    else:
        choice = running.post("/v1/completions", **given).json()["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    ids = running.model.tokenizer.encode("the model reads")
    with torch.no_grad():
        expected = running.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert text.startswith("the model reads")
    assert {len(values) for values in logprobs.values()} == {len(ids) + 2}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for place, token in enumerate(ids[1:]):
        assert abs(logprobs["token_logprobs"][place + 1] - expected[place, token].item()) < 1e-5
    for own, top in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[1:]:
        assert own in top.values()
        assert len(top) in (2, 3)
    for place in range(len(ids)):
        assert text[logprobs["text_offset"][place] :].startswith(logprobs["tokens"][place])


@pytest.mark.parametrize("stream", [False, True])
def test_ignore_eos_adds_no_text_and_keeps_offsets(running, stream):
    """Where the end-of-text token is said and gone beyond, what follows still stands where its offset says."""
    eos = running.model.tokenizer.eos_id
    given = {"prompt": "the", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 0, "stream": stream}
    response = running.post("/v1/completions", **given, logit_bias={str(eos): 100})
    choices = [each["choices"][0] for each in events(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == ""
    assert [place for each in choices if each["logprobs"] for place in each["logprobs"]["text_offset"]] == [0] * 4


def test_stop_sequences_are_not_in_the_text(running):
    free = running.post("/v1/completions", prompt="the", max_tokens=30, temperature=0).json()["choices"][0]["text"]
    word = free[6:8]
    for stop in (word, ["never ever", word]):
        cut = running.post("/v1/completions", prompt="the", max_tokens=30, temperature=0, stop=stop).json()
        assert cut["choices"][0]["text"] == free[: free.index(word)]
        assert cut["choices"][0]["finish_reason"] == "stop"


def test_logit_bias_and_frequency_penalty_change_tokens(running):
    given = {"prompt": "the", "max_tokens": 5, "temperature": 0, "logprobs": 0}
    tokens = running.post("/v1/completions", **given, logit_bias={"7": 100}).json()["choices"][0]["logprobs"]["tokens"]
    assert tokens == [running.model.tokenizer.decode([7])] * 5
    once = running.post("/v1/completions", **given, logit_bias={"7": 4}, frequency_penalty=2).json()
    assert len(set(once["choices"][0]["logprobs"]["tokens"])) > 1


def test_tokenize_and_detokenize_are_inverse(running):
    tokens = running.post("/tokenize", prompt="the model").json()
    assert tokens == {"tokens": running.model.tokenizer.encode("the model"), "count": 3, "max_model_len": 128}
    assert running.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "the model"}
    chat = running.post("/tokenize", messages=[{"role": "user", "content": "<|im_end|>"}]).json()["tokens"]
    assert chat.count(running.model.tokenizer.backend.token_to_id("<|im_end|>")) == 1, "the template's own"
    eos = running.http.get("/tokenizer_info").json()["eos_token"]
    assert running.post("/tokenize", prompt=eos).json()["tokens"] == [running.model.tokenizer.eos_id]
    assert running.model.tokenizer.eos_id not in running.post("/tokenize", prompt=f"a{eos}").json()["tokens"]


def test_tokenizer_info_reports_the_chat_template_in_use():
    with Running() as server:
        tokenizer = server.model.tokenizer
        tokenizer.settings["pad_token"] = "<|im_end|>"
        told = server.http.get("/tokenizer_info").json()
        assert (told["chat_template"], told["pad_token"]) == (TEMPLATE, "<|im_end|>")
        assert (told["bos_token"], told["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
        for none in ("", [{"name": "rag", "template": "x"}]):
            tokenizer.settings["chat_template"] = none
            tokenizer.template = tokenizer._chat_template()
            assert server.http.get("/tokenizer_info").json()["chat_template"] is None


def test_top_logprobs_keys_do_not_collide():
    words = TokenText(tiny_model().tokenizer)
    halves = [token for token in range(100, 250) if "\ufffd" in words.tokenizer.decode([token])][:3]
    top = tuple((token, -1.0 - token / 1000) for token in halves)
    found = words.top_logprobs(5, TokenLogprobs(-9.5, top))
    assert len(found) == 4
    assert -9.5 in found.values()


# lm-evaluation-harness


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval_over_http_equals_in_process_scores(running, tmp_path, backend):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from smolforge.checkpoint import huggingface

    huggingface.save(running.model, tmp_path, running.model.tokenizer)
    served = LocalCompletionsAPI(
        base_url=f"{running.url}/v1/completions",
        model="tiny",
        tokenizer=str(tmp_path) if backend == "huggingface" else None,
        tokenizer_backend=backend,
        batch_size=3,
        max_length=127,
    )
    pairs = [
        ("the model", " reads"),
        ("a token", " follows the model"),
        ("x", " y z"),
        ("the", " a"),
        ("reads", " the the"),
        ("", "the model"),
    ]
    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    found = served.loglikelihood(asked, disable_tqdm=True)
    tokenizer = running.model.tokenizer
    for (context, ending), (value, greedy) in zip(pairs, found, strict=True):
        before = tokenizer.encode(context) or [tokenizer.eos_id]
        ids, start = before + tokenizer.encode(context + ending)[len(before) if context else 0 :], len(before)
        with torch.no_grad():
            logprobs = running.model(torch.tensor([ids]))[0].log_softmax(-1)
        rows = list(enumerate(ids))[start:]
        assert value == pytest.approx(sum(logprobs[place - 1, token].item() for place, token in rows), abs=1e-4)
        assert greedy == all(int(logprobs[place - 1].argmax()) == token for place, token in rows)


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": "x", "temperature": 3}, "temperature"),
        ({"prompt": "x", "n": 100}, "n"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 4}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "x", "logit_bias": {"-1": 3}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"320": 3}}, "logit_bias"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format.type"),
        ({"prompt": [5, 400]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({}, "prompt"),
    ],
)
def test_completions_errors_name_the_invalid_field(running, body, param):
    response = running.http.post(
        "/v1/completions", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


def test_chat_completions_refuse_unsupported_fields(running):
    user = [{"role": "user", "content": "hi"}]
    for more, param in (
        ({"tools": [{}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        response = running.post("/v1/chat/completions", messages=user, **more)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert running.post("/v1/chat/completions", messages=image).status_code == 400


def test_completions_refuse_a_too_long_prompt(running, client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt=[5] * 128, max_tokens=1)
    assert error.value.code == "context_length_exceeded"
    assert running.post("/v1/completions", prompt=[5] * 127, max_tokens=50).json()["usage"]["completion_tokens"] == 1


def test_server_answers_unknown_routes_and_models_with_404(running, client):
    for send, status in ((lambda: running.http.get("/v1/embeddings"), 404), (lambda: running.http.put("/health"), 405)):
        response = send()
        assert response.status_code == status
        assert response.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-9", prompt="x")
    assert error.value.code == "model_not_found"
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_server_refuses_wrong_content_type_size_and_host(running):
    assert running.http.post("/v1/completions", content=b"{}").status_code == 415
    big = json.dumps({"prompt": "x" * 200_000}).encode()
    headers = {"Content-Type": "application/json"}
    assert running.http.post("/v1/completions", content=big, headers=headers).status_code == 413
    parts = (big[i : i + 10_000] for i in range(0, len(big), 10_000))  # no length is said
    assert running.http.post("/v1/completions", content=parts, headers=headers).status_code == 413
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert running.http.get("/v1/models", headers={"Host": host}).status_code == 403
    for host in ("localhost:80", "127.0.0.2:80", "[::1]"):
        assert running.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_server_refuses_a_body_that_never_ends(running, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_SECONDS", 0.1)
    fields = ["Host: localhost", "Content-Type: application/json", "Content-Length: 9"]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", "{"])
    with socket.create_connection(("127.0.0.1", running.http.base_url.port), timeout=20) as client:
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_api_key_is_required_on_every_route_but_health(keyed):
    routes = keyed.http.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
    assert len(routes) >= 11
    for route, methods in [*routes.items(), ("/openapi.json", {"get"}), ("/nowhere", {"get"}), ("/health/", {"get"})]:
        for method in methods:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": KEY + "x"}, {"Authorization": KEY}):
                status = keyed.http.request(method, route, headers=headers).status_code
                assert status == (200 if route == "/health" else 401), route
    assert keyed.http.get("/v1/models", headers={"X-Api-Key": KEY}).status_code == 200
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


# Clients that go, and many


def slow(engine, monkeypatch, seconds=0.03):
    """Steps that take their time, so that something can happen between two."""
    step = engine.step

    def slower():
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(engine, "step", slower)


@pytest.mark.parametrize("stream", [True, False])
def test_client_disconnect_frees_its_slot(running, monkeypatch, stream):
    slow(running.engine, monkeypatch)
    steps = []
    monkeypatch.setattr(running.engine, "step", lambda real=running.engine.step: steps.append(1) or real())
    body = {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "stream": stream, "n": 3}
    with httpx.Client(base_url=running.url) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
    gone = len(steps)
    assert running.idle(2)
    assert len(steps) - gone <= 3, "in a step, and the time that a hang-up takes to be heard"
    assert 'finished_reason="abort"' in running.http.get("/metrics").text


def test_inter_token_latency_is_measured_per_choice(monkeypatch):
    """Not the nothing that lies between those of two choices in one step."""
    with Running() as server:
        slow(server.engine, monkeypatch, 0.02)
        server.post("/v1/completions", prompt="the", n=3, max_tokens=12, temperature=0, ignore_eos=True)
        told = server.http.get("/metrics").text

    def of(name):
        return float(re.search(rf'^vllm:{name}{{model_name="tiny"}} (\S+)$', told, re.MULTILINE)[1])

    assert of("time_to_first_token_seconds_count") == 3
    assert of("inter_token_latency_seconds_sum") / of("inter_token_latency_seconds_count") >= 0.02


def test_full_queue_returns_429_and_the_sdk_retries(monkeypatch):
    with Running(slots=1, queue=0) as server:
        slow(server.engine, monkeypatch, 0.01)
        with httpx.Client(base_url=server.url) as other:
            body = {"prompt": "the", "max_tokens": 60, "ignore_eos": True, "stream": True}
            with other.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                refused = server.post("/v1/completions", prompt="x")
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["code"] == "queue_full"
                with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=9) as client:
                    threading.Timer(0.2, lambda: list(lines)).start()
                    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_engine_error_returns_500_and_the_server_continues(running, monkeypatch, caplog):
    def broken():
        raise RuntimeError("secret words of the prompt")

    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL, "smolforge.server"):
        patch.setattr(running.engine, "step", broken)
        response = running.post("/v1/completions", prompt="x")
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in response.text
        streamed = events(running.post("/v1/completions", prompt="x", stream=True))
        assert streamed[-1]["error"]["type"] == "server_error"
    assert running.idle()
    assert running.post("/v1/completions", prompt="x").status_code == 200


def test_unexpected_error_returns_500_in_the_api_format(running, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("secret words of the prompt")

    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL, "smolforge.server"):
        patch.setattr(running.model.tokenizer, "encode", broken)
        for route in ("/v1/completions", "/tokenize"):
            response = running.post(route, prompt="x")
            assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
            assert "secret" not in response.text
            assert response.headers["x-request-id"]
    assert running.post("/v1/completions", prompt="x").status_code == 200


def test_drain_finishes_running_requests(monkeypatch):
    with Running() as server:
        slow(server.engine, monkeypatch, 0.01)
        body = {"prompt": "the", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            draining = threading.Thread(target=server.desk.drain, args=(10.0,))
            draining.start()
            with httpx.Client(base_url=server.url) as other:
                while not server.desk.draining:
                    time.sleep(0.005)
                assert other.get("/ready").status_code == 503
                assert other.get("/health").status_code == 200
                refused = other.post("/v1/completions", json={"prompt": "x"})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            rest = [line for line in lines if line]
        draining.join()
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]


def test_drain_timeout_ends_streams_with_an_error(monkeypatch):
    with Running() as server:
        slow(server.engine, monkeypatch, 0.05)
        body = {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.desk.drain(0.1)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"shutting_down"' in rest[-2]


def test_second_signal_ends_streams_at_once_with_an_error(monkeypatch):
    """One drains; the next does not wait until uvicorn loses its patience and cuts what is under way."""
    own, said = Running(), []
    slow(own.engine, monkeypatch, 0.1)

    def ask():
        url = f"http://127.0.0.1:{own.server.servers[0].sockets[0].getsockname()[1]}"
        body = {"prompt": "the", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            main = threading.main_thread().ident
            signal.pthread_kill(main, signal.SIGTERM)
            while not own.desk.draining:
                time.sleep(0.005)
            signal.pthread_kill(main, signal.SIGTERM)
            said.extend(line for line in lines if line)

    client = threading.Thread(target=ask)
    with pytest.raises(KeyboardInterrupt):
        serve(own.server, own.desk, client.start)
    client.join()
    assert said[-1] == "data: [DONE]"
    assert '"shutting_down"' in said[-2]


def test_request_log_has_no_user_text(running, caplog):
    with caplog.at_level(logging.DEBUG):
        running.http.post(
            "/v1/completions",
            json={"prompt": "my secret", "user": "my name", "max_tokens": 2},
            headers={"X-Request-Id": "forged\tline", "Authorization": "Bearer my-key"},
        )
        running.http.get("/%0aforged/my%20secret")
        running.http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("smolforge"))
    assert "POST /v1/completions 200" in said
    assert "mine-1" in said
    for word in ("secret", "forged", "my"):
        assert word not in said.replace("mine-1", "")


# Mutated and random bodies

GOOD = [
    ("/v1/completions", {"prompt": "the", "max_tokens": 3, "logprobs": 1, "echo": True, "stop": ["a"], "seed": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True}),
    ("/tokenize", {"prompt": "x"}),
    ("/detokenize", {"tokens": [5]}),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(GOOD), data=st.data())
def test_completions_answer_or_refuse_mutated_bodies(running, which, data):
    """One field becomes anything at all, or bytes of the body do."""
    route, good = which
    known = [
        "temperature",
        "top_p",
        "n",
        "stream",
        "logit_bias",
        "model",
        "best_of",
        "min_p",
        "messages",
        "stop",
        "top_k",
    ]
    name = data.draw(st.sampled_from([*good, *known]))
    body = json.dumps(good | {name: data.draw(JSON)}).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 3)) == 0:
        place = data.draw(st.integers(0, len(body) - 1))
        body = body[:place] + data.draw(st.binary(max_size=3)) + body[place + data.draw(st.integers(0, 4)) :]
    response = running.http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404, 413)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


# Many at once, for long


def soak(server, seconds, clients, chance):
    """Clients that ask without a pause and hang up on a third; returns how many streams there were of each end."""
    ends, end = {"done": 0, "left": 0}, time.monotonic() + seconds

    def one(seed):
        draw = chance(seed)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while time.monotonic() < end:
                body = {"prompt": "the " * draw.randint(1, 20), "max_tokens": draw.randint(1, 60), "stream": True}
                leave = draw.randint(1, 8) if draw.random() < 1 / 3 else 1 << 30
                with client.stream("POST", "/v1/completions", json=body) as response:
                    seen = []
                    for line in response.iter_lines():
                        seen += [line] if line else []
                        if len(seen) >= leave:
                            break
                assert response.status_code == 200
                done = seen[-1:] == ["data: [DONE]"]
                assert done or len(seen) == leave
                ends["done" if done else "left"] += 1

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def memory_of_this_process():
    import psutil

    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("seconds", [1, pytest.param(600, marks=pytest.mark.long)])
def test_server_under_load_leaks_no_slots_and_no_memory(seconds):
    import random

    with Running(slots=8) as server:
        soak(server, 0.2 if seconds < 10 else 60, 16, random.Random)
        before = memory_of_this_process()
        ends = soak(server, seconds, 16, lambda seed: random.Random(seed + 100))
        assert server.idle()
        assert ends["done"] > 0
        assert ends["left"] > 0
        assert (server.engine.used_slots, server.desk.active_choices, server.desk.text_engine.buffers) == (0, {}, {})
        after = memory_of_this_process()
        print(f"{ends}, {before / 2**20:.1f} MiB before, {after / 2**20:.1f} after")
        assert after < 1.05 * before or seconds < 10, "a short one sees it warm up"
        assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in server.http.get("/metrics").text


@pytest.mark.parametrize("cases", [1, pytest.param(2300, marks=pytest.mark.long)])
def test_openapi_fuzzing_finds_no_server_error(running, cases):
    """All routes of the OpenAPI, from the document itself; the long form is 10,000 cases."""
    import schemathesis
    from hypothesis import Phase

    document = running.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=running.url)
    found = Counter()
    for operation in schema.get_all_operations():

        @settings(max_examples=cases, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def check(case):
            response = case.call(timeout=60)
            found[response.status_code] += 1
            assert response.status_code < 500
            assert "Traceback" not in response.text
            assert response.status_code < 400 or "error" in response.json()

        check()
    assert found.total() >= (len(document["paths"]) if cases == 1 else 10_000), found
    assert found[200] > 0
    assert running.idle()


# From the command line


@pytest.fixture(scope="module")
def folder(running, tmp_path_factory):
    from smolforge.checkpoint import huggingface

    path = tmp_path_factory.mktemp("served") / "it's mine"
    huggingface.save(running.model, path, running.model.tokenizer)
    return path


def served(folder, *words, key=None):
    """`smolforge serve` as a process, and what it prints when it is ready."""
    environment = {name: value for name, value in os.environ.items() if name != "SMOLFORGE_API_KEY"}
    environment |= {"SMOLFORGE_API_KEY": key} if key else {}
    command = [sys.executable, "-m", "smolforge", "serve", str(folder), "--port", "0", "--device", "cpu", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    while "print(client" not in said:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line
    return process, said


def test_serve_prints_working_examples_and_drains_on_sigterm(folder):
    process, said = served(folder, key=KEY)
    try:
        _, curl, snippet = said.strip().split("\n\n")
        environment = os.environ | {"SMOLFORGE_API_KEY": KEY}
        if shutil.which("curl"):
            found = subprocess.run(["bash", "-c", curl], env=environment, capture_output=True, text=True, check=True)
            assert json.loads(found.stdout)["usage"]["completion_tokens"] > 0, "the text may be empty: it is drawn"
        found = subprocess.run([sys.executable, "-c", snippet], env=environment, capture_output=True, text=True)
        assert (found.returncode, found.stdout[-1:]) == (0, "\n"), found.stderr
    finally:
        process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert KEY not in log
    assert "Hello" not in log
    assert "POST /v1/chat/completions 200" in log


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["--host", "0.0.0.0"], None, "lets other machines in, and there is no key"),
        (["--host", "example.org"], None, "lets other machines in"),
        ([], "short", "eight or more"),
        (["--slots", "0"], None, "--slots is 0; it should be at least 1"),
        (["--port", "99999"], None, "--port is 99999"),
    ],
)
def test_serve_refuses_invalid_settings(words, key, says, folder, monkeypatch, capsys):
    monkeypatch.delenv("SMOLFORGE_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("SMOLFORGE_API_KEY", key)
    assert cli.run(["serve", str(folder), *words]) == 2
    assert says in capsys.readouterr().err


def test_serve_reports_a_port_in_use(running, folder, capsys):
    port = running.url.rpartition(":")[2]
    assert cli.run(["serve", str(folder), "--port", port, "--device", "cpu"]) == 4
    assert "cannot be listened on" in capsys.readouterr().err
