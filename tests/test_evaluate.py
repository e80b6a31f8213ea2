"""`smolforge evaluate`: what it prints for people and scripts, where items come from, a sentence for every mistake."""

import json
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_multiple_choice import score_slowly

from smolforge import cli, load
from smolforge.checkpoint import huggingface
from smolforge.config import Data
from smolforge.data.prepare.build import prepare
from smolforge.errors import InvalidFileError, MissingResourceError
from smolforge.evaluation import measure, measure_text, perplexity, tasks
from smolforge.evaluation.multiple_choice import encode_choices, score, summary
from smolforge.evaluation.tasks import HUB_TASKS, load_task, published_scores, read_items
from smolforge.testing import sentences, tiny_model, tiny_tokenizer
from smolforge.training.environment import PACKAGES

LINES = [
    {"id": "first", "query": "the model reads", "choices": ["a token", "the token and another"], "gold": 0},
    {"query": "7: a token", "choices": ["follows.", "and", "so"], "gold": 2},
    {"query": ["the model reads a", "the model reads so"], "choices": ["token", "token"], "gold": 1},
    {"id": 4, "query": "another token\n", "choices": ["\u00e9t\u00e9\u2028", "it learns"], "gold": 1},
]


@pytest.fixture
def model_folder(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return str(tmp_path / "model")


@pytest.fixture
def items(tmp_path):
    return str(write(tmp_path / "mine.jsonl", LINES))


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def call(capsys, *words):
    """(exit code, standard output, standard error)"""
    code = cli.run(["evaluate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_evaluate_prints_scores_as_json(capsys, model_folder, items, tmp_path, text_file):
    log = tmp_path / "log.jsonl"
    words = [model_folder, "--tasks", items, "--text", text_file, "--log", log, "--json"]
    code, out, _ = call(capsys, *words)
    assert code == 0
    found = json.loads(out)
    expected = summary([score_slowly(tiny_model(), item) for item in read_items(tmp_path / "mine.jsonl")])
    mine = found["tasks"]["mine"]
    assert {name: mine[name] for name in expected} == pytest.approx(expected)
    assert mine["n"] == 4
    assert "sha256:" in mine["source"]
    written = found["tasks"]["text"]
    assert written["perplexity"] == pytest.approx(math.exp(written["loss"]))
    assert written["tokens"] == len(tiny_tokenizer().encode(text_file.read_text()))
    assert {"accuracy", "bits_per_byte"} <= written.keys()
    assert found["versions"].keys() == set(PACKAGES)
    assert found["published"] == {}
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["id"] for line in logged] == ["first", "2", "3", "4"]
    assert Counter(line["right"]["acc"] for line in logged)[True] == round(mine["acc"] * 4)
    assert logged[0].keys() == {
        *("task", "id", "gold", "skipped", "truncated", "logprobs", "greedy", "predictions", "right")
    }


LONG = [
    {"query": "the model " * 200, "choices": ["a token", "b"], "gold": 0},
    {"query": "2+2=", "choices": ["4", "5"], "gold": 0},
    {"query": "2+2=", "choices": ["4", "the model " * 200], "gold": 0},
]


def test_long_items_are_skipped_or_truncated_and_counted(capsys, model_folder, tmp_path):
    write(tmp_path / "long.jsonl", LONG)
    words = model_folder, "--tasks", tmp_path / "long.jsonl", "--log", tmp_path / "log.jsonl"
    counts, logs = {}, {}
    for name in ("skip", "truncate"):
        code, out, _ = call(capsys, *words, "--long-items", name, "--json")
        values = json.loads(out)["tasks"]["long"]
        counts[name] = [code, *(values[key] for key in ("n", "truncated", "skipped"))]
        logs[name] = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert counts == {"skip": [0, 1, 0, 2], "truncate": [0, 2, 1, 1]}
    assert [[line["skipped"], line["truncated"]] for line in logs["skip"]] == [
        [True, False],
        [False] * 2,
        [True, False],
    ]
    assert logs["skip"][1] == logs["truncate"][1]
    short, model = write(tmp_path / "short.jsonl", LONG[1:2]), load(model_folder)
    assert call(capsys, *words)[1].split("n ")[1].split() == ["1", "skipped", "2"]
    (alone,) = score(model, read_items(short))
    assert list(alone.logprobs) == pytest.approx(logs["skip"][1]["logprobs"], abs=1e-5)
    ((ids, continuation),) = encode_choices(model.tokenizer, [(LONG[0]["query"], " a token")])
    rows = torch.tensor([[*ids, *continuation][-129:]])
    expected = (
        model(rows[:, :-1])[0].log_softmax(-1)[-len(continuation) :].gather(1, rows[0, -len(continuation) :, None])
    )
    assert logs["truncate"][0]["logprobs"][0] == pytest.approx(expected.sum().item(), abs=1e-4)


def test_items_that_are_all_too_long_are_an_error(capsys, model_folder, tmp_path):
    path = write(tmp_path / "long.jsonl", LONG[:1] * 2)
    code, out, err = call(capsys, model_folder, "--tasks", path)
    assert (code, out) == (3, "")
    assert "long.jsonl, line 1, as every item here, is longer than this model's context of 128 tokens; evaluate" in err
    assert call(capsys, model_folder, "--tasks", path, "--long-items", "truncate")[0] == 0


def test_evaluate_prints_one_line_per_task(capsys, model_folder, items, text_file):
    code, out, err = call(capsys, model_folder, "--tasks", items, "--limit", 2, "--text", text_file)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("text  loss ")
    assert "bits/byte" in first
    assert second.startswith("mine  acc ")
    assert second.endswith("n 2")
    assert second.count("±") == 3


def test_evaluate_measures_the_validation_split_of_a_corpus(capsys, model_folder, tmp_path, text_file):
    prepare(Data(sources=(str(text_file),), held_out=0.2), tmp_path / "corpus", tiny_tokenizer())
    code, out, _ = call(capsys, model_folder, "--text", tmp_path / "corpus", "--json", "--stride", 7)
    held = json.loads((tmp_path / "corpus" / "corpus.json").read_text())["splits"]["held_out"]
    found = json.loads(out)["tasks"]["corpus"]
    assert code == 0
    assert found["tokens"] == held["tokens"]
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * held["tokens"] / math.log(2) / held["bytes"])
    prepare(Data(sources=(str(text_file),), held_out=0.2), tmp_path / "other", tiny_tokenizer(300))
    assert "another tokenizer" in call(capsys, model_folder, "--text", tmp_path / "other")[2]


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_bits_per_byte_does_not_depend_on_batches(monkeypatch, stride):
    """And is what each token costs, computed one at a time."""
    model, written = tiny_model(), sentences(12) + "\u00e9\u4f60\U0001f600"
    ids, length, bits = [0, *model.tokenizer.encode(written)], 16, 0.0
    window = 0
    for place in range(1, len(ids)):
        if place > window + length:
            window += stride
        row = np.array(ids[window:place])
        logits = model(torch.from_numpy(row)[None])[0, -1]
        bits -= F.log_softmax(logits.double(), -1)[ids[place]].item() / math.log(2)
    found = []
    for tokens in (1, 64, 100_000):
        monkeypatch.setattr(perplexity, "TOKENS", tokens)
        found.append(measure_text(model, written, length, stride=stride)["bits_per_byte"])
    assert found == pytest.approx([bits / len(written.encode())] * 3, rel=1e-5)


def test_progress_counts_every_token():
    heard = []
    measure(tiny_model(), np.arange(3, 103), 0, sequence_length=16, stride=5, on_progress=heard.append)
    assert sum(heard) == 100
    heard.clear()
    asked = find_items(LINES[:2])
    score(tiny_model(), asked, batch_tokens=1, on_progress=heard.append)
    assert heard == [1, 1]


def find_items(lines):
    return [tasks._parse_item(json.dumps(line), f"line {number}", str(number)) for number, line in enumerate(lines, 1)]


def test_few_shot_examples_are_not_scored(items):
    plain, shown = load_task(items), load_task(items, few_shot=2)
    assert [item.id for item in shown.items] == ["3", "4"]
    before = "the model reads a token\n\n7: a token so\n\n"
    assert shown.items[0].queries == tuple(before + query for query in plain.items[2].queries)
    assert len(load_task(items, limit=1, few_shot=2).items) == 1


def test_published_scores_are_shown_next_to_ours(capsys, hub, tmp_path, items, monkeypatch):
    ours = {"hellaswag": 0.4, "arc_easy": 0.6, "arc_challenge": 0.3, "winogrande": 0.5, "mine": 0.1}
    assert published_scores("HuggingFaceTB/SmolLM2-135M@main", ours) == {
        "hellaswag": (0.4, pytest.approx(0.421)),
        "arc": (pytest.approx(0.45), pytest.approx(0.439)),
    }
    assert published_scores("someone/else", ours) == {}
    assert published_scores("HuggingFaceTB/SmolLM2-1.7B", {"mmlu_cloze": 0.3}) == {}
    model = tiny_model()
    huggingface.save(model, tmp_path / "small", model.tokenizer)
    hub.add("HuggingFaceTB/SmolLM2-135M", tmp_path / "small")
    monkeypatch.setattr(tasks, "read_task_rows", lambda name, split, limit=None: find_items(LINES)[:limit])
    words = ["HuggingFaceTB/SmolLM2-135M", "--tasks", "hellaswag", "--limit", 2]
    assert "published 42.1% over all items" in call(capsys, *words)[1]
    assert json.loads(call(capsys, *words, "--json")[1])["published"] == {"hellaswag": pytest.approx(0.421)}
    assert "published" not in call(capsys, *words, "--few-shot", 1)[1]


ROWS = {
    "hellaswag": (
        {
            "activity_label": "Tango",
            "ctx_a": "A man [header] How to dance [title] Begin.  Now",
            "ctx_b": "they",
            "endings": ["dance  well. [step] Go.", " sit."],
            "label": "1",
        },
        (["Tango: A man How to dance. Begin. Now They"], ["dance well. Go.", "sit."], 1),
    ),
    "arc_easy": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        (["Question: Why?\nAnswer:"], ["x", "y"], 1),
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
        (["Question: Open it\nAnswer:"], ["pull", "push"], 1),
    ),
    "winogrande": (
        {"sentence": "Ann saw Bo as _ was tall.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        (["Ann saw Bo as Ann", "Ann saw Bo as Bo"], ["was tall.", "was tall."], 1),
    ),
    "openbookqa": (
        {"question_stem": "The sun", "choices": {"text": ["is hot", "is cold"], "label": ["A", "B"]}, "answerKey": "A"},
        (["The sun"], ["is hot", "is cold"], 0),
    ),
    "commonsense_qa": (
        {"question": "Where?", "choices": {"text": ["here", "there"], "label": ["A", "B"]}, "answerKey": "B"},
        (["Where?"], ["here", "there"], 1),
    ),
    "lambada": ({"text": "she opened the door"}, (["she opened the"], ["door"], 0)),
    "mmlu_cloze": (
        {"question": "2+2?", "subject": "abstract_algebra", "choices": ["3", "4"], "answer": 1},
        (["The following are questions about abstract algebra.\nQuestion: 2+2?\nAnswer:"], ["3", "4"], 1),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_hub_tasks_build_the_expected_prompts(name):
    row, expected = ROWS[name]
    assert tuple(HUB_TASKS[name].to_prompt(row)) == expected


def test_hellaswag_prompts_equal_lm_eval():
    """Its own functions, on rows with everything its data has."""
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    row = ROWS["hellaswag"][0]
    query, choices, gold = HUB_TASKS["hellaswag"].to_prompt(row)
    label = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    assert (query, choices, gold) == ([utils.preprocess(label)], [utils.preprocess(e) for e in row["endings"]], 1)


def test_hub_task_is_read_from_the_hub(hub, tmp_path, monkeypatch):
    """By the real client, from a Hub of our own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    row = ROWS["arc_easy"][0]
    lines = "".join(json.dumps({**row, "question": f"Why {n}?"}) + "\n" for n in range(5)).encode()
    files = {"ARC-Easy/test.jsonl": lines, "ARC-Easy/train.jsonl": lines}
    configs = "configs:\n- config_name: ARC-Easy\n  data_files:\n"
    configs += "".join(f"  - split: {split}\n    path: ARC-Easy/{split}.jsonl\n" for split in ("test", "train"))
    hub.add("allenai/ai2_arc", {**files, "README.md": f"---\n{configs}---\n".encode()}, kind="dataset")
    found = load_task("arc_easy", limit=3, few_shot=1)
    assert found.source == "allenai/ai2_arc ARC-Easy test"
    assert [item.queries[0] for item in found.items] == [
        f"Question: Why 0?\nAnswer: y\n\nQuestion: Why {n}?\nAnswer:" for n in range(3)
    ]
    with pytest.raises(MissingResourceError, match="piqa could not be read from baber/piqa"):
        load_task("piqa")


def test_hub_task_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingResourceError, match=r'pip install "smolforge\[data\]"'):
        load_task("hellaswag")


def test_hub_task_refuses_rows_of_another_form():
    row = ROWS["hellaswag"][0] | {"label": ""}  # as in its test split
    with pytest.raises(InvalidFileError, match="hellaswag test, row 3 has another form"):
        tasks._dataset_item(HUB_TASKS["hellaswag"].to_prompt, row, "hellaswag test, row 3", number=3)


GOOD = LINES[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("7", "line 2 is no item; it should have query, choices and gold"),
        ({"query": "q", "choices": ["a"]}, "line 2 is no item"),
        (GOOD | {"query": 7}, "query is 7; it should be a text"),
        (GOOD | {"query": ["a", "b", "c"]}, "or a list of one for each choice"),
        (GOOD | {"query": []}, "query is []"),
        (GOOD | {"choices": []}, "choices is []; it should be a list of texts, none of them empty"),
        (GOOD | {"choices": ["a", " "]}, 'choices is ["a", " "]'),
        (GOOD | {"choices": "ab"}, 'choices is "ab"'),
        (GOOD | {"choices": ["a", 7]}, 'choices is ["a", 7]'),
        (GOOD | {"gold": 2}, "gold is 2; it should be the number of a choice, 0 to 1"),
        (GOOD | {"gold": -1}, "gold is -1"),
        (GOOD | {"gold": True}, "gold is true"),
        (GOOD | {"gold": "a"}, 'gold is "a"'),
        ('{"query": "\\ud800", "choices": ["a"], "gold": 0}', "half of a surrogate pair"),
    ],
)
def test_items_file_errors_name_file_and_line(capsys, model_folder, tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    code, out, err = call(capsys, model_folder, "--tasks", path)
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert "bad.jsonl, line 2" in err
    assert said in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "there is nothing to measure; name --tasks"),
        (["--tasks", "hellaswga"], 2, "there is no task 'hellaswga'.* Did you mean hellaswag?"),
        (["--tasks", "missing.jsonl"], 3, "there is no file of items at missing.jsonl"),
        (["--tasks", "EMPTY"], 3, "has no items"),
        (["--text", "MINE", "--long-items", "truncate"], 2, "--long-items is of the items of --tasks"),
        (["--tasks", "MINE", "--limit", "0"], 2, "limit is 0; it should be at least 1"),
        (["--tasks", "MINE", "--few-shot", "-1"], 2, "few-shot is -1"),
        (["--tasks", "MINE", "--few-shot", "4"], 2, "has 4 items, and --few-shot 4 shows them all"),
        (["--tasks", "lambada", "--few-shot", "1"], 2, "lambada has no examples to show"),
        (["--tasks", "MINE,MINE"], 2, "two of what is measured are called mine"),
        (["--text", "missing.txt"], 3, "there is no text or corpus at missing.txt"),
        (["--text", "EMPTY"], 3, "is empty"),
        (["--text", "MINE", "--stride", "0"], 2, "stride is 0; it should be 1 to 128"),
        (["--text", "MINE", "--sequence-length", "129"], 2, "it should be 1 to 128, this model's context"),
        (["--tasks", "MINE", "--log", "no/where.jsonl"], 2, "there is no folder no for the log"),
    ],
)
def test_evaluate_errors_are_one_sentence(capsys, model_folder, items, tmp_path, words, code, said):
    (tmp_path / "empty.jsonl").touch()
    places = {"MINE": items, "EMPTY": str(tmp_path / "empty.jsonl")}
    for short, path in places.items():
        words = [word.replace(short, path) for word in words]
    found, out, err = call(capsys, model_folder, *words)
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert re.search(said, err)


def test_evaluate_refuses_a_preset_without_random(capsys, items):
    code, _, err = call(capsys, "smollm2-135m", "--tasks", items)
    assert code == 2
    assert "HuggingFaceTB/SmolLM2-135M" in err
    assert "--random insists" in err


def test_evaluate_refuses_a_model_without_a_tokenizer(capsys, tmp_path, items):
    huggingface.save(tiny_model(), tmp_path / "bare")
    code, _, err = call(capsys, tmp_path / "bare", "--tasks", items)
    assert code == 3
    assert "without a tokenizer" in err
