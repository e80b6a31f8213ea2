"""Chat tuning: what is learned of a conversation, to the token; whole conversations in rows; a model that answers."""

import json
import re
import shlex
import shutil
import tempfile
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import atomic, cli
from smolforge.checkpoint import huggingface, loading, training_state
from smolforge.config import Data
from smolforge.config.load import read_recipe
from smolforge.data.batches import IGNORE_INDEX, iterate_batches
from smolforge.data.corpus import HELD_OUT, TRAIN, Corpus
from smolforge.data.packing import PackedRows, best_fit
from smolforge.data.prepare.build import ShardWriter, prepare
from smolforge.data.prepare.tokenize_documents import EncodedDocument
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation import measure_corpus
from smolforge.generation.stream import generate
from smolforge.runs import train
from smolforge.runs.resolve import resolve_recipe
from smolforge.testing import tiny_model, tiny_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat import CHATML
from smolforge.tokenizer.chat_encoding import chat_tokenizer, encode_turns
from smolforge.training.loop import forward_backward
from smolforge.training.objective import Objective
from smolforge.training.run_folder import read_records

PLAIN = tiny_tokenizer()
TALKING = chat_tokenizer(PLAIN)
START, END = (PLAIN.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MARKED = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}"""
"""SmolLM2's, with the marks by which Transformers and TRL know what an assistant said."""
STRIPPING = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(question: str, answer: str, *more: str) -> list[dict[str, str]]:
    roles = [("user", "assistant")[place % 2] for place in range(2 + len(more))]
    return [turn(role, content) for role, content in zip(roles, (question, answer, *more), strict=True)]


def with_template(source: str) -> Tokenizer:
    return chat_tokenizer(Tokenizer(PLAIN.backend, {**PLAIN.settings, "chat_template": source}))


def encoded(tokenizer: Tokenizer, messages, first: int = 0):
    (found,) = encode_turns(tokenizer, [tokenizer.template.render_turns(messages, first)])
    return found


def written(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def chats(number: int) -> list[dict]:
    """Different conversations of several lengths, that begin with a system message."""
    words = ["the", "model", "reads", "a", "token", "and", "learns", "what", "follows"]
    made = []
    for place in range(number):
        turns = [words[(place + step) % len(words)] * (1 + (place * step) % 3) for step in range(2 * (1 + place % 3))]
        made.append({"messages": [turn("system", str(place)), *asked(*turns)]})
    return made


def chat_corpus(folder: Path, source: Path, **data) -> Corpus:
    return prepare(Data(sources=(str(source),), format="chat", **data), folder, PLAIN)


# What is learned


def by_hand(messages, first: int = 0, strip: bool = False) -> tuple[list[int], list[bool]]:
    """ChatML, piece by piece: slow, and plain to see."""
    encode = PLAIN.encode
    ids, learned, end = [], [], 0
    if messages[0]["role"] != "system" and not strip:
        ids = [START, *encode("system\n" + SYSTEM), END, *encode("\n")]
        learned = [False] * len(ids)
    for place, message in enumerate(messages):
        content = message["content"].strip() if strip else message["content"]
        if message["role"] == "assistant" and place >= max(first, 1):
            head, said = [START, *encode("assistant\n")], [*encode(content), END]
        else:
            head, said = [START, *encode(message["role"] + "\n" + content), END], []
        tail = [] if strip else encode("\n")
        ids += head + said + tail
        learned += [False] * len(head) + [True] * len(said) + [False] * len(tail)
        end = len(ids) if said else end
    return ids[:end], learned[:end]


PIECES = [
    "",
    "Hello",
    " ",
    "\n",
    "\n\n",
    "foo",
    "12 345",
    "  7",
    "naïve",
    "👩‍👩‍👧",
    "\t",
    "\r\n",
    "<",
    "|>",
    "im_end",
    "\x1c",
]
PIECES += [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "<|im_",
    "e\u0301",
    "assistant",
    "\ue000",
    "\U000f0001",
]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.text(max_size=12)
TALK = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), CONTENT), min_size=1, max_size=6)


@settings(max_examples=150)
@given(TALK, st.none() | CONTENT, st.integers(0, 4), st.booleans())
def test_loss_mask_is_exact_for_hard_conversations(talk, system, first, strip):
    try:
        json.dumps(talk, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    messages = [turn("system", system)] * (system is not None) + [turn(*each) for each in talk]
    tokenizer = with_template(STRIPPING) if strip else TALKING
    ids, learned = encoded(tokenizer, messages, first)
    assert (ids, learned) == by_hand(messages, first, strip)
    special = [each for each in ids if each in (0, START, END)]
    assert special == [START, END] * (len(special) // 2)  # nobody's words became one


def test_training_ids_equal_the_chat_prompts():
    """Before each turn stands the very prompt that will ask for it."""
    messages = [turn("system", "s"), *asked("a", "b\n", " c <|im_end|>", "", "d", "e")]
    ids, learned = encoded(TALKING, messages)
    assert ids == TALKING.chat(messages, add_generation_prompt=False)
    for place in (2, 4, 6):
        prompt = TALKING.chat(messages[:place])
        assert ids[: len(prompt)] == prompt
        assert learned[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    assert sum(learned) == len(TALKING.encode("b\n")) + len(TALKING.encode("e")) + 3  # and three ends of turn


def test_chat_template_equals_smollm2_instruct(shared):
    real = Tokenizer.load(shared / "smollm2-tokenizer")
    ours = chat_tokenizer(real)
    official = (shared / "smollm2-tokenizer" / "chat_template_instruct.jinja").read_text()
    theirs = Tokenizer(real.backend, {**real.settings, "chat_template": official})
    for messages in (asked("a", "b\n"), [turn("system", "s"), *asked(" a ", "")], [turn("assistant", "\n")]):
        for prompt in (False, True):
            assert ours.render_chat(messages, prompt) == theirs.render_chat(messages, prompt)
            assert ours.chat(messages, prompt) == theirs.chat(messages, prompt)
    told = json.loads((shared / "smollm2-tokenizer" / "generation_config_Instruct.json").read_text())
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == tuple(told[f"{name}_token_id"] for name in ("bos", "eos", "pad"))


def test_custom_chat_template_sets_the_end_of_turn_token():
    tokenizer = PLAIN.with_special_tokens(["<|eot|>"])
    source = CHATML.replace("<|im_end|>", "<|eot|>")
    made = chat_tokenizer(Tokenizer(tokenizer.backend, {**tokenizer.settings, "chat_template": source}))
    assert made.eos_token == "<|eot|>"
    assert encoded(made, asked("a", "b")).ids[-2] == made.eos_id


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (CHATML.replace("<|im_end|>", "###"), "does not end every assistant's turn with the same special token"),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + (m.content if loop.last else '') + '<|im_end|>' }}"
            "{% endfor %}{{ '<|im_start|>assistant' if add_generation_prompt }}",
            r"template \(.*\) writes what is before message 2 differently once that is there",
        ),
    ],
)
def test_chat_template_without_stable_turns_is_refused(source, said):
    with pytest.raises(InvalidFileError, match=said):
        encoded(with_template(source), asked("a", "b", "c", "d"))


def test_chat_tokenizer_names_missing_special_tokens(tmp_path):
    settings = {**PLAIN.settings, "eos_token": "a", "bos_token": None, "unk_token": None}
    bare = Tokenizer(PLAIN.backend, settings)
    bare.special.by_text.clear()
    with pytest.raises(ConfigError, match=r"no <\|im_start\|> and no <\|im_end\|>.*--special-tokens"):
        chat_tokenizer(bare)


# Files


def test_chat_corpus_accepts_every_conversation_form(tmp_path):
    history = [*asked("p", "not learned"), turn("user", "q")]
    source = written(
        tmp_path / "chats.jsonl",
        {"messages": [turn("system", "s"), *asked("a", "b", "left out: nobody answers", "")][:4], "source": "x"},
        {"prompt": "question", "completion": "answer"},
        {"prompt": history, "completion": [turn("assistant", "learned")]},
        {"prompt": "question", "completion": "answer"},
        {"messages": [turn("system", "only")]},
        {"messages": [turn("user", "unanswered")]},
    )
    corpus = chat_corpus(tmp_path / "corpus", source, held_out=0)
    wanted = [
        by_hand([turn("system", "s"), *asked("a", "b")]),
        by_hand(asked("question", "answer")),
        by_hand([*history, turn("assistant", "learned")], first=3),
    ]
    assert corpus.tokens(TRAIN)[:].tolist() == [each for ids, _ in wanted for each in ids]
    assert corpus.learned(TRAIN)[:].tolist() == [each for _, learned in wanted for each in learned]
    assert corpus.ends(TRAIN).tolist() == np.cumsum([len(ids) for ids, _ in wanted]).tolist()
    assert (tmp_path / "corpus" / "train" / "00000.ds.loss").stat().st_size == len(corpus.tokens(TRAIN))
    assert corpus.metadata["dropped"] == {"repeated": 1, "unanswered": 2}
    size = corpus.size(TRAIN)
    assert size["learned_tokens"] == sum(sum(learned) for _, learned in wanted)
    assert size["learned_bytes"] == len("b") + len("answer") + len("learned")
    corpus.check()
    assert chat_corpus(tmp_path / "corpus", source, held_out=0).fingerprint == corpus.fingerprint


def test_tool_calls_need_no_content(tmp_path):
    """As OpenAI's clients write it, with null for what is said; learned is what the template makes of it."""
    calls = "(message.content or '') + ((message.tool_calls | tojson) if message.tool_calls else '')"
    tokenizer = with_template(CHATML.replace("message['content']", calls))
    talk = [turn("user", "a"), {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]
    source = written(tmp_path / "x.jsonl", {"messages": talk})
    corpus = prepare(Data(sources=(str(source),), format="chat", held_out=0), tmp_path / "corpus", tokenizer)
    learned = corpus.tokens(TRAIN)[:][corpus.learned(TRAIN)[:] == 1].tolist()
    assert corpus.tokenizer().decode(learned) == '[{"type": "function"}]<|im_end|>'


def test_chat_corpus_detects_a_changed_mask_or_template(tmp_path):
    source = written(tmp_path / "chats.jsonl", *chats(30))
    corpus = chat_corpus(tmp_path / "corpus", source)
    file = tmp_path / "corpus" / "train" / "00000.ds.loss"
    mask = bytearray(file.read_bytes())
    file.write_bytes(bytes([1 - mask[0]]) + mask[1:])
    with pytest.raises(InvalidFileError, match="are damaged"):
        corpus.check()
    file.write_bytes(mask[1:])
    with pytest.raises(InvalidFileError, match="bytes of what is learned"):
        Corpus.open(tmp_path / "corpus")
    with pytest.raises(ConfigError, match="made with other settings"):
        file.write_bytes(mask)
        prepare(Data(sources=(str(source),), format="chat"), tmp_path / "corpus", with_template(STRIPPING))


def test_validation_split_keeps_few_conversations_whole(tmp_path):
    corpus = chat_corpus(tmp_path / "corpus", written(tmp_path / "few.jsonl", *chats(5)), held_out=0.2)
    found = [corpus.size(split)["documents"] for split in (TRAIN, HELD_OUT)]
    assert sum(found) == 5 and found[1] >= 1
    for split in (TRAIN, HELD_OUT):
        assert corpus.learned(split)[:][-2:].tolist() == [1, 0]


TALKS = {"messages": asked("a", "b")}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"messages": "hi"}, "line 2 has a text as its messages; it should be a list of"),
        ({"messages": []}, "line 2 has no message in it"),
        ({"messages": ["hi"]}, "line 2: message 1 is a text, not"),
        ({"messages": [{"content": "a"}]}, "line 2: message 1 has no role"),
        ({"messages": [turn("user", "a"), {"role": "assistant"}]}, "line 2: message 2 has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "line 2: the content of message 1 is a number"),
        ({"messages": [{"role": "user", "content": [1]}]}, "line 2: the content of message 1 is a list"),
        ({"messages": [turn("robot", "a")]}, "line 2: message 1 has the role 'robot'; it should be one of system"),
        ({"messages": [turn("system", "a")] * 2}, "line 2: message 2 is a system message; there may be one"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "") | {"tool_calls": [{"type": "function"}]}]},
            "line 2: an assistant's message has tool_calls, which the chat template does not write",
        ),
        ({"prompt": 5, "completion": "a"}, "line 2 has a number as its prompt"),
        ({"prompt": "a"}, "line 2 is no conversation: it has neither messages nor a prompt and a completion"),
        ({"text": "a"}, "line 2 is no conversation.*--data.format text reads plain text"),
        ([1], "line 2 is no conversation"),
        ({"messages": [turn("user", "\ud800")]}, "line 2 has half of a surrogate pair"),
        ({"messages": [turn("user", "a" * (1 << 20)), turn("assistant", "b")]}, "line 2: the messages have 1,048,"),
    ],
)
def test_chat_corpus_names_bad_conversations_by_line(tmp_path, bad, said):
    with pytest.raises(InvalidFileError, match=said):
        chat_corpus(tmp_path / "corpus", written(tmp_path / "x.jsonl", TALKS, bad))
    assert not (tmp_path / "corpus").exists()


def test_data_format_mismatch_is_reported(tmp_path):
    source = written(tmp_path / "x.jsonl", TALKS)
    with pytest.raises(InvalidFileError, match=r"line 1 .* it is a conversation, which --data\.format chat reads"):
        prepare(Data(sources=(str(source),)), tmp_path / "corpus", PLAIN)
    for other in ("python-docs", str(tmp_path / "a.txt")):
        (tmp_path / "a.txt").write_text("a")
        with pytest.raises(InvalidFileError, match="there are no conversations in"):
            prepare(Data(sources=(other,), format="chat"), tmp_path / "corpus", PLAIN)
    with pytest.raises(InvalidFileError, match="no conversation in which an assistant answers"):
        chat_corpus(tmp_path / "corpus", written(tmp_path / "y.jsonl", {"messages": [turn("user", "a")]}))
    refusing = with_template("{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + STRIPPING)
    long = written(tmp_path / "z.jsonl", TALKS, {"messages": asked("a", "b", "c", "d")})
    with pytest.raises(InvalidFileError, match="z.jsonl, line 2: the chat template says: too long"):
        prepare(Data(sources=(str(long),), format="chat"), tmp_path / "corpus", refusing)


# Rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 60))
def test_best_fit_takes_the_fullest_row_with_room(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    room: list[int] = []
    for row, length in zip(best_fit(np.array(lengths), capacity).tolist(), lengths, strict=True):
        fitting = [each for each in room if each >= length]
        if row == len(room):
            assert not fitting
            room.append(capacity)
        else:
            assert room[row] == min(fitting)
        room[row] -= length
    assert min(room) >= 0


def made_corpus(folder: Path, conversations) -> Corpus:
    """Of (prompt, answer) lengths, with an id of its own for each token."""
    writer, number = ShardWriter(folder / TRAIN, PLAIN, 4), count(1000)
    for turns in conversations:
        learned = [flag for asked, said in turns for flag in [False] * asked + [True] * said + [False]]
        writer.add(EncodedDocument([next(number) for _ in learned], 1, learned=learned))
    writer.close()
    sizes = {TRAIN: writer.size, HELD_OUT: dict.fromkeys(writer.size, 0)}
    return Corpus(folder, {"fingerprint": "", "token_bytes": 4, "eos_id": 7, "format": "chat", "splits": sizes})


LENGTHS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), min_size=1, max_size=12
)


@settings(max_examples=60)
@given(LENGTHS, st.integers(11, 40), st.integers(0, 2**40))
def test_packed_rows_have_each_conversation_once_per_epoch(conversations, length, seed):
    with tempfile.TemporaryDirectory() as folder:
        corpus = made_corpus(Path(folder), conversations)
        rows = PackedRows(corpus, TRAIN, length, seed=seed)
        first, second = (rows.batch(epoch, rows.count) for epoch in (0, 1))
        tokens, learned, ends = corpus.tokens(TRAIN)[:], corpus.learned(TRAIN)[:], corpus.ends(TRAIN)
        wanted = []
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            if stop - start > length:  # the last whole turn that fits
                fitting = [end for end in range(start + 1, start + length + 1) if learned[end - 1] and not learned[end]]
                stop = max(fitting, default=start + length if learned[start : start + length].any() else start)
            wanted += [tokens[start:stop].tolist()] if stop > start else []
        for batch in (first, second):
            found = []
            for ids, labels, positions in zip(*(side.numpy() for side in batch[:3]), strict=True):
                for part in np.split(np.arange(length), np.flatnonzero(positions == 0)[1:]):
                    assert positions[part].tolist() == list(range(len(part)))
                    if ids[part[0]] == 7:  # filled up
                        assert (
                            (ids[part] == 7).all() and (labels[part] == IGNORE_INDEX).all() and part[-1] == length - 1
                        )
                        continue
                    found.append(ids[part].tolist())
                    after = [*ids[part][1:], IGNORE_INDEX]
                    flags = [*learned[ids[part][1:] - 1000], 0]
                    assert labels[part].tolist() == [
                        each if flag else IGNORE_INDEX for each, flag in zip(after, flags, strict=True)
                    ]
            assert sorted(found) == sorted(wanted)
        assert rows.num_truncated + rows.num_dropped == sum(
            end - start > length for start, end in zip([0, *ends[:-1]], ends, strict=True)
        )


def test_packed_rows_do_not_depend_on_workers_or_ranks(tmp_path):
    corpus = made_corpus(tmp_path, [[(3, 2 + n % 7)] for n in range(90)])
    rows = PackedRows(corpus, TRAIN, 24, seed=5)
    whole = [batch.input_ids for batch in islice(iterate_batches(rows, count(), 4, num_workers=0), 12)]
    ahead = [batch.input_ids for batch in islice(iterate_batches(rows, count(), 4, num_workers=3), 12)]
    shares = [
        [batch.input_ids for batch in islice(iterate_batches(rows, count(), 4, num_workers=1, share=part), 12)]
        for part in (range(1), range(1, 4))
    ]
    assert all(torch.equal(one, other) for one, other in zip(whole, ahead, strict=True))
    assert all(torch.equal(one, torch.cat(parts)) for one, *parts in zip(whole, *shares, strict=True))
    assert not torch.equal(rows.batch(0, rows.count).input_ids, rows.batch(1, rows.count).input_ids)
    assert not torch.equal(rows.batch(0, 4).input_ids, PackedRows(corpus, TRAIN, 24, seed=6).batch(0, 4).input_ids)
    assert rows.padding == pytest.approx((rows.batch(0, rows.count).input_ids == 7).double().mean().item())


def test_best_fit_fills_over_99_percent_of_tokens():
    drawn = np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int) + 20
    for capacity in (1024, 8192):
        lengths = np.sort(np.minimum(drawn, capacity))[::-1]
        assert lengths.sum() / ((best_fit(lengths, capacity).max() + 1) * capacity) > 0.99


def test_packed_rows_refuse_answers_beyond_the_row(tmp_path):
    with pytest.raises(InvalidFileError, match=r"no conversation whose first answer begins within a row .* \(8\)"):
        PackedRows(made_corpus(tmp_path, [[(20, 2)]]), TRAIN, 8, seed=0)


# Loss


def test_sft_loss_and_gradients_equal_trl(tmp_path):
    """On the same conversations and weights: its collator, Transformers' model and mask, a conversation a row."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = tiny_model(max_position_embeddings=256).train()
    conversations = [*(each["messages"] for each in chats(8)), asked("Hello", "naïve 12")]
    corpus = chat_corpus(
        tmp_path / "c", written(tmp_path / "x.jsonl", *({"messages": m} for m in conversations)), held_out=0
    )
    rows = PackedRows(corpus, TRAIN, 192, seed=0)
    batch = rows.batch(0, rows.count)
    assert rows.count < len(conversations) - 2
    labels = int((batch.labels != IGNORE_INDEX).sum())
    loss = forward_backward(Objective(model), batch, labels, rows=1)["loss"]

    TALKING.save(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    examples = []
    for messages in conversations:
        found = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        masked = [
            each if flag else -100 for each, flag in zip(found["input_ids"], found["assistant_masks"], strict=True)
        ]
        examples.append({"input_ids": found["input_ids"], "labels": masked})
    theirs = LlamaForCausalLM(LlamaConfig(**model.config.model_dump(exclude={"model_type"})))
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    told = theirs(**DataCollatorForLanguageModeling(pad_token_id=TALKING.pad_id)(examples))
    told.loss.backward()
    assert loss.item() == pytest.approx(told.loss.item(), rel=1e-5)
    for name, weight in theirs.named_parameters():
        ours = model.get_parameter(name).grad
        assert torch.allclose(ours, weight.grad, rtol=1e-5, atol=1e-5 * weight.grad.abs().max().item()), name


def test_sft_loss_does_not_depend_on_micro_batch_size(tmp_path):
    rows = PackedRows(made_corpus(tmp_path, [[(3, 20)], [(20, 1)], [(9, 9)], [(2, 2)]]), TRAIN, 24, seed=0)
    batch = rows.batch(0, rows.count).map(lambda side: side.where(side < 0, side % 320))
    labels, gradients = int((batch.labels != IGNORE_INDEX).sum()), []
    for size in (rows.count, 1):
        model = tiny_model().train()
        forward_backward(Objective(model), batch, labels, rows=size)
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


# Runs


ANSWERS = {"ping": "pong", "the sky": "blue", "two": "2", "": "what?"}
TUNING = NANO | {
    "data": {"format": "chat", "held_out": 0.0},
    "optim": {"learning_rate": 2e-2, "schedule": {"warmup_steps": 0.1, "decay": "cosine"}},
    "train": NANO["train"] | {"steps": 60, "sequence_length": 48, "batch_tokens": 192, "checkpoint_every": 30},
}


@pytest.fixture
def recipe_file(tmp_path):
    source = written(
        tmp_path / "chats.jsonl",
        *({"messages": [turn("system", str(n % 2)), *asked(*each)]} for n in range(2) for each in ANSWERS.items()),
    )
    content = TUNING | {"data": TUNING["data"] | {"sources": [str(source)]}}
    path = tmp_path / "tune.json"
    path.write_text(json.dumps(content))
    return path


def hashes(run: Path, step: int) -> dict[str, str]:
    files = atomic.check_manifest(training_state.checkpoint_dir(run, step))["files"]
    return {name: files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of a minute on a laptop's core, cut to two seconds."""
    folder = tmp_path_factory.mktemp("tuned")
    lines = [{"messages": [turn("system", "s"), *asked(*each)]} for each in ANSWERS.items()]
    content = TUNING | {"data": TUNING["data"] | {"sources": [str(written(folder / "chats.jsonl", *lines))]}}
    (folder / "tune.json").write_text(json.dumps(content))
    sampled = {"train.sample_every": 60, "train.sample_prompts": ["ping"], "sample.temperature": 0}
    return train(folder / "tune.json", folder / "run", **sampled)


def test_tuned_model_answers_and_stops(tuned):
    model = loading.load(tuned.folder)
    prompts = [[turn("system", "s"), turn("user", question)] for question in ANSWERS]
    found = generate(model, prompts, temperature=0)
    assert [each.text for each in found] == list(ANSWERS.values())
    assert {each.finish_reason for each in found} == {"stop"}
    assert {each.token_ids[-1] for each in found} == {END}
    sample = read_records(tuned.folder / "samples.jsonl")[-1]
    assert sample["prompt"] == "ping"


def test_tuned_model_answers_in_transformers(tuned, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smolforge.exporters.transformers import to_transformers

    to_transformers(tuned.folder, tmp_path / "out")
    for folder in (training_state.checkpoint_dir(tuned.folder, 60), tmp_path / "out"):
        assert (folder / "chat_template.jinja").read_text() == CHATML
        for name in ("generation_config.json", "config.json"):
            said = json.loads((folder / name).read_text())
            assert [said[f"{each}_token_id"] for each in ("bos", "eos", "pad")] == [START, END, END]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asks = [turn("system", "s"), turn("user", "the sky")]
    ids = tokenizer.apply_chat_template(asks, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "blue<|im_end|>"


def test_generate_chats_on_a_terminal(tuned, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Typed(["ping", "", "two"]))
    assert cli.run(["generate", str(tuned.folder), "--temperature", "0", "--max-new-tokens", "9"]) == 0
    caught = capsys.readouterr()
    assert "the model answers" in caught.err
    assert caught.out.count("> ") == 4  # an empty line is no message, and the last is not typed
    assert "ping" not in caught.out and "<|im_end|>" not in caught.out


def test_resume_equals_an_uninterrupted_run(recipe_file, tmp_path):
    same = {"optim.schedule.steps": 12, "train.checkpoint_every": 5, "train.evaluate_every": None}
    train(recipe_file, tmp_path / "once", steps=12, **same)
    train(recipe_file, tmp_path / "twice", steps=7, **same)
    shutil.rmtree(training_state.checkpoint_dir(tmp_path / "twice", 7))  # as a kill after step 5's checkpoint leaves it
    train(recipe_file, tmp_path / "twice", steps=12, **same, **{"data.num_workers": 3, "train.micro_batch_size": 4})
    assert hashes(tmp_path / "once", 12) == hashes(tmp_path / "twice", 12)
    losses = [
        [(each["step"], each["loss"]) for each in read_records(tmp_path / run / "metrics.jsonl")]
        for run in ("once", "twice")
    ]
    assert losses[0] == losses[1]
    labels = read_records(tmp_path / "once" / "metrics.jsonl")[-1]["tokens"]
    corpus = Corpus.open(tmp_path / "once" / "corpus")
    rows = PackedRows(corpus, TRAIN, 48, seed=3)
    assert labels == sum(int((rows.batch(step, 4).labels != IGNORE_INDEX).sum()) for step in range(12))


def test_epochs_set_the_steps_at_the_first_start(recipe_file, tmp_path):
    source = str(written(tmp_path / "many.jsonl", *chats(60)))
    given = {"train.epochs": 1.5, "train.evaluate_every": 3, "data.held_out": 0.1, "train.sequence_length": 96}
    given |= {"train.batch_tokens": 192}
    run = train(recipe_file, tmp_path / "run", source, **given)
    corpus = Corpus.open(run.folder / "corpus")
    rows = PackedRows(corpus, TRAIN, 96, seed=3)
    steps = -(-int(rows.count * 1.5 + 0.999999) // 2)
    assert run.metrics["step"] == steps == run.recipe.optim.schedule.steps
    assert run.recipe.optim.schedule.warmup_steps == int(0.1 * steps)
    found = measure_corpus(run.model, corpus, 96, max_tokens=65_536)
    assert run.metrics["validation_loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["tokens"] == corpus.size(HELD_OUT)["learned_tokens"]
    bits = found["loss"] * found["tokens"] / np.log(2) / corpus.size(HELD_OUT)["learned_bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits)
    assert train(recipe_file, tmp_path / "run", source, **given).metrics["step"] == steps
    with pytest.raises(ConfigError, match=r"must not change: train\.epochs \(1\.5, now 3"):
        train(recipe_file, tmp_path / "run", source, **given | {"train.epochs": 3})


def test_budget_is_limited_by_epochs(recipe_file):
    recipe = read_recipe(recipe_file, {"budget": "100K-tokens", "train.epochs": 2, "train.dtype": "float32"})
    assert resolve_recipe(recipe, count_rows=lambda _: 10).train.steps == 20  # a row a step
    assert resolve_recipe(recipe, count_rows=lambda _: 10**9).train.steps == 100_000 // 192
    by_hand = resolve_recipe(recipe, {"train.steps"}, count_rows=lambda _: 10).train
    assert by_hand.steps == recipe.train.steps


def test_train_reports_dropped_chats_and_wrong_format(recipe_file, tmp_path, caplog):
    source = written(tmp_path / "long.jsonl", *chats(30), {"messages": [turn("system", "s"), *asked("a " * 60, "b")]})
    train(recipe_file, tmp_path / "cut", str(source), steps=1)
    assert "conversations" in caplog.text and "are left out" in caplog.text
    corpus = chat_corpus(tmp_path / "corpus", source)
    with pytest.raises(ConfigError, match=r"is chat; --data\.format chat learns from it as such"):
        train(recipe_file, tmp_path / "other", str(corpus.folder), steps=1, **{"data.format": "text"})


def test_validation_refuses_too_long_conversations_at_start(recipe_file, tmp_path):
    long = {"messages": [turn("system", "s"), *asked("a " * 60, "b")], "kind": "long"}
    source = written(tmp_path / "x.jsonl", *(each | {"kind": "short"} for each in chats(30)), long)
    given = {"data.group_key": "kind", "data.held_out": 0.5}
    with pytest.raises(InvalidFileError, match="held_out has no conversation whose first answer begins within a row"):
        train(recipe_file, tmp_path / "run", str(source), **given)
    told = tmp_path / "run" / "metrics.jsonl"
    assert not told.is_file() or not told.read_text()


def test_inspect_shows_the_loss_mask(tmp_path, capsys):
    source = written(tmp_path / "x.jsonl", *chats(30), {"messages": [turn("user", "alone")]})
    command = ["prepare", str(source), "--out", str(tmp_path / "corpus"), "--format", "chat", "--vocab-size", "320"]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    assert "are learned" in said and "1 without an answer" in said
    assert cli.run(["inspect", str(tmp_path / "corpus")]) == 0
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦" in said and "<|im_end|>⟧\n" in said and "user\n⟦" not in said
    assert cli.run(["inspect", str(tmp_path / "corpus"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    corpus = Corpus.open(tmp_path / "corpus")
    assert facts["conversations"] == 30
    learned = sum(corpus.size(split).get("learned_tokens", 0) for split in (TRAIN, HELD_OUT))
    assert facts["learned_share"] == pytest.approx(
        learned / sum(len(corpus.tokens(each)) for each in (TRAIN, HELD_OUT))
    )


@pytest.mark.long
def test_docs_tuning_page_commands_run(tmp_path, monkeypatch, hub, capsys):
    """Its commands and its Python, on a Hub of our own where the name stands for a small model."""
    page = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    model = tiny_model(max_position_embeddings=1024)
    huggingface.save(model, tmp_path / "small", model.tokenizer)
    hub.add("HuggingFaceTB/SmolLM2-135M", tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(blocks["json"] + "".join(f"{json.dumps(each)}\n" for each in chats(40)))
    monkeypatch.setattr("sys.stdin", Typed(["Who wrote Faust?"]))
    for line in blocks["bash"].strip().splitlines():
        program, *words = shlex.split(line.replace("--budget 10m", "--budget 8K-tokens --sample.max-new-tokens 4"))
        assert program == "smolforge"
        assert cli.run([*words, *(["--max-new-tokens", "4"] if "generate" in words else [])]) == 0, line
    assert Path("mine/chat_template.jinja").is_file()
    exec(compile(blocks["python"].replace("temperature=0", "temperature=0, max_new_tokens=4"), "tuning.md", "exec"), {})
    capsys.readouterr()


class Typed:
    """A terminal at which these lines are typed."""

    def __init__(self, lines):
        self.lines = iter(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return next((line + "\n" for line in self.lines), "")
