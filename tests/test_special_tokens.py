"""What a model's files say of special tokens: all ends of an answer are heard, and BOS is where Transformers has it."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_chat_template import READING
from test_server import Running, events
from test_sft import TUNING, asked, written
from tokenizers import processors

from smolforge import load
from smolforge.checkpoint import gguf, huggingface, peft_adapter, training_state
from smolforge.config import Data, Lora
from smolforge.data.corpus import HELD_OUT, TRAIN
from smolforge.data.prepare.build import prepare
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.multiple_choice import Item, encode_choices
from smolforge.evaluation.perplexity import measure_text
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.quantize import to_quantized
from smolforge.exporters.transformers import to_transformers
from smolforge.generation.stream import generate, generate_tokens, stream
from smolforge.models import lora
from smolforge.models.quantized import QuantizationScheme
from smolforge.runs import train
from smolforge.testing import tiny_model, tiny_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat import CHATML
from smolforge.tokenizer.gguf_tokenizer import from_values, to_values
from smolforge.verification import HARD_CONVERSATIONS, HARD_TEXTS, checks
from smolforge.verification.checks import GREEDY_SAMPLER

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


# A token before every text


def bos_model(style: str = "llama 3", **shape):
    """A tiny model whose tokenizer adds BOS as published ones do, in its tokenizer.json."""
    model = tiny_model(**shape)
    model.tokenizer = bos_tokenizer(style, model.tokenizer)
    return model


def bos_tokenizer(style: str, plain: Tokenizer | None = None) -> Tokenizer:
    plain = (plain or tiny_tokenizer()).with_special_tokens(["<s>"])
    number = plain.backend.token_to_id("<s>")
    template = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", number)])
    steps = {
        "llama 2": template,
        "llama 3": processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        "qwen 2": processors.ByteLevel(trim_offsets=False),
        "none": None,
    }
    if steps[style] is not None:
        plain.backend.post_processor = steps[style]
    return Tokenizer(plain.backend, plain.settings | {"bos_token": "<s>"})


def transformers_ids(folder, texts, **words):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    return [theirs(text, **words)["input_ids"] for text in texts]


@pytest.mark.parametrize("add_bos_token", [..., True, False])
@pytest.mark.parametrize("style", ["llama 2", "llama 3", "qwen 2", "none"])
def test_prompt_ids_equal_transformers(tmp_path, style, add_bos_token):
    """What tokenizer.json says; Transformers reads no add_bos_token beside it, which our files then say alike."""
    bos_tokenizer(style).save(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", add_bos_token=add_bos_token)
    ours, texts = Tokenizer.load(tmp_path), [text for text in HARD_TEXTS if text]
    assert [ours.encode_prompt(text) for text in texts] == transformers_ids(tmp_path, texts)
    assert ours.encode("a") == transformers_ids(tmp_path, ["a"], add_special_tokens=False)[0]
    assert bool(ours.bos_ids) == style.startswith("llama")
    assert ours.encode_prompt("") == transformers_ids(tmp_path, [""])[0]
    ours.save(tmp_path / "again")
    said = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert said.get("add_bos_token", ...) == (... if add_bos_token is ... else bool(ours.bos_ids))
    assert [ours.encode_prompt(text) for text in texts] == transformers_ids(tmp_path / "again", texts)


def test_prompt_ids_of_smollm2_equal_transformers(shared, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "smollm2-tokenizer" / name, tmp_path / name)
    plain = Tokenizer.load(tmp_path)  # its own class, GPT2Tokenizer, splits digits otherwise in Transformers 5
    for ours in (plain, bos_tokenizer("llama 2", plain)):
        ours.save(tmp_path / "saved")
        assert [ours.encode_prompt(text) for text in HARD_TEXTS] == transformers_ids(tmp_path / "saved", HARD_TEXTS)
    assert plain.bos_ids == []


def test_bos_is_not_added_twice_or_inside():
    ours = bos_tokenizer("llama 3")
    bos = ours.bos_ids[0]
    assert ours.encode_prompt("<s>a", parse_special=True) == [bos, *ours.encode("a")]
    assert ours.encode_prompt("a<s>", parse_special=True) == [bos, *ours.encode("a"), bos]
    assert ours.encode_prompt("<s>a") == [bos, *ours.encode("<s>a")]
    assert ours.encode("<s>a").count(bos) == 0


@pytest.mark.parametrize("source", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_chats_have_the_bos_that_the_template_writes(source, tmp_path):
    from transformers import AutoTokenizer

    plain = bos_tokenizer("llama 3")
    ours = Tokenizer(plain.backend, plain.settings | {"chat_template": source})
    ours.save(tmp_path)
    messages = [{"role": "user", "content": "the model"}]
    ids = ours.chat(messages)
    assert ids == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, return_dict=False)
    assert ids.count(ours.bos_ids[0]) == source.count("bos_token")
    assert ours.encode_prompt(ours.render_chat(messages), parse_special=True) == ours.add_bos(ids)


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (processors.TemplateProcessing("$A <s>", "$A $B", [("<s>", 1)]), "TemplateProcessing.* adds more to a text"),
        (processors.TemplateProcessing("<s> $A <s>", "$A $B", [("<s>", 1)]), "adds more to a text than one token"),
        (processors.TemplateProcessing("<s> <s> $A", "$A $B", [("<s>", 1)]), "adds 2 tokens before a text"),
        (processors.BertProcessing(("<s>", 1), ("<s>", 1)), "BertProcessing.* adds more"),
        (processors.RobertaProcessing(("<s>", 1), ("<s>", 1)), "RobertaProcessing.* adds more"),
        (processors.Sequence([processors.BertProcessing(("<s>", 1), ("<s>", 1))]), "BertProcessing.* adds more"),
    ],
)
def test_post_processors_that_add_other_tokens_are_refused(processor, says):
    plain = tiny_tokenizer()
    plain.backend.post_processor = processor
    with pytest.raises(InvalidFileError, match=says):
        Tokenizer(plain.backend, plain.settings)


def test_generate_and_server_put_bos_before_texts(tmp_path):
    model = bos_model()
    bos, text = model.tokenizer.bos_ids, model.tokenizer.encode(PROMPT)
    expected = [token.id for token in generate_tokens(model, [bos + text], GREEDY_SAMPLER, max_new_tokens=8)]
    (found,) = generate(model, [PROMPT], temperature=0, max_new_tokens=8)
    assert list(found.token_ids) == expected
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 0, "echo": True}
    with Running(model=model) as server:
        whole = server.post("/v1/completions", **body).json()
        tokens = whole["choices"][0]["logprobs"]
        assert whole["usage"]["prompt_tokens"] == 1 + len(text)
        assert whole["choices"][0]["text"] == PROMPT + found.text
        assert tokens["text_offset"][:2] == [0, 0] and tokens["tokens"][0] == "<s>"
        words = zip(tokens["tokens"], tokens["text_offset"], strict=True)
        assert all(PROMPT.startswith(word, place) for word, place in list(words)[1 : len(text) + 1])
        without = server.post("/v1/completions", **body, add_special_tokens=False).json()
        assert without["usage"]["prompt_tokens"] == len(text)
        as_ids = server.post("/v1/completions", **body | {"prompt": bos + text}).json()["choices"][0]
        assert as_ids["text"] == f"<s>{PROMPT}{found.text}"
        assert as_ids["logprobs"]["token_logprobs"][1:] == pytest.approx(tokens["token_logprobs"][1:], abs=1e-4)
        assert server.post("/tokenize", prompt=PROMPT).json()["tokens"] == bos + text
        assert server.post("/tokenize", prompt=PROMPT, add_special_tokens=False).json()["tokens"] == text
        empty = server.post("/v1/completions", **body | {"prompt": ""}).json()
        assert empty["usage"]["prompt_tokens"] == 1


def test_corpora_have_bos_before_each_document(tmp_path):
    """As torchtitan and Meta train: BOS, text, end. Corpora of tokenizers without are what they were, to the byte."""
    texts = [f"document {number} of the model\n" * (1 + number) for number in range(30)]
    source = written(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    ours = bos_tokenizer("llama 2")
    data = Data(sources=[str(source)], held_out=0.2)
    corpus = prepare(data, tmp_path / "corpus", ours)
    bos, eos = corpus.metadata["bos_id"], corpus.metadata["eos_id"]
    assert (bos, eos) == (ours.bos_ids[0], 0)
    found = {TRAIN: [], HELD_OUT: []}
    for split, documents in found.items():
        ids, stops = corpus.tokens(split)[:], corpus.ends(split)
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            assert (ids[start], ids[stop - 1]) == (bos, eos)
            documents.append(ours.decode(ids[start + 1 : stop - 1].tolist()))
        assert corpus.size(split)["bytes"] == sum(map(len, documents))
        assert corpus.text(split) == "".join(documents)
        assert "".join(text for text, _, _ in corpus.texts(split, at_once=7)) == corpus.text(split)
    assert sorted(found[TRAIN] + found[HELD_OUT]) == sorted(texts)
    (tmp_path / "one.txt").write_text("".join(f"line {number} of the model\n" for number in range(2000)))
    cut = prepare(Data(sources=[str(tmp_path / "one.txt")], held_out=0.2), tmp_path / "cut", ours)
    for split in (TRAIN, HELD_OUT):  # a document that is cut in two is one in each
        assert np.flatnonzero(cut.tokens(split)[:] == bos).tolist() == [0]
    plain = prepare(data, tmp_path / "plain", bos_tokenizer("none"))
    assert "bos_id" not in plain.metadata and "bos" not in plain.metadata["request"]
    assert plain.fingerprint != corpus.fingerprint
    limited = prepare(data, tmp_path / "limited", ours, max_tokens=200)
    ids = limited.tokens(TRAIN)[:]
    assert (ids == bos).sum() == (ids == eos).sum() == limited.size(TRAIN)["documents"]
    assert limited.size(TRAIN)["bytes"] == len(limited.text(TRAIN).encode())


def test_evaluation_reads_texts_behind_bos():
    model = bos_model()
    bos = model.tokenizer.bos_ids[0]
    with torch.inference_mode():
        text = model.tokenizer.encode(PROMPT)
        logprobs = model(torch.tensor([[bos, *text]]))[0].log_softmax(-1)
    expected = -sum(logprobs[place, token].item() for place, token in enumerate(text)) / len(text)
    assert measure_text(model, PROMPT, 64)["loss"] == pytest.approx(expected, abs=1e-5)
    item = Item("1", ("the model",), (" reads a token", "x"), 0)
    (context, continuation), _ = encode_choices(model.tokenizer, item.pairs())
    assert context == [bos, *model.tokenizer.encode("the model")]
    assert context + continuation == [bos, *model.tokenizer.encode("the model reads a token")]
    assert encode_choices(model.tokenizer, [("", "x")]) == [([bos], model.tokenizer.encode("x"))]


@pytest.mark.parametrize("style", ["llama 2", "qwen 2"])
def test_gguf_says_whether_bos_is_added(tmp_path, style):
    model = bos_model(style, vocab_size=321)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    to_gguf(tmp_path / "model", tmp_path / "out.gguf", "f32")
    adds = style == "llama 2"
    assert gguf.GGUFReader(tmp_path / "out.gguf").metadata["tokenizer.ggml.add_bos_token"] is adds
    read = load(tmp_path / "out.gguf").tokenizer
    assert read.encode_prompt(PROMPT) == model.tokenizer.encode_prompt(PROMPT)
    read.save(tmp_path / "again")
    assert [read.encode_prompt(text) for text in HARD_TEXTS] == transformers_ids(tmp_path / "again", HARD_TEXTS)
    values = to_values(model.tokenizer, 321)
    for wrong, says in (("add_eos_token", "no text could go on"), ("add_sep_token", "no text could go on")):
        with pytest.raises(InvalidFileError, match=says):
            from_values(values | {f"tokenizer.ggml.{wrong}": True}, "x.gguf")
    with pytest.raises(InvalidFileError, match="add_bos_token yes; add_bos_token may be true or false"):
        from_values(values | {"tokenizer.ggml.add_bos_token": "yes"}, "x.gguf")
    del values["tokenizer.ggml.bos_token_id"]
    if adds:
        with pytest.raises(InvalidFileError, match="bos_token_id None, which is no token"):
            from_values(values, "x.gguf")


def test_gguf_refuses_a_bos_that_is_not_named(tmp_path):
    """llama.cpp adds the token of bos_token_id, whatever tokenizer.json has."""
    model = bos_model("llama 2", vocab_size=321)
    model.tokenizer = Tokenizer(model.tokenizer.backend, model.tokenizer.settings | {"bos_token": "<|im_start|>"})
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    with pytest.raises(InvalidFileError, match="a .gguf cannot say what this tokenizer does"):
        to_gguf(tmp_path / "model", tmp_path / "out.gguf", "f32")


# Special tokens that a text spells, where they are meant


def test_parse_special_gives_the_ids_of_the_chat():
    model = tiny_model()
    messages = [{"role": "user", "content": "the model"}]
    with Running(model=model) as server:
        text, ids = model.tokenizer.render_chat(messages), model.tokenizer.chat(messages)
        asked_ids = server.post("/tokenize", messages=messages).json()["tokens"]
        assert server.post("/tokenize", prompt=text, parse_special=True).json()["tokens"] == ids == asked_ids
        assert server.post("/tokenize", prompt=text).json()["tokens"] == model.tokenizer.encode(text) != ids
        body = {"temperature": 0, "max_tokens": 4, "logprobs": 0, "echo": True}
        whole = server.post("/v1/completions", prompt=text, parse_special=True, **body).json()
        as_ids = server.post("/v1/completions", prompt=ids, **body).json()
        assert whole["usage"] == as_ids["usage"]
        for key in ("tokens", "text_offset"):
            assert whole["choices"][0]["logprobs"][key] == as_ids["choices"][0]["logprobs"][key]
        scores = [answer["choices"][0]["logprobs"]["token_logprobs"][1:] for answer in (whole, as_ids)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        talk = server.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=4).json()
        assert whole["usage"] == talk["usage"]
        assert whole["choices"][0]["text"] == text + talk["choices"][0]["message"]["content"]
        plain = server.post("/v1/completions", prompt=text, **body).json()
        assert plain["usage"]["prompt_tokens"] == len(model.tokenizer.encode(text))
        assert server.post("/v1/completions", prompt=text, parse_special="yes").status_code == 400
    with Running(model=model, parse_special=True) as server:
        assert server.post("/tokenize", prompt=text).json()["tokens"] == ids
        assert server.post("/tokenize", prompt=text, parse_special=False).json()["tokens"] != ids
        assert server.post("/v1/completions", prompt=text, **body).json()["usage"] == whole["usage"]


# verify


@pytest.mark.parametrize(
    "template", [CHATML, READING, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_verify_compares_ids_and_templates_with_transformers(tmp_path, template):
    plain = bos_tokenizer("llama 3")
    ours = Tokenizer(plain.backend, plain.settings | {"chat_template": template})
    ours.save(tmp_path)
    assert checks.check_tokenizer(ours, tmp_path, HARD_TEXTS).holds
    check = checks.check_template(ours, tmp_path, HARD_CONVERSATIONS)
    assert check.holds and ("refuses 1" in check.message) == (template == CHATML)
    without_bos = Tokenizer(bos_tokenizer("none").backend, ours.settings)
    assert not checks.check_tokenizer(without_bos, tmp_path, HARD_TEXTS).holds
    other = Tokenizer(plain.backend, ours.settings | {"chat_template": template.replace("content", "role")})
    assert not checks.check_template(other, tmp_path, HARD_CONVERSATIONS).holds
    strict = Tokenizer(plain.backend, ours.settings | {"chat_template": "{{ raise_exception('no') }}"})
    assert not checks.check_template(strict, tmp_path, HARD_CONVERSATIONS).holds
