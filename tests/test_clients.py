"""Programs of others, as they are, against a served model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_server import KEY, Running

from smolforge.checkpoint import huggingface
from smolforge.evaluation.multiple_choice import score
from smolforge.evaluation.tasks import read_items
from smolforge.testing import tiny_model
from smolforge.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
WORDS = ["the model", "a token", "follows", "7", "\u00e9t\u00e9", "\u4f60\u597d", "so it", "learns."]
TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{items}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def asked(url, items, folder, tokenizer, tmp_path):
    """What lm_eval's command line logs of each item, in their order."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(items=items))
    model = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend={tokenizer},max_length=1024,auth_token={KEY}"
    model += f",tokenizer={folder}" if tokenizer == "huggingface" else ""
    words = ["--model", "local-completions", "--model_args", model, "--batch_size", "8", "--tasks", "local"]
    words += ["--include_path", str(tmp_path / "tasks"), "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {"OPENAI_API_KEY": KEY, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "lm_eval", *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "out").rglob("samples_local_*.jsonl")
    return sorted(map(json.loads, log.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def agree(model, items, tokenizer, tmp_path):
    """Every log-probability and verdict is that in this process, but for rounding; returns the largest difference."""
    torch.set_num_threads(1)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    with Running(KEY, model=model, context=1024) as server:
        theirs = asked(server.url, items, tmp_path / "model", tokenizer, tmp_path)
    ours = score(model, read_items(items))
    assert len(theirs) == len(ours) > 0
    differences = []
    for sample, found in zip(theirs, ours, strict=True):
        values = [float(answer[0]) for answer in sample["filtered_resps"]]
        differences += [abs(a - b) for a, b in zip(found.logprobs, values, strict=True)]
        right = found.correct()
        assert (right["acc"], right["acc_chars"]) == (bool(sample["acc"]), bool(sample["acc_norm"]))
    assert max(differences) < 1e-3
    return max(differences)


@pytest.mark.long  # for its imports; test_server.py has the same in this process
@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_lm_eval_over_http_equals_in_process_scores(tmp_path, tokenizer):
    model, draw, lines = tiny_model(max_position_embeddings=1024), np.random.default_rng(0), []
    for number in range(8):
        query = " ".join(draw.choice(WORDS, 4))
        choices = [" ".join(draw.choice(WORDS, size)) for size in draw.integers(1, 5, 4)]
        lines.append({"id": number, "query": query, "choices": choices, "gold": int(draw.integers(4))})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    agree(model, tmp_path / "items.jsonl", tokenizer, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_lm_eval_over_http_equals_in_process_on_arc_easy(shared, tmp_path, tokenizer):
    """All 570 items of its validation part, with the published tokenizer."""
    model = tiny_model(vocab_size=49152, max_position_embeddings=1024)
    model.tokenizer = Tokenizer.load(shared / "smollm2-tokenizer")
    print("largest difference", agree(model, shared / "arc" / "arc_easy_validation.jsonl", tokenizer, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize(("package", "script"), [("langchain-openai", "langchain"), ("litellm", "litellm")])
def test_langchain_and_litellm_work_with_the_server(package, script):
    subprocess.run(["make", f".clients/{package}"], cwd=ROOT, check=True)
    python = ROOT / ".clients" / package / "bin" / "python"
    with Running(KEY) as server:
        words = [python, ROOT / "tests" / "clients" / f"with_{script}.py", server.url, KEY]
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.endswith("all holds\n"), done.stderr
