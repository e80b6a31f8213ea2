"""What a model's files say of special tokens: every end of an answer is heard, in every verb and every format."""

import json
import shutil

import pytest
from test_server import Running, events
from test_sft import TUNING, asked, written

from smolforge import load
from smolforge.checkpoint import gguf, huggingface, peft_adapter, training_state
from smolforge.config import Lora
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.quantize import to_quantized
from smolforge.exporters.transformers import to_transformers
from smolforge.generation.stream import generate, stream
from smolforge.models import lora
from smolforge.models.quantized import QuantizationScheme
from smolforge.runs import train
from smolforge.testing import tiny_model
from smolforge.tokenizer.gguf_tokenizer import from_values, to_values

GREEDY = {"temperature": 0, "max_new_tokens": 30}
PROMPT = "the model reads"


def rewrite(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not ...}))


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(hidden_size=64, intermediate_size=96)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return tmp_path / "model"


def ends_of(folder):
    """Two tokens that the model says of itself, and its text up to the first of them."""
    model = load(folder)
    (free,) = generate(model, [PROMPT], **GREEDY)
    first, second = free.token_ids[4], free.token_ids[9]
    stop = min(free.token_ids.index(first), free.token_ids.index(second))
    return [second, first], free.token_ids[: stop + 1], model.tokenizer.decode(free.token_ids[:stop])


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "both"])
def test_any_of_several_end_tokens_ends_an_answer(folder, where):
    (second, first), ids, text = ends_of(folder)
    names = ["generation_config.json", "config.json"] if where == "both" else [where]
    for name, value in zip(names, [first, [second]] if where == "both" else [[0, second, first]], strict=True):
        rewrite(folder / name, eos_token_id=value)
    model = load(folder)
    assert model.tokenizer.eos_id == 0
    assert set(model.tokenizer.eos_ids) == {0, first, second}
    (ended,) = generate(model, [PROMPT], **GREEDY)
    assert (ended.token_ids, ended.text, ended.finish_reason) == (ids, text, "stop")
    chunks = list(stream(model, PROMPT, **GREEDY))
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (text, "stop")


def test_server_hears_every_end_token(folder):
    ends, ids, text = ends_of(folder)
    rewrite(folder / "generation_config.json", eos_token_id=[0, *ends])
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    with Running(model=load(folder)) as server:
        whole = server.post("/v1/completions", **body, logprobs=0).json()
        assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (text, "stop")
        assert whole["usage"]["completion_tokens"] == len(ids)
        streamed = events(server.post("/v1/completions", **body, stream=True))
        assert "".join(event["choices"][0]["text"] for event in streamed) == text
        assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
        ignoring = server.post("/v1/completions", **body, ignore_eos=True, logprobs=0).json()
        assert (ignoring["usage"]["completion_tokens"], ignoring["choices"][0]["finish_reason"]) == (30, "length")
        talk = {"messages": [{"role": "user", "content": "the model"}], "temperature": 0, "max_tokens": 30}
        (free,) = generate(server.model, [talk["messages"]], **GREEDY)
        answer = server.post("/v1/chat/completions", **talk).json()
        assert answer["choices"][0]["message"]["content"] == free.text
        assert answer["choices"][0]["finish_reason"] == free.finish_reason
        chunks = events(server.post("/v1/chat/completions", **talk, stream=True))
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == free.text


@pytest.mark.parametrize("value", ["2", 2.0, [[2]], [0, "2"], 320, [0, -1], True, {"id": 2}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_that_are_none_are_refused(folder, name, value):
    rewrite(folder / name, eos_token_id=value)
    with pytest.raises(InvalidFileError, match=rf"{name}: eos_token_id is .* a token's id, from 0 to 319"):
        load(folder)


def test_missing_or_null_end_tokens_leave_the_tokenizers(folder):
    rewrite(folder / "generation_config.json", eos_token_id=None)
    rewrite(folder / "config.json", eos_token_id=...)
    assert load(folder).tokenizer.eos_ids == (0,)


@pytest.mark.parametrize(
    "kind",
    [
        "gguf",
        "gguf to transformers",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("transformers", "int8")),
    ],
)
def test_exports_write_every_end_token(folder, tmp_path, kind):
    rewrite(folder / "generation_config.json", eos_token_id=[0, 2, 1])
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    if kind == "gguf to transformers":
        to_gguf(folder, tmp_path / "between.gguf", "f32")
        to_transformers(tmp_path / "between.gguf", out)
    elif kind == "gguf":
        to_gguf(folder, out, "f32")
        metadata = gguf.GGUFReader(out).metadata
        assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [0, 2, 1]
    else:
        text = written(tmp_path / "text.txt", {"text": "the model reads a token"})
        eight_bits = QuantizationScheme(8, None, True)
        to_transformers(folder, out) if kind == "transformers" else to_quantized(folder, out, eight_bits, text=text)
    assert load(out).tokenizer.eos_ids == (0, 2, 1)
    if out.is_dir():
        from transformers import GenerationConfig

        assert GenerationConfig.from_pretrained(out).eos_token_id == [0, 2, 1]


def test_gguf_end_tokens_are_read_checked_and_limited():
    tokenizer = tiny_model().tokenizer
    values = to_values(tokenizer, 320)
    assert not {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"} & values.keys()
    read = from_values(values | {"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 7}, "x.gguf")
    assert read.eos_ids == (0, 2, 7)
    for wrong in (400, -1, "2", 2.0, True):
        with pytest.raises(InvalidFileError, match="eot_token_id .* which is no token"):
            from_values(values | {"tokenizer.ggml.eot_token_id": wrong}, "x.gguf")
    with pytest.raises(ConfigError, match="0, 1, 2, 7 all end an answer of this model, and a .gguf names 3"):
        to_values(tokenizer.with_eos_ids([1, 2, 7]), 320)


def test_training_keeps_every_end_token(folder, tmp_path):
    """What a base model ended its texts with still ends an answer once it chats; a run that goes on says the same."""
    rewrite(folder / "generation_config.json", eos_token_id=[0, 5])
    lines = ({"messages": asked(f"say {number}", f"it is {number}")} for number in range(20))
    data = TUNING["data"] | {"sources": [str(written(tmp_path / "talks.jsonl", *lines))]}
    model = load(folder).config.model_dump(exclude_none=True)
    content = TUNING | {"data": data, "model": model, "init_from": str(folder)}
    (tmp_path / "tune.json").write_text(json.dumps(content))
    few = {
        "train.sequence_length": 128,
        "train.batch_tokens": 256,
        "optim.schedule.steps": 4,
        "train.checkpoint_every": 1,
        "train.evaluate_every": None,
    }
    for steps in (1, 2):
        run = train(tmp_path / "tune.json", tmp_path / "run", steps=steps, **few)
        assert run.model.tokenizer.eos_ids == (2, 0, 5)
        shutil.rmtree(folder, ignore_errors=True)  # a run that goes on needs nothing that it began from
        checkpoint = training_state.checkpoint_dir(tmp_path / "run", steps)
        for name in ("generation_config.json", "config.json"):
            assert json.loads((checkpoint / name).read_text())["eos_token_id"] == [2, 0, 5]
        assert load(tmp_path / "run").tokenizer.eos_ids == (2, 0, 5)


def test_adapters_keep_the_end_tokens_of_their_base(folder, tmp_path):
    rewrite(folder / "generation_config.json", eos_token_id=[0, 5])
    adapter = tmp_path / "adapter"
    model, settings = load(folder), Lora(rank=2)
    lora.add_lora(model, settings, 0)
    peft_adapter.write_adapter(adapter, peft_adapter.adapter_config(settings, str(folder)), lora.lora_parameters(model))
    assert load(adapter).tokenizer.eos_ids == (0, 5)
    model.tokenizer.save(adapter)
    rewrite(adapter / "tokenizer_config.json", eos_token="<|im_end|>")
    assert load(adapter).tokenizer.eos_ids == (2, 0, 5)
