"""DPO: pairs of answers, rows of whole pairs, TRL's loss, a reference made once, and a model that prefers."""

import json
import math
import re
import shutil
import tempfile
from functools import partial
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
from smolforge.config.load import read_recipe, to_recipe
from smolforge.data.batches import IGNORE_INDEX, iterate_batches
from smolforge.data.corpus import HELD_OUT, TRAIN, Corpus
from smolforge.data.preference_pairs import PairRows, truncate_pairs
from smolforge.data.prepare.build import ShardWriter, prepare
from smolforge.data.prepare.tokenize_documents import EncodedDocument
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.runs import reference_logprobs, train
from smolforge.runs.estimate import synthetic_batch
from smolforge.testing import tiny_model, tiny_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.training.dpo import DPOLoss
from smolforge.training.loop import forward_backward
from smolforge.training.loss import label_log_probs
from smolforge.training.objective import Objective
from smolforge.training.run_folder import read_records

PLAIN = tiny_tokenizer()
BARE = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""ChatML without the newline after a turn, which TRL would learn of an answer and we would not."""
KEYS = ("chosen", "rejected")
WORDS = ["the", "model", "reads", "a", "token", "and", "learns", "what", "follows"]


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(contents)]


def pairs(number: int) -> list[dict]:
    """A question each, of several lengths, and the better answer is the one word that the question names."""
    made = []
    for place in range(number):
        word, other = WORDS[place % 9], WORDS[(place + 1 + place % 7) % 9]
        prompt = [{"role": "system", "content": str(place)}, *said(word * (1 + place % 3))]
        made.append({"prompt": prompt, "chosen": word, "rejected": f"{other} {place % 4}"})
    return made


def written(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def corpus_of(folder: Path, records, tokenizer: Tokenizer = PLAIN, **data) -> Corpus:
    source = written(folder.with_suffix(".jsonl"), records)
    return prepare(Data(sources=(str(source),), format="pairs", **data), folder, tokenizer)


# Lines


def test_pairs_of_every_form_give_the_same_corpus(tmp_path):
    whole = {"prompt": "Hi", "prompt_id": "7", "score_chosen": 8.0, "score_rejected": 3.0}
    whole |= {"messages": said("Hi", "yes"), "chosen": said("Hi", "yes"), "rejected": said("Hi", "no")}
    forms = [
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"prompt": said("Hi"), "chosen": said("Hi", "yes")[1:], "rejected": "no"},
        {"chosen": said("Hi", "yes"), "rejected": said("Hi", "no")},
        whole,
    ]
    found = [corpus_of(tmp_path / str(number), [form], held_out=0) for number, form in enumerate(forms)]
    assert len({each.fingerprint for each in found}) == 1
    corpus = found[0]
    assert corpus.format == "pairs" and corpus.size(TRAIN)["documents"] == 2
    ids, learned, (middle, _) = corpus.tokens(TRAIN)[:], corpus.learned(TRAIN)[:], corpus.ends(TRAIN).tolist()
    decode = corpus.tokenizer().decode
    assert decode(ids[:middle][learned[:middle] == 1].tolist()) == "yes<|im_end|>"
    assert decode(ids[middle:][learned[middle:] == 1].tolist()) == "no<|im_end|>"
    assert decode(ids[:middle].tolist()).replace("yes", "no") == decode(ids[middle:].tolist())


def test_prepare_counts_a_pair_as_one_document(tmp_path):
    source, told = written(tmp_path / "p.jsonl", pairs(5)), []
    prepare(Data(sources=(str(source),), format="pairs"), tmp_path / "c", PLAIN, report=told.append)
    assert told[-1]["documents"] == 5


def test_pairs_learn_only_the_last_turn(tmp_path):
    long = {"chosen": said("a", "b", "c", "yes"), "rejected": said("a", "b", "c", "no")}
    corpus = corpus_of(tmp_path / "c", [long], held_out=0)
    learned = corpus.tokens(TRAIN)[:][corpus.learned(TRAIN)[:] == 1].tolist()
    assert corpus.tokenizer().decode(learned) == "yes<|im_end|>no<|im_end|>"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"prompt": "Hi", "chosen": "a"}, "is no pair: it has not both chosen and rejected"),
        ({"messages": said("a", "b")}, "is no pair: .*; --data.format chat reads conversations"),
        ([], "is no pair"),
        ({"chosen": "a", "rejected": "b"}, "has no prompt that chosen would answer"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "has a number as its chosen"),
        (
            {"chosen": said("a", "b"), "rejected": said("c", "d")},
            "answer different prompts; all messages before",
        ),
        ({"chosen": said("a", "b"), "rejected": said("a")}, "rejected ends with a message of the user"),
        ({"prompt": "Hi", "chosen": [], "rejected": "b"}, "chosen has no message in it"),
        ({"prompt": "Hi", "chosen": said("", "a")[1:] * 2, "rejected": "b"}, "goes on with what the assistant said"),
        ({"chosen": [{"role": "user"}], "rejected": said("a", "b")}, "chosen: message 1 has no content"),
        ({"prompt": "Hi", "chosen": "\ud800", "rejected": "b"}, "has half of a surrogate pair"),
    ],
)
def test_pairs_errors_name_the_line(line, sentence, tmp_path):
    with pytest.raises(InvalidFileError, match=rf"bad\.jsonl, line 2.* ?{sentence}"):
        corpus_of(tmp_path / "bad", [pairs(1)[0], line])


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path):
    """Of the same answer twice there is no gradient, and a row of a published set nobody can correct."""
    scored = {key: [said("", "a")[1] | {"score": score}] for score, key in enumerate(KEYS)}
    useless = [
        {"prompt": "Hi", "chosen": "a", "rejected": "a"},
        {"prompt": "Hi", **scored},
        {"prompt": "Hi", "chosen": "a", "rejected": " \n"},
        {"prompt": "Hi", "chosen": "", "rejected": "b"},
    ]
    corpus = corpus_of(tmp_path / "c", [pairs(1)[0], *useless], held_out=0)
    assert corpus.metadata["dropped"]["unanswered"] == len(useless)
    assert corpus.fingerprint == corpus_of(tmp_path / "d", pairs(1), held_out=0).fingerprint
    with pytest.raises(InvalidFileError, match="hold no pair of answers"):
        corpus_of(tmp_path / "e", useless)


def test_pairs_need_their_format_and_are_split_by_prompt(tmp_path):
    source = written(tmp_path / "p.jsonl", pairs(1))
    for form in ("text", "chat"):
        with pytest.raises(InvalidFileError, match=r"line 1 .*--data\.format pairs reads"):
            prepare(Data(sources=(str(source),), format=form), tmp_path / form, PLAIN)
    many = [each | {"prompt": str(place % 10)} for place, each in enumerate(pairs(60))]
    corpus = corpus_of(tmp_path / "many", many, held_out=0.3)
    prompts = []
    for split in (TRAIN, HELD_OUT):
        ids, ends = corpus.tokens(split)[:].tolist(), corpus.ends(split).tolist()
        texts = [corpus.tokenizer().decode(ids[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        prompts.append({re.search(r"user\n(.*?)<", text)[1] for text in texts})
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


# Rows


def made_corpus(folder: Path, lengths) -> Corpus:
    """Of (prompt, chosen, rejected) lengths, with ids that count up."""
    writer, number = ShardWriter(folder / TRAIN, PLAIN, 4), 1000
    for prompt, *both in lengths:
        for answer in both:
            learned = [False] * prompt + [True] * answer + [False]
            writer.add(EncodedDocument(list(range(number, number + len(learned))), 1, learned=learned))
            number += len(learned)
    writer.close()
    facts = {"fingerprint": "", "token_bytes": 4, "eos_id": 7, "format": "pairs"}
    return Corpus(folder, facts | {"splits": {TRAIN: writer.size}})


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(LENGTHS, st.integers(6, 24), st.integers(0, 2**40))
def test_pair_rows_have_each_pair_once_per_epoch(lengths, most, seed):
    with tempfile.TemporaryDirectory() as folder:
        corpus = made_corpus(Path(folder), lengths)
        known = np.arange(2 * len(lengths), dtype=np.float32) - 100
        rows = PairRows(corpus, TRAIN, 2 * most + 3, lengths=(most, most // 2), seed=seed, reference=known)
        wanted, place = [], 1000
        for number, (prompt, chosen, rejected) in enumerate(lengths):
            kept = prompt  # the rule of TRL 0.9, said once more
            if prompt + max(chosen, rejected) > most:
                kept = min(prompt, most // 2)
            room = most - most // 2 if kept + max(chosen, rejected) > most else 99
            for side, answer in enumerate((chosen, rejected)):
                ids = list(range(place + prompt - kept, place + prompt + min(answer, room)))
                wanted.append((ids, ids[kept:], float(known[2 * number + side])))
                assert len(ids) <= most
                place += prompt + answer + 1
        for epoch in (0, 1):
            found = []
            batch = rows.batch(epoch, rows.count)
            assert batch.num_targets == len(lengths) and batch.num_labels == sum(len(answer) for _, answer, _ in wanted)
            for ids, labels, positions, value in zip(*(side.numpy() for side in batch), strict=True):
                for part in np.split(np.arange(len(ids)), np.flatnonzero(positions == 0)[1:]):
                    assert positions[part].tolist() == list(range(len(part)))
                    assert (value[part[1:]] == 0).all()
                    answer = labels[part][labels[part] != IGNORE_INDEX].tolist()
                    end = ids[part].tolist().index(answer[-1]) + 1
                    assert (ids[part][end:] == 7).all()
                    found.append((ids[part][:end].tolist(), answer, float(value[part[0]])))
            assert sorted(found) == sorted(wanted)
            both = sorted(zip(found[0::2], found[1::2], strict=True))
            assert both == sorted(zip(wanted[0::2], wanted[1::2], strict=True))


def test_pair_rows_do_not_depend_on_workers_or_ranks(tmp_path):
    rows = PairRows(made_corpus(tmp_path, [(3, 2 + n % 7, 4) for n in range(60)]), TRAIN, 48, lengths=(24, 12), seed=5)
    whole = rows.batch(1, 4)
    parts = [rows.batch(1, 4, share) for share in (range(1), range(1, 4))]
    (ahead,) = iterate_batches(rows, [1], 4, num_workers=3)
    for side in range(4):
        assert torch.equal(whole[side], torch.cat([part[side] for part in parts]))
        assert torch.equal(whole[side], ahead[side])
    assert not torch.equal(rows.batch(0, rows.count).input_ids, rows.batch(1, rows.count).input_ids)
    assert rows.padding < 0.2


def test_long_pairs_are_cut_as_published():
    kept = truncate_pairs(
        np.array([600, 600, 300, 300, 900, 900]), np.array([500, 9, 900, 5, 100, 50]), 1024, max_prompt_length=512
    )
    assert [each.tolist() for each in kept] == [[512, 512, 300, 300, 900, 900], [500, 9, 512, 5, 100, 50]]


# Loss


def test_label_log_probs_equal_full_logits():
    hidden, head = torch.randn(2, 300, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    labels, weight = torch.randint(50, (2, 300)), torch.randn(2, 300, dtype=torch.float64)
    labels[0, 3:40] = IGNORE_INDEX
    found = []
    for whole in (True, False):
        given = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        if whole:
            log_p = (given[0] @ given[1].T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            log_p = log_p.where(labels != IGNORE_INDEX, 0)
        else:
            log_p = label_log_probs(*given, labels)
        (log_p * weight).sum().backward()
        found.append([log_p.detach(), *(each.grad for each in given)])
    assert all(torch.allclose(*each, rtol=1e-10, atol=1e-12) for each in zip(*found, strict=True))


def reference_of(model, batch) -> torch.Tensor:
    """Of each sequence by itself, where it begins."""
    found = torch.zeros(batch.input_ids.shape)
    for row, column in (batch.positions == 0).nonzero().tolist():
        stop = next((n for n in range(column + 1, batch.input_ids.shape[1]) if batch.positions[row, n] == 0), None)
        ids, labels = batch.input_ids[row, column:stop], batch.labels[row, column:stop]
        log_p = model(ids[None])[0].log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        found[row, column] = log_p[labels != IGNORE_INDEX].sum()
    return found


@pytest.fixture(scope="module")
def batch_of_pairs(tmp_path_factory):
    """A corpus in TRL's template, a batch of all its pairs with a reference, and a policy that moved away from it."""
    bare = Tokenizer(PLAIN.backend, {**PLAIN.settings, "chat_template": BARE, "pad_token": "<|im_end|>"})
    records = [*pairs(9), {"chosen": said("x", "y", "naïve", "yes 12"), "rejected": said("x", "y", "naïve", "no")}]
    corpus = corpus_of(tmp_path_factory.mktemp("trl") / "c", records, bare, held_out=0)
    rows = PairRows(corpus, TRAIN, 300, lengths=(64, 32), seed=0)
    model, policy = tiny_model(seed=1).eval(), tiny_model(seed=1).train()
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
        batch = rows.batch(0, rows.count)
        return records, corpus, batch._replace(reference=reference_of(model, batch)), model, policy


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_dpo_loss_rewards_and_gradients_equal_trl(batch_of_pairs, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    records, corpus, batch, model, policy = batch_of_pairs
    policy.zero_grad()
    found = forward_backward(Objective(policy, preference=DPOLoss(0.5)), batch, batch.num_targets, rows=1)

    corpus.tokenizer().save(tmp_path / "tokenizer")
    theirs = []
    for each in (policy, model):
        made = LlamaForCausalLM(LlamaConfig(**each.config.model_dump(exclude={"model_type"})))
        made.load_state_dict(each.state_dict(), strict=False)
        made.tie_weights()
        theirs.append(made)
    talks = [
        {
            key: [*each.get("prompt", []), *(each[key] if "prompt" not in each else said("", each[key])[1:])]
            for key in KEYS
        }
        for each in records
    ]
    settings = DPOConfig(str(tmp_path / "out"), beta=0.5, max_length=None, use_cpu=True, bf16=False, report_to="none")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    trainer = DPOTrainer(
        theirs[0], theirs[1], settings, train_dataset=Dataset.from_list(talks), processing_class=tokenizer
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    told = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    names = {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"}
    for ours, other in names.items():
        assert found[f"reward_{ours}"].item() == pytest.approx(told[f"rewards/{other}"], rel=1e-5, abs=1e-5), ours
    assert 0 < told["rewards/accuracies"] < 1 and abs(loss.item() - math.log(2)) > 0.01
    for name, weight in trainer.model.named_parameters():
        ours = policy.get_parameter(name).grad
        assert torch.allclose(ours, weight.grad, rtol=1e-5, atol=1e-5 * weight.grad.abs().max().item()), name


def test_dpo_loss_does_not_depend_on_micro_batch_size(batch_of_pairs):
    *_, batch, _, policy = batch_of_pairs
    assert len(batch.input_ids) > 2 and len({int((row == 0).sum()) for row in batch.positions}) > 1
    found = []
    for size in (len(batch.input_ids), 1, 2):
        policy.zero_grad()
        means = forward_backward(Objective(policy, preference=DPOLoss(0.5)), batch, batch.num_targets, rows=size)
        found.append([*means.values(), *(weight.grad for weight in policy.parameters())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_dpo_loss_of_the_reference_model_is_log_2(batch_of_pairs):
    *_, batch, model, _ = batch_of_pairs
    found = forward_backward(Objective(model, preference=DPOLoss(0.5)), batch, batch.num_targets, rows=1)
    assert found["loss"].item() == pytest.approx(math.log(2), abs=1e-5)
    assert found["reward_margin"].item() == pytest.approx(0, abs=1e-5)


# Runs


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a model to start from, pairs, and a recipe."""
    folder = tmp_path_factory.mktemp("dpo")
    model = tiny_model(seed=1)
    huggingface.save(model, folder / "base", model.tokenizer)
    content = NANO | {
        "init_from": str(folder / "base"),
        "data": {"format": "pairs", "held_out": 0.2, "sources": [str(written(folder / "p.jsonl", pairs(80)))]},
        "dpo": {"beta": 0.5},
        "optim": {"learning_rate": 3e-3, "schedule": {"warmup_steps": 0.1, "decay": "cosine"}},
        "train": NANO["train"] | {"steps": 12, "sequence_length": 128, "batch_tokens": 512, "checkpoint_every": 5},
    }
    (folder / "dpo.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def once(begun):
    return train(begun / "dpo.json", begun / "once")


def hashes(run: Path, step: int) -> dict[str, str]:
    files = atomic.check_manifest(training_state.checkpoint_dir(run, step))["files"]
    return {name: files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")}


def references(run: Path) -> list[Path]:
    return sorted((run / "corpus" / "reference").iterdir())


def test_dpo_training_raises_the_reward_margin(once):
    lines = read_records(once.folder / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [4, 8, 12]
    margins = [line["validation_reward_margin"] for line in measured]
    assert 0 < margins[0] < margins[1] < margins[2]
    assert measured[-1]["validation_reward_accuracy"] > 0.8 and measured[-1]["validation_loss"] < 0.6
    assert measured[-1]["validation_reward_margin"] == pytest.approx(
        measured[-1]["validation_reward_chosen"] - measured[-1]["validation_reward_rejected"], abs=1e-5
    )


def test_resume_equals_an_uninterrupted_run(begun, once):
    same = {"optim.schedule.steps": 12}
    train(begun / "dpo.json", begun / "twice", steps=7, **same)
    shutil.rmtree(training_state.checkpoint_dir(begun / "twice", 7))  # as a kill after step 5's checkpoint leaves it
    (known,) = references(begun / "twice")
    stamp = (known / reference_logprobs.FILE).stat().st_mtime_ns
    train(begun / "dpo.json", begun / "twice", steps=12, **same, **{"data.num_workers": 3})
    assert (known / reference_logprobs.FILE).stat().st_mtime_ns == stamp
    assert hashes(begun / "once", 12) == hashes(begun / "twice", 12)
    losses = [
        [(each["step"], each["loss"], each["reward_margin"]) for each in read_records(begun / run / "metrics.jsonl")]
        for run in ("once", "twice")
    ]
    assert losses[0] == losses[1]


def test_reference_logprobs_equal_the_model_and_are_shared(begun, tmp_path):
    corpus = prepare(Data(sources=(str(begun / "p.jsonl"),), format="pairs", held_out=0.2), tmp_path / "c", PLAIN)
    run = train(begun / "dpo.json", tmp_path / "run", str(corpus.folder), steps=1)
    (known,) = sorted((corpus.folder / "reference").iterdir())
    found = reference_logprobs.read(known)
    model = tiny_model(seed=1).eval()
    for split in (TRAIN, HELD_OUT):
        rows = reference_logprobs.rows_of(corpus, split, run.recipe, ref_logprobs=found)
        batch = rows.batch(0, rows.count)
        with torch.no_grad():
            assert torch.allclose(batch.reference, reference_of(model, batch), rtol=1e-5, atol=1e-5)
    low_rank = {"lora.rank": 2, "dpo.beta": 0.1, "optim.learning_rate": 1e-2}
    again = train(begun / "dpo.json", tmp_path / "low", str(corpus.folder), steps=2, **low_rank)
    assert sorted((corpus.folder / "reference").iterdir()) == [known]
    assert again.metrics["validation_loss"] < math.log(2)
    wide = read_recipe(begun / "dpo.json", {"train.dtype": "float64"})
    base = loading.fingerprint(run.recipe.init_from)
    assert (
        reference_logprobs.path_for(wide, corpus, base)
        != known
        == reference_logprobs.path_for(run.recipe, corpus, base)
    )


def test_reference_logprobs_are_remade_if_corrupted(begun, tmp_path, caplog):
    shutil.copytree(begun / "base", tmp_path / "base")
    given = {"init_from": str(tmp_path / "base"), "optim.schedule.steps": 4, "train.checkpoint_every": 1}
    run = train(begun / "dpo.json", tmp_path / "run", steps=1, **given)
    (known,) = references(tmp_path / "run")
    content = (known / reference_logprobs.FILE).read_bytes()
    half = known.with_name(f".tmp-{known.name}")
    shutil.copytree(known, half)
    shutil.rmtree(known)  # as a kill while it was written leaves it
    corpus, made = Corpus.open(tmp_path / "run" / "corpus"), []
    again = partial(reference_logprobs.compute_unless_there, known, run.recipe, corpus, device=torch.device("cpu"))
    again(report=lambda pairs, of: made.append((pairs, of)))
    assert made[-1] == (80, 80) and references(tmp_path / "run") == [known]
    assert (known / reference_logprobs.FILE).read_bytes() == content
    (known / reference_logprobs.FILE).write_bytes(content[:-1])
    again(report=lambda pairs, of: None)
    assert (
        "the reference is computed again" in caplog.text and (known / reference_logprobs.FILE).read_bytes() == content
    )
    again(report=lambda pairs, of: pytest.fail("it is there"))
    model = tiny_model(seed=2)
    shutil.rmtree(tmp_path / "base")
    huggingface.save(model, tmp_path / "base", model.tokenizer)
    with pytest.raises(InvalidFileError, match="was trained against another reference than init_from is now"):
        train(begun / "dpo.json", tmp_path / "run", steps=2, **given)
    assert references(tmp_path / "run") == [known]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"init_from": None}, "data.format is pairs, but there is no model that is to prefer"),
        ({"dpo.max_length": 65}, r"dpo\.max_length \(65\) is more than half a row of train\.sequence_length \(128\)"),
        ({"dpo.max_length": 20, "dpo.max_prompt_length": 20}, r"dpo\.max_prompt_length \(20\) must be below"),
        ({"train.z_loss": 1e-4}, "it has no meaning for pairs"),
        ({"dpo.beta": 0}, r"dpo\.beta"),
        ({"model.max_position_embeddings": 60}, r"dpo\.max_length \(64\) is beyond"),
    ],
)
def test_dpo_config_refuses_contradictory_settings(begun, given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_recipe(begun / "dpo.json", given)


def test_pairs_corpus_refuses_other_formats_and_evaluate(begun, once, tmp_path, capsys):
    corpus = begun / "once" / "corpus"
    with pytest.raises(ConfigError, match=r"is pairs; --data\.format pairs learns from it as such"):
        train(begun / "dpo.json", tmp_path / "run", str(corpus), steps=1, **{"data.format": "chat"})
    assert cli.run(["evaluate", str(once.folder), "--text", str(corpus)]) == 3
    assert "holds pairs, which only train measures" in capsys.readouterr().err
    assert cli.run(["inspect", str(corpus), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 80


def test_long_pairs_are_counted_in_the_log(begun, tmp_path, caplog):
    long = written(tmp_path / "long.jsonl", [*pairs(9), {"prompt": "a " * 99, "chosen": "b " * 99, "rejected": "c"}])
    train(begun / "dpo.json", tmp_path / "run", str(long), steps=1, **{"data.held_out": 0.0})
    assert "of 10 pairs 1 are longer than dpo.max_length (64) tokens" in caplog.text
    assert "32 tokens, and of the answers" in caplog.text


def test_dpo_takes_the_same_steps_on_two_ranks(begun, once):
    from test_distributed import Bench

    bench = Bench(begun)
    shutil.copy(begun / "dpo.json", begun / "tiny.json")
    assert bench.train(2, "ranks", train__steps=4, optim__schedule__steps=12) == [0, 0], bench.said
    one, two = ([each["loss"] for each in read_records(begun / run / "metrics.jsonl")] for run in ("once", "ranks"))
    assert two == pytest.approx(one[:4], rel=1e-5)
    assert [each.name for each in references(begun / "ranks")] == [each.name for each in references(begun / "once")]


def test_dpo_recipe_has_the_published_settings(begun):
    recipe = read_recipe("smollm2-135m-dpo")
    assert (recipe.dpo.beta, recipe.dpo.lengths(recipe.train.sequence_length)) == (0.5, (1024, 512))
    assert (recipe.optim.learning_rate, recipe.train.epochs, recipe.train.sequences_per_step) == (1e-6, 2, 64)
    tried = synthetic_batch(to_recipe(read_recipe(begun / "dpo.json").model_dump()), 3)
    assert tried.num_targets == 3
    sums = Objective(tiny_model(), preference=DPOLoss(0.1))(*tried)
    assert sums["loss"].isfinite()


def test_docs_dpo_commands_run(begun, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    more = "".join(f"{json.dumps(each)}\n" for each in pairs(20))
    Path("pairs.jsonl").write_text(blocks["jsonl"] + more)
    small = f"--init-from {begun / 'base'} --data.sources pairs.jsonl --dpo.max-length 64 --train.sample-every none"
    train_line, _ = blocks["sh"].strip().splitlines()
    words = train_line.replace("--init-from runs/mine --data.sources pairs.jsonl", small).replace("10m", "8K-tokens")
    assert small in words and cli.run([*words.split()[1:], "--train.compile", "false"]) == 0
    told = capsys.readouterr().err
    assert "read 23 pairs with the model to start from" in told and "margin" in told and "% right" in told
