"""lm-evaluation-harness with our model in it: what its own HF model answers on the same files, request by request."""

import json
import logging
import sys
import warnings

import numpy as np
import pytest
from test_server import Running
from test_special_tokens import bos_model

from smolforge import cli
from smolforge.checkpoint import huggingface, loading
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.exporters.transformers import to_transformers
from smolforge.testing import tiny_model

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "smolforge[harness]"')
from smolforge.evaluation import harness

WORDS = ["the model", "a token", "follows", "7", "\u00e9t\u00e9", "\u4f60\u597d", "so it", "learns.", "<|endoftext|>"]
KINDS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", "el"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Writes a .yaml task over 20 items, of which some are longer than the context of 128; returns its path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    draw, lines = np.random.default_rng(1), []
    for number in range(20):
        size = 150 if number % 5 == 4 else draw.integers(1, 5)
        query = "" if number == 3 else "".join(f"{word} " for word in draw.choice(WORDS, size))
        choices = [" ".join(draw.choice(WORDS[:-1], size)) for size in draw.integers(1, 5, 4)]
        query = query.rstrip() + draw.choice(["", " ", "\n", "  "]) if query else ""
        lines.append({"query": query, "choices": choices, "gold": int(draw.integers(4))})
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(kind, **changes):
        task = {
            "task": f"local_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(items)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **KINDS[kind],
            **changes,
        }
        path = tmp_path / f"local_{kind}.yaml"
        path.write_text(json.dumps(task))  # JSON is YAML
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """The harness logs much, its HF model has warnings of its own, and for each result it asks pip for all packages."""
    monkeypatch.setattr("torch.utils.collect_env.get_pip_packages", lambda *_: ("pip", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        yield


def samples(result, name):
    return sorted(result["samples"][name], key=lambda sample: sample["doc_id"])


def by_name(path, model, /, chat=False, **arguments):
    """As a user of the harness calls it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=path.rpartition("/")[0], include_defaults=False)
    name = path.rpartition("/")[2].removesuffix(".yaml")
    return simple_evaluate(
        model, arguments, tasks=[name], task_manager=tasks, bootstrap_iters=0, apply_chat_template=chat
    )


@pytest.mark.parametrize("kind", KINDS)
def test_harness_model_equals_the_hf_model(local, folder, tmp_path, kind):
    path = local(kind)
    to_transformers(folder, tmp_path / "exported")
    theirs = by_name(path, "hf", pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=4)
    ours = by_name(path, "smolforge", pretrained=str(tmp_path / "exported"), batch_size=3)
    pairs = list(zip(samples(ours, f"local_{kind}"), samples(theirs, f"local_{kind}"), strict=True))
    assert len(pairs) == 20
    if kind == "writing":
        del pairs[3]  # behind nothing at all; the HF model goes on from padding there
    for our, their in pairs:
        assert our["arguments"] == their["arguments"]
        for mine, other in zip(our["filtered_resps"], their["filtered_resps"], strict=True):
            assert mine == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4, abs=2e-3))
    mine, other = (found["results"][f"local_{kind}"] for found in (ours, theirs))
    assert mine.keys() == other.keys()
    for key in mine:
        assert mine[key] == (pytest.approx(other[key], rel=1e-4) if isinstance(other[key], float) else other[key])


def test_harness_rows_share_a_context_up_to_the_limit():
    context, others = [1, 2, 3], [([1, 2, 3], [number] * 4) for number in range(6)]
    rows = harness.token_rows([([7], [8]), *others], tokens=10)
    assert [list(row.continuations) for row in rows] == [[0], [1, 2], [3, 4], [5, 6]]
    assert all(row.length <= 10 for row in rows)
    assert all(row.context == context for row in rows[1:])


def test_harness_samples_repeated_requests_anew(folder):
    """A task that takes the most frequent of several answers asks with the same words."""
    import torch
    from lm_eval.api.instance import Instance

    options = {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 20}
    asked = [Instance("generate_until", {}, ("the model", dict(options)), number) for number in range(3)]
    model = harness.HarnessModel(str(folder))
    written = []
    for _ in range(2):
        torch.manual_seed(5)
        written.append(model.generate_until(asked))
    assert written[0] == written[1]
    assert len(set(written[0])) == 3


def test_harness_chat_template_leaves_the_last_message_open(folder):
    model = loading.load(folder)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    settings = {**model.tokenizer.settings, "chat_template": template}
    model.tokenizer = type(model.tokenizer)(model.tokenizer.backend, settings)
    ours = harness.HarnessModel(model)
    history = [{"role": "user", "content": "so it"}]
    asked = ours.apply_chat_template(history)
    assert asked == "<|im_start|>user\nso it<|im_end|>\n<|im_start|>assistant\n"
    assert ours.tok_encode(asked)[0] == model.tokenizer.backend.token_to_id("<|im_start|>")
    history.append({"role": "assistant", "content": "The answer is"})
    assert ours.apply_chat_template(history, add_generation_prompt=False).endswith("assistant\nThe answer is")
    assert ours.chat_template(True) == template


def call(capsys, *words):
    code = cli.run(["evaluate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_evaluate_harness_prints_and_logs_scores(capsys, local, folder, tmp_path):
    path, log = local("choice"), tmp_path / "log.jsonl"
    tasks = f"{path},{local('writing')}"
    words = [folder, "--harness", tasks, "--tasks", tmp_path / "items.jsonl", "--limit", 3, "--log", log]
    (tmp_path / "items.jsonl").write_text('{"query": "so it", "choices": ["learns", "7"], "gold": 1}\n' * 4 + "\n")
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0
    found = json.loads(out)
    mine = found["tasks"]["local_choice"]
    assert mine.keys() >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n", "few_shot", "source"}
    assert (mine["n"], mine["few_shot"]) == (3, 0)
    assert mine["acc"] == found["tasks"]["items"]["acc"]
    assert found["versions"]["lm_eval"] in mine["source"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["task"], line["id"]) for line in lines if line["task"] == "local_choice"] == [
        ("local_choice", "0"),
        ("local_choice", "1"),
        ("local_choice", "2"),
    ]
    code, out, _ = call(capsys, *words)
    assert "local_choice   acc" in out
    assert "local_writing  exact_match 0.0000 ± 0.0000  n 3  (lm_eval" in out


def test_harness_few_shot_follows_the_task_unless_set(local, folder):
    path, model = local("choice", fewshot_split="test", num_fewshot=2), loading.load(folder)
    for asked, shown in ((None, 2), (1, 1)):
        values, logged = harness.run_tasks(model, harness.load_tasks([path]), limit=2, few_shot=asked)
        assert values["local_choice"]["few_shot"] == shown
        assert logged["local_choice"][0]["arguments"][0][0].count("\n\n") >= shown
    never = local("choice", fewshot_split="test", num_fewshot=0)
    assert harness.run_tasks(model, harness.load_tasks([never]), 2, few_shot=3)[0]["local_choice"]["few_shot"] == 0


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"doc_to_text": "{{quary}}"}, InvalidFileError, "'quary' is undefined"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, InvalidFileError, "gone.jsonl"),
        ({"generation_kwargs": {"num_beams": 4}}, ConfigError, "num_beams 4, which our generation lacks"),
        ({"generation_kwargs": {"max_gen_toks": 128}}, ConfigError, "asks for 128 tokens, and this model's context"),
    ],
)
def test_harness_task_errors_are_one_sentence(local, folder, changes, error, said):
    with pytest.raises(error, match=said) as caught:
        harness.run_tasks(loading.load(folder), harness.load_tasks([local("writing", **changes)]))
    assert "\n" not in str(caught.value)


def test_harness_reports_unknown_tasks_and_an_offline_hub(monkeypatch, local):
    from lm_eval.tasks import TaskManager

    path = local("choice", dataset_path="org/nowhere", dataset_kwargs={})
    here = TaskManager(include_path=path.rpartition("/")[0], include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: here)  # the others are thousands of files
    with pytest.raises(ConfigError, match="no task 'local_choise'. Did you mean local_choice\\? `lm_eval ls"):
        harness.load_tasks(["local_choise"])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingResourceError, match="cannot read local_choice: .*org/nowhere"):
        harness.load_tasks(["local_choice"])


def test_harness_without_lm_eval_names_the_extra(capsys, monkeypatch, folder):
    monkeypatch.delitem(sys.modules, "smolforge.evaluation.harness")
    monkeypatch.delattr("smolforge.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    code, _, err = call(capsys, folder, "--harness", "hellaswag")
    assert code == 4
    assert 'need the package lm_eval: pip install "smolforge[harness]"' in err


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_harness_model_equals_the_hf_model_where_bos_is_added(local, tmp_path, kind):
    model = bos_model("llama 2", vocab_size=321)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    path, folder = local(kind), str(tmp_path / "model")
    theirs = samples(by_name(path, "hf", pretrained=folder, device="cpu", dtype="float32"), f"local_{kind}")
    ours = samples(by_name(path, "smolforge", pretrained=folder), f"local_{kind}")
    assert len(ours) == 20
    for our, their in list(zip(ours, theirs, strict=True)):
        if kind == "writing" and our["doc_id"] == 3:
            continue  # behind nothing at all; the HF model goes on from padding there
        for mine, other in zip(our["filtered_resps"], their["filtered_resps"], strict=True):
            assert mine == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4, abs=2e-3))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval_scores_rendered_chats_over_http_as_its_hf_model_does(local, tmp_path, monkeypatch, backend):
    """With a tokenizer of its own it sends ids; the served one has to read the special tokens that a template wrote.

    lm_eval 0.4.13 hands a remote tokenizer the messages instead of their text; the text is what its RemoteTokenizer
    renders.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    path, model = local("choice"), tiny_model(max_position_embeddings=1024)
    with Running(model=model, context=1024, parse_special=True) as server:
        huggingface.save(model, tmp_path / "model", model.tokenizer)
        hf = {"pretrained": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"}
        expected = samples(by_name(path, "hf", chat=True, **hf), "local_choice")
        url, tokenizer = f"{server.url}/v1/completions", str(tmp_path / "model") if backend == "huggingface" else None
        served = {"model": "tiny", "base_url": url, "tokenizer_backend": backend, "tokenizer": tokenizer}
        if backend == "remote":

            def render(self, chat, add_generation_prompt=True):
                return self.tokenizer.apply_chat_template(chat, add_generation_prompt)

            monkeypatch.setattr(LocalCompletionsAPI, "apply_chat_template", render)
        found = samples(by_name(path, "local-completions", chat=True, max_length=1023, **served), "local_choice")
    assert all("<|im_start|>" in sample["arguments"][0][0] for sample in expected)
    for mine, other in zip(found, expected, strict=True):
        values = [[score for score, _ in sample["filtered_resps"]] for sample in (mine, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=2e-3)
