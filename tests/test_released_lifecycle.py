"""The life of the released model: tuned, killed, resumed, exported, read back, evaluated. Minutes, so all are long."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from children import train_until
from conftest import RELEASED, needs_released
from test_harness import agree

from smolforge import cli, load
from smolforge.atomic import check_manifest
from smolforge.checkpoint import training_state
from smolforge.cli.inspect import machine
from smolforge.generation.stream import generate
from smolforge.testing import in_child
from smolforge.testing.hub import TOKEN
from smolforge.training.run_folder import read_records

pytestmark = [needs_released, pytest.mark.long]
TOPICS = ("rivers", "stars", "bread", "cats", "music", "winter", "ships", "gardens")
STEPS = {"lora": 4, "dpo": 4, "sft": 3}
LOG_2, RANDOM_LOSS = math.log(2), math.log(49_152)


def call(capsys, *words):
    """Run a command that must succeed; return what it prints as JSON."""
    code = cli.run([*map(str, words), "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def records(kind: str) -> list[dict]:
    """Return a conversation, or a pair of answers, for each topic."""
    lines = []
    for number, topic in enumerate(TOPICS):
        question = f"Say something about {topic}."
        answer, worse = f"I like {topic} {'very ' * number}much.", "No."
        if kind == "dpo":
            lines.append({"prompt": [{"role": "user", "content": question}], "chosen": answer, "rejected": worse})
        else:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append({"messages": turns})
    return lines


def recipe(folder: Path, kind: str) -> Path:
    """Write a recipe that begins with the released file; of "sft" every weight learns."""
    source = folder / "lines.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records(kind)), "utf-8")
    tree = {
        "seed": 3,
        "init_from": str(RELEASED),
        "model": {"preset": "smollm2-135m"},
        "data": {"format": "pairs" if kind == "dpo" else "chat", "sources": [str(source)], "held_out": 0},
        "optim": {"learning_rate": 1e-4, "schedule": {"warmup_steps": 1, "decay": "linear"}},
        "train": {
            "steps": STEPS[kind],
            "sequence_length": 160,
            "batch_tokens": 160,
            "dtype": "float32",
            "checkpoint_every": 1,
            "evaluate_every": "none",
            "sample_every": "none",
        },
        "report": {"to": "none"},
    }
    tree |= {} if kind == "sft" else {"lora": {"rank": 4, "alpha": 8.0}}
    tree |= {"dpo": {"beta": 0.5}} if kind == "dpo" else {}
    (folder / "recipe.json").write_text(json.dumps(tree))
    return folder / "recipe.json"


@pytest.mark.parametrize("kind", STEPS)
def test_released_model_tunes_and_resumes_bit_for_bit_after_sigkill(kind, released, tmp_path, capsys):
    """The process is killed at its last step, when a checkpoint is whole: a save waits for the one before."""
    path, steps = recipe(tmp_path, kind), STEPS[kind]
    assert in_child(train_until, None, path, tmp_path / "whole", {}) == 0
    assert in_child(train_until, steps, path, tmp_path / "parts", {}) == -signal.SIGKILL
    assert training_state.list_checkpoints(tmp_path / "parts")
    assert in_child(train_until, None, path, tmp_path / "parts", {}) == 0
    one, other = (training_state.list_checkpoints(tmp_path / run)[-1] for run in ("whole", "parts"))
    hashes, others = (
        {name: file["sha256"] for name, file in check_manifest(folder)["files"].items() if name.endswith("tensors")}
        for folder in (one, other)
    )
    del hashes["training/random.safetensors"], others["training/random.safetensors"]
    assert len(hashes) >= 2 and hashes == others
    losses = [
        [record["loss"] for record in read_records(tmp_path / run / "metrics.jsonl")] for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == steps
    assert losses[0][0] == pytest.approx(LOG_2, abs=1e-5) if kind == "dpo" else losses[0][0] < RANDOM_LOSS / 2
    tuned, ids = load(tmp_path / "whole"), torch.arange(24)[None]
    with torch.inference_mode():
        assert 1e-4 < (tuned(ids) - released(ids)).abs().max() < 5
    if kind != "sft":
        call(capsys, "export", tmp_path / "whole", "--to", "adapter", "--out", tmp_path / "adapter")
        assert_same_weights(load(tmp_path / "adapter"), tuned)


# Export, and back


def assert_same_weights(one, other):
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def rounded(model, dtype):
    return {name: weight.to(dtype) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_released_model_exports_to_transformers_and_back(dtype, released, tmp_path, capsys):
    """Transformers reads the folder and says the same, or there would be none."""
    result = call(capsys, "export", RELEASED, "--to", "transformers", "--dtype", dtype, "--out", tmp_path / "out")
    assert result["max_abs_logit_diff"] < 5e-5 and result["greedy_match"]
    again = load(tmp_path / "out", dtype)
    for name, weight in rounded(released, getattr(torch, dtype)).items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert_same_tokenizer(again, released)


def assert_same_tokenizer(one, other):
    chat = [{"role": "user", "content": "na\u00efve  007 <|im_end|>"}]
    assert one.tokenizer.chat(chat) == other.tokenizer.chat(chat)
    assert one.tokenizer.eos_id == other.tokenizer.eos_id


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
def test_released_model_exports_to_gguf_and_back(kind, dtype, released, tmp_path, capsys):
    """Matrices as their type rounds them; vectors stay in fp32."""
    out = tmp_path / "out.gguf"
    call(capsys, "export", RELEASED, "--to", "gguf", "--type", kind, "--out", out)
    again = load(out).state_dict()
    for name, weight in released.state_dict().items():
        expected = weight.to(getattr(torch, dtype)).float() if weight.ndim > 1 else weight
        assert torch.equal(again[name], expected), name
    assert_same_tokenizer(load(out), released)


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_released_model_exports_to_gguf_blocks_and_back(kind, bits, released, tmp_path, capsys):
    """The embedding lies on Q8_0's grid already and stays as it is; elsewhere a block's largest decides the error."""
    out = tmp_path / "out.gguf"
    call(capsys, "export", RELEASED, "--to", "gguf", "--type", kind, "--out", out)
    again = load(out).state_dict()
    for name, weight in released.state_dict().items():
        if weight.ndim < 2 or (kind, name) == ("q8_0", "model.embed_tokens.weight"):
            assert torch.equal(again[name], weight), name
        else:
            largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
            error = (again[name] - weight).unflatten(-1, (-1, 32)).abs()
            assert (error <= 1.01 * largest / 2 ** (bits - 1) + 1e-7).all(), name


@pytest.mark.parametrize(("form", "flags"), [("int8", []), ("int4", ["--calibrate", "none"])])
def test_released_model_exports_to_integers_and_back(form, flags, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Gravity is the force that pulls things down. " * 40)
    result = call(capsys, "export", RELEASED, "--to", form, "--text", text, *flags, "--out", tmp_path / "out")
    assert result["after"]["loss"] - result["before"]["loss"] < 0.3  # nats; +10 % of ordinary text's are as many
    report = call(capsys, "verify", tmp_path / "out", "--against", RELEASED, "--out", tmp_path / "v.json")
    assert all(check["holds"] for check in report["checks"])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = generate(load(tmp_path / "out"), [question], temperature=0, max_new_tokens=40)
    assert "Paris" in answer.text and answer.finish_reason == "stop"


def test_released_model_goes_to_a_hub_and_back(released, tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    call(capsys, "export", RELEASED, "--to", "hub", "--dtype", "bfloat16", "--out", "someone/small")
    again = load("someone/small", "bfloat16").state_dict()
    for name, weight in rounded(released, torch.bfloat16).items():
        assert torch.equal(again[name], weight), name


def test_released_model_exports_to_a_space(released, tmp_path, capsys):
    call(capsys, "export", RELEASED, "--to", "space", "--out", tmp_path / "space")
    assert_same_weights(load(tmp_path / "space" / "model"), released)
    assert "chat" in (tmp_path / "space" / "app.py").read_text()


# Evaluation


def test_released_model_scores_arc_easy(shared, capsys):
    """Half a standard error is 0.01: these are the figures of these weights to the last item."""
    path = shared / "arc" / "arc_easy_validation.jsonl"
    (values,) = call(capsys, "evaluate", RELEASED, "--tasks", path)["tasks"].values()
    assert (values["n"], round(values["acc"], 3), round(values["acc_norm"], 3)) == (570, 0.523, 0.430)


def test_released_model_bits_per_byte_of_wikitext(shared, tmp_path, capsys):
    path = tmp_path / "wiki.txt"
    path.write_text((shared / "wikitext2" / "wiki.test.raw").read_text("utf-8")[:60_000], "utf-8")
    values = call(capsys, "evaluate", RELEASED, "--text", path)["tasks"]["wiki"]
    assert values["bits_per_byte"] == pytest.approx(1.036, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "limit"), [("arc/arc_easy_validation.jsonl", 60), ("hellaswag/hellaswag_val_1000.jsonl", 20)]
)
def test_lm_eval_equals_ours_on_the_released_model(shared, tmp_path, monkeypatch, name, limit):
    """Item by item, its own model on the same weights."""
    monkeypatch.setattr("torch.utils.collect_env.get_pip_packages", lambda *_: ("pip", ""))
    assert agree(RELEASED, shared / name, limit, tmp_path, monkeypatch) == limit


# The doctor


def test_machine_report_verifies_the_released_model(tmp_path, monkeypatch, whole_checks, compiling):
    """Within a minute of a processor."""
    package = tmp_path / machine.RELEASED_MODEL
    package.mkdir()
    (package / "__init__.py").touch()
    os.link(RELEASED, package / RELEASED.name)
    monkeypatch.syspath_prepend(tmp_path)
    start = time.process_time()
    report = machine.verify_released_model(tmp_path)
    seconds = time.process_time() - start
    assert (report["installed"], report["file"], report["holds"]) == (True, RELEASED.name, True)
    assert {"logits float32", "greedy"} <= {check["name"] for check in report["checks"]}
    assert seconds < 60
