"""Every verb on an Apple GPU, which no machine here has: on a pretended one with torch's faults there (apple_gpu.py).

What this cannot show: operations that Metal lacks, numbers that it rounds otherwise, and its speed.
"""

import ast
import json
from pathlib import Path

import pytest
import torch
from apple_gpu import NO_FLOAT64, WRONG, AppleGpu, AppleTensor
from conftest import NANO
from test_dpo import pairs, written
from test_evaluate import LINES
from test_server import Running

from smolforge import cli, device, load
from smolforge.device import pick_device, to_device
from smolforge.errors import ConfigError
from smolforge.generation.stream import generate
from smolforge.runs import train
from smolforge.testing import sentences
from smolforge.training import loop
from smolforge.training.run_folder import read_records

ROOT = Path(__file__).parents[1]
MPS = torch.device("mps")
SHORT = {"steps": 4, "batch_tokens": 64, "checkpoint_every": 2, "evaluate_every": 4}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
RECIPES = {
    "muon": {"optim": {"name": "muon", "ema_decay": 0.9}, "data": {"intra_document_masking": True}},
    "adamw": {"train": {"activation_checkpointing": "selective", "z_loss": 1e-4, "micro_batch_size": 1}},
    "experts": {"model": EXPERTS, "report": {"to": ["tensorboard"], "norms_every": 2}},
}
"""The first has Muon, AdamW and EMA in one."""


@pytest.fixture(autouse=True)
def _speed_is_known(monkeypatch):
    """A quarter of a second less for each run."""
    monkeypatch.setattr(device, "_cached_flops_per_second", lambda *_: 1e11)
    device.warn_of_apple_gpu.cache_clear()


@pytest.fixture
def apple_gpu():
    with AppleGpu():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(300))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text) -> Path:
    """A run on the CPU."""
    folder = tmp_path_factory.mktemp("trained")
    return train(write_recipe(folder, text, {}), folder / "run").folder


def write_recipe(folder: Path, text: Path, changes: dict, **settings: str) -> Path:
    content = NANO | settings | {"train": NANO["train"] | SHORT, "data": {"sources": [str(text)]}}
    for section, values in changes.items():
        content |= {section: content.get(section, {}) | values}
    path = folder / "recipe.json"
    path.write_text(json.dumps(content))
    return path


def losses(run: Path) -> list[float]:
    return [record[key] for record in read_records(run / "metrics.jsonl") for key in ("loss", "grad_norm")]


def flat(results: dict[str, dict]) -> dict[str, float]:
    return {
        f"{task}.{name}": value
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, float | int)
    }


def call(capsys, *words) -> str:
    """Return what a command prints. It must end well."""
    code = cli.run([str(word) for word in words])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


# The pretended GPU has the faults


def test_apple_gpu_has_no_float64(apple_gpu):
    x = torch.ones(2, device=MPS)
    for convert in (
        x.double,
        lambda: x.to(torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
        lambda: torch.zeros(2, dtype=torch.float64).to(MPS),
        lambda: torch.tensor(0.5, dtype=torch.float64, device=MPS),
    ):
        with pytest.raises(TypeError, match=NO_FLOAT64):
            convert()
    assert x.cpu().double().dtype == torch.float64
    assert isinstance(torch.tensor(0.5, device=MPS), AppleTensor)


def test_apple_gpu_corrupts_copies_that_nobody_waits_for(apple_gpu):
    ids = torch.arange(3)
    assert ids.to(MPS, non_blocking=True).tolist() == [WRONG] * 3
    assert torch.empty_like(ids).copy_(ids.to(MPS), non_blocking=True).tolist() == [WRONG] * 3
    assert to_device(ids, MPS).tolist() == [0, 1, 2]


def test_apple_gpu_mixes_no_devices(apple_gpu):
    x = torch.ones(2, device=MPS)
    assert (x + torch.tensor(1.0)).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2)


# Each verb works on it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "muon" else pytest.mark.long) for name in RECIPES]
)
def test_training_on_an_apple_gpu_equals_the_cpu_and_resumes(name, tmp_path, text):
    recipe = write_recipe(tmp_path, text, RECIPES[name])
    cpu = train(recipe, tmp_path / "cpu")
    with AppleGpu():
        train(recipe, tmp_path / "mps", steps=2, **{"train.device": "mps", "optim.schedule.steps": 4})
        run = train(recipe, tmp_path / "mps", steps=4)
    assert losses(tmp_path / "mps") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    for weight, expected in zip(run.model.parameters(), cpu.model.parameters(), strict=True):
        assert isinstance(weight, AppleTensor)
        torch.testing.assert_close(weight.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_preference_tuning_with_lora_works_on_an_apple_gpu(tmp_path, trained, apple_gpu):
    source = written(tmp_path / "pairs.jsonl", pairs(8))
    changes = {"data": {"format": "pairs"}, "lora": {"rank": 2}, "train": {"device": "mps"}}
    run = train(write_recipe(tmp_path, source, changes, init_from=str(trained)), tmp_path / "run")
    assert all(loss > 0 for loss in losses(run.folder))
    assert generate(load(run.folder, device="mps"), ["the"], max_new_tokens=2)[0].token_ids


def test_evaluate_on_an_apple_gpu_equals_the_cpu(tmp_path, trained, text, capsys, apple_gpu):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    words = ("evaluate", trained, "--text", text, "--tasks", tmp_path / "items.jsonl", "--json")
    cpu, mps = (json.loads(call(capsys, *words, "--device", name))["tasks"] for name in ("cpu", "mps"))
    assert flat(mps) == pytest.approx(flat(cpu), rel=1e-5)


def test_generate_on_an_apple_gpu_equals_the_cpu(small, capsys, apple_gpu):
    sampling = ("--seed", 1, "--temperature", 0.8, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01)
    words = ("generate", small, "--prompt", "the model", "--repetition-penalty", 1.1, *sampling)
    words = (*words, "--max-new-tokens", 4, "--json")
    cpu, mps = (json.loads(call(capsys, *words, "--device", name))["token_ids"] for name in ("cpu", "mps"))
    assert cpu == mps


def test_server_on_an_apple_gpu_equals_the_cpu(trained, apple_gpu):
    bodies = [
        {"prompt": "the model", "max_tokens": 8, "temperature": 0, "logprobs": 2},
        {"prompt": ["the", "a token"], "max_tokens": 8, "seed": 1, "logit_bias": {"5": 2}, "presence_penalty": 1},
    ]
    answers = {}
    for name in ("cpu", "mps"):
        with Running(model=load(trained, device=name)) as server:
            answers[name] = [server.post("/v1/completions", model="tiny", **body).json()["choices"] for body in bodies]
    assert [choice["text"] for choices in answers["mps"] for choice in choices] == [
        choice["text"] for choices in answers["cpu"] for choice in choices
    ]


@pytest.mark.parametrize(("module", "name"), [(loop, "widest_float"), (device, "is_async")])
def test_training_on_an_apple_gpu_fails_where_it_is_taken_for_another_device(
    module, name, monkeypatch, tmp_path, text, apple_gpu
):
    value = torch.float64 if name == "widest_float" else True
    monkeypatch.setattr(module, name, lambda device: value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with pytest.raises((TypeError, IndexError)):
        train(write_recipe(tmp_path, text, {"train": {"device": "mps"}}), tmp_path / "run")


# It must be asked for


def test_auto_takes_the_cpu_where_only_an_apple_gpu_is_present(apple_gpu, caplog):
    assert pick_device("auto") == torch.device("cpu")
    assert not caplog.messages
    assert [pick_device("mps"), pick_device("mps")] == [MPS, MPS]
    (warning,) = caplog.messages
    assert "no run on an Apple GPU" in warning
    assert (ROOT / "docs" / warning.rpartition("docs/")[2]).is_file()


def test_float64_is_refused_on_an_apple_gpu(tmp_path, text, trained, apple_gpu):
    with pytest.raises(ConfigError, match="float64, which the device 'mps' does not have"):
        load(trained, dtype="float64", device="mps")
    with pytest.raises(ConfigError, match="float64"):
        train(write_recipe(tmp_path, text, {"train": {"device": "mps", "dtype": "float64"}}), tmp_path / "run")
    assert load(trained, dtype="float64").lm_head_weight.dtype == torch.float64


def test_only_cuda_is_copied_to_without_waiting():
    """Each `non_blocking` in the package is decided by `is_async`."""
    decisions = [
        ast.unparse(keyword.value)
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "non_blocking"
    ]
    assert len(decisions) == 2
    assert all(decision.startswith("is_async(") for decision in decisions), decisions
    assert [device.is_async(torch.device(name)) for name in ("cuda", "mps", "cpu")] == [True, False, False]
