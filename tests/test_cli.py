"""The command line: exit codes, one sentence for every mistake, JSON for scripts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import NANO

from smolforge import __version__, cli
from smolforge.checkpoint import training_state
from smolforge.cli.inspect import corpus, report
from smolforge.cli.overrides import parse_overrides
from smolforge.cli.run_display import metrics_parts, precision_line
from smolforge.config import Train
from smolforge.device import is_out_of_memory
from smolforge.errors import ConfigError
from smolforge.operating_system import SCHEDULER_SIGNALS
from smolforge.runs import train
from smolforge.testing import sentences
from smolforge.training import loop


@pytest.fixture
def recipe_file(tmp_path, text_file):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    return str(path)


@pytest.fixture
def finished(tmp_path, recipe_file):
    return str(train(recipe_file, tmp_path / "finished").folder)


def call(capsys, *words):
    """(exit code, standard output, standard error)"""
    code = cli.run([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def fresh(*commands, modules):
    """What a new process prints for command lines, and which of these modules they imported."""
    check = f"print(sorted({set(modules)} & set(sys.modules)))"
    program = f"import sys; from smolforge import cli; [cli.run(words) for words in {commands}]; {check}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *said, imported = done.stdout.strip().splitlines()
    return " ".join(" ".join(said).split()), imported


def test_help_imports_no_heavy_module():
    said, imported = fresh(["--help"], modules=["torch", "pydantic", "numpy"])
    assert imported == "[]"
    assert all(name in said for name in cli.COMMANDS)


def test_command_help_works_without_torch():
    said, imported = fresh(*([name, "--help"] for name in cli.COMMANDS), modules=["torch"])
    assert imported == "[]"
    assert all(text.split(",")[0] in said for text in cli.COMMANDS.values())


def test_version_is_printed(capsys):
    assert call(capsys, "--version") == (0, f"{__version__}\n", "")


def test_cli_trains_resumes_generates_and_inspects(capsys, tmp_path, recipe_file):
    run = tmp_path / "run"
    code, out, err = call(capsys, "train", recipe_file, "--run", run, "--train.steps", "4", "--optim.schedule.steps=8")
    assert (code, out) == (0, "")
    assert "parameters" in err
    assert "finished" in err
    code, out, err = call(capsys, "train", recipe_file, "--run", run, "--train.steps", "8", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["step"] == 8
    code, out, _ = call(
        capsys, "generate", run, "--prompt", "the model", "--max-new-tokens", "5", "--json", "--seed", 1
    )
    answer = json.loads(out)
    assert code == 0
    assert {"text", "token_ids", "finish_reason", "tokens_per_second"} == set(answer)
    code, out, _ = call(capsys, "generate", run, "--prompt", "the model", "--max-new-tokens", "5", "--seed", 1)
    assert out == f"the model{answer['text']}\n"
    facts = json.loads(call(capsys, "inspect", run, "--json")[1])
    assert (facts["state"], facts["step"], facts["steps"]) == ("finished", 8, 8)


def test_cli_prepares_and_inspects_a_corpus(capsys, tmp_path, text_file):
    code, out, _ = call(capsys, "prepare", text_file, "--out", tmp_path / "corpus", "--vocab-size", 300, "--json")
    counts = json.loads(out)
    assert code == 0
    assert counts["bytes"] == len(text_file.read_bytes())
    facts = json.loads(call(capsys, "inspect", tmp_path / "corpus", "--json")[1])
    assert facts["train"]["tokens"] + facts["held_out"]["tokens"] == counts["tokens"]
    assert facts["windows"][0].startswith("0: the")
    assert sum(row["tokens"] for row in facts["histogram"]) == counts["tokens"]
    assert sum(row["documents"] for row in facts["histogram"]) == counts["documents"]
    code, out, _ = call(capsys, "inspect", tmp_path / "corpus", "--figure", tmp_path / "lengths.svg")
    assert "windows of 64 tokens" in out
    assert max(map(len, "\n".join(corpus.length_lines(facts, 80)).splitlines())) < 80
    assert "tokens a document" in (tmp_path / "lengths.svg").read_text()
    index = tmp_path / "corpus" / "train" / "00000.ds.index"
    whole = index.read_bytes()
    for content in (whole[:-8], b"", bytes(len(whole))):
        index.write_bytes(content)
        code, _, err = call(capsys, "inspect", tmp_path / "corpus")
        assert code == 3
        assert "where corpus.json says" in err
    code, out, _ = call(capsys, "prepare", text_file, "--out", tmp_path / "few", "--vocab-size", 300, "--tokens", "1K")
    assert code == 0
    assert "held out" in out


def test_inspect_reports_the_parameters_of_a_model(capsys):
    facts = json.loads(call(capsys, "inspect", "smollm2-135m", "--json")[1])
    assert facts["parameters"]["total"] == 134_515_008
    assert facts["parameters"]["embedding"] == 28_311_552
    assert facts["parameters"]["non_embedding"] == 106_203_456
    assert facts["kv_bytes_per_token"] == 2 * 30 * 192 * 4
    untied = json.loads(call(capsys, "inspect", "smollm2-135m-untied", "--json")[1])["parameters"]
    assert untied["total"] == 162_826_560
    assert untied["non_embedding"] == 106_203_456
    code, out, _ = call(capsys, "inspect", "smollm2-135m")
    assert code == 0
    assert re.search(r"^layers.N.self_attn.k_proj +attention +192 x 576 +30 +3,317,760 +2.47%$", out, re.MULTILINE)
    assert "Counted twice, or untied, it would be 162,826,560: 162.8M instead of 134.5M." in out
    assert "Tied to the embedding it would be 134,515,008" in call(capsys, "inspect", "smollm2-135m-untied")[1]
    experts = json.loads(call(capsys, "inspect", "moe-160m", "--json")[1])
    assert experts["parameters"]["active"] == 81_569_088
    assert sum(row["parameters"] for row in experts["table"]) == experts["parameters"]["total"] == 161_195_328


def test_inspect_reads_recipes_and_the_machine(capsys, recipe_file):
    facts = json.loads(call(capsys, "inspect", recipe_file, "--json", "--train.steps", "20")[1])
    assert facts["tokens"] == 20 * 128
    assert facts["settings"]["train"]["steps"] == 20
    assert call(capsys, "inspect", recipe_file)[0] == 0
    facts = json.loads(call(capsys, "inspect", "machine", "--json")[1])
    assert facts["float32_flops_per_second"] > 1e9


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("train", 2, "train needs RECIPE; smolforge train --help explains it"),
        ("train nano", 2, "train needs --run; smolforge train --help explains it"),
        ("train nano --runn r", 2, "train needs --run, not --runn"),
        ("train nano --run", 2, "train needs --run; smolforge train --help explains it"),
        ("export runs/a --to gguf", 2, "export needs --out; smolforge export --help explains it"),
        ("trian nano --run r", 2, "train"),
        ("train nano --run r --train.stpes 5", 2, "there is no setting --train.stpes. Did you mean --train.steps?"),
        ("train nano --run r --train.steps", 2, "--train.steps needs a value"),
        ("train nano --run r --train.steps many", 2, "train.steps is 'many'; it should be a whole number above 0"),
        ("train nano --run r --train.steps 5 --train.steps 6", 2, "--train.steps is given twice"),
        ("train nano --run r --lr 5", 2, "there is no setting --lr. smolforge inspect RECIPE lists all."),
        ("train nano --run r --fresh=maybe", 2, "--fresh is 'maybe'; it should be true or false"),
        ("train nano --run r what", 2, "'what' is one word too many"),
        (
            "train nano --run r --train.sequence-length 100",
            2,
            "nano.toml with train.sequence_length changed: train: batch",
        ),
        ("train nope.toml --run r", 2, "there is no recipe 'nope.toml'"),
        ("train nano --run r --data.sources nope.txt", 3, "'nope.txt'"),
        ("train nano --run r --tokenizer nope", 3, "there is no tokenizer.json at nope"),
        ("train nano --run r --budget soon", 2, "like 5m or 1h"),
        ("train nano --run r --model.num-attention-heads 5", 2, "must be a multiple of num_attention_heads (5)"),
        ("train nano --run r --model.preset smollm2", 2, "there is no preset 'smollm2'"),
        ("train nano --run r --train.device cuda:7", 4, "the device 'cuda:7' cannot be used here"),
        ("generate smollm2-135m --prompt x", 2, "its published weights are HuggingFaceTB/SmolLM2-135M"),
        ("generate nowhere --prompt x", 2, "there is no model 'nowhere'"),
        ("generate smollm2-nano --random --prompt x", 3, "without a tokenizer"),
        ("generate smollm2-nano --random --prompt x --temperature -1", 2, "temperature is -1.0"),
        ("generate smollm2-135m --temperature hot", 2, "--temperature is 'hot'; it should be a finite number"),
        ("generate smollm2-135m a few words", 2, "'a' is one word too many"),
        ("prepare nope.txt --out c", 3, "'nope.txt'"),
        ("prepare --out c --tokens lots", 2, "--tokens is 'lots'; it should be a count like 50000, 10M or 2B"),
        ("prepare --out c --vocab-size 10", 2, "at least 259 and at most 1,048,576, not 10"),
        ("prepare --out c --vocab-size 1000000000", 2, "at most 1,048,576, not 1000000000"),
        ("prepare --out c --tokens 0", 2, "--tokens is '0'; it should be a count above 0, like 50000, 10M or 2B"),
        ("prepare --out c --tokens=", 2, "--tokens is ''; it should be a count"),
        (
            "prepare --out c --workers 0",
            2,
            "--workers is 0; it should be at least 1, or left out for one for each core",
        ),
        ("prepare --out c --partition x", 2, "--executor slurm takes it"),
        ("prepare --out c --executor slurm --hours 0", 2, "--hours is 0; it should be at least 1"),
        ("prepare --out .", 2, ". exists and is not a corpus; give another folder"),
        ("prepare --out there/c", 2, "there/c cannot be made (Not a directory); give another folder"),
        ("prepare there.jsonl --out c", 3, "has no text under the key 'text'; name the right one with --text-key"),
        ("prepare there.jsonl --out c --filter b>1", 3, "line 1 has no key 'b' (--filter); it has a."),
        ("prepare there.jsonl --out c --filter a>>1", 2, "it should be a list of a condition"),
        ("prepare ~nobody-here/x --out c", 3, "match for the data source '~nobody-here/x'"),
        ("inspect nowhere", 2, "'nowhere' is no model, corpus or run, and there is no recipe 'nowhere'"),
        ("inspect smollm2-135m --train.steps 5", 2, "settings are for recipes; smollm2-135m is none"),
        ("inspect nano --train.stpes 5", 2, "Did you mean --train.steps?"),
        ("generate smollm2-135m --random --dtype int3", 2, "dtype is 'int3'"),
    ],
)
def test_mistakes_give_one_sentence_and_an_exit_code(capsys, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("a file")
    (tmp_path / "there.jsonl").write_text('{"a": 1}')
    found, out, err = call(capsys, *words.split())
    assert (found, out) == (code, "")
    assert said in err
    assert err.startswith("smolforge: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_flag_shows_the_traceback(capsys):
    _, _, err = call(capsys, "generate", "nowhere", "--prompt", "x", "--debug")
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("smolforge: there is no model")


def test_train_reports_an_unwritable_folder(capsys, tmp_path, recipe_file):
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, "train", recipe_file, "--run", tmp_path / "file" / "run")
    assert code == 4
    assert "Not a directory" in err


def test_flags_parse_values_and_lists():
    assert parse_overrides(["--train.steps", "5", "--data.sources", "a,b", "--data.sources=c"]) == {
        "train.steps": "5",
        "data.sources": ["a", "b", "c"],
    }
    assert parse_overrides(["--optim.learning-rate=1e-3", "--optim.betas", "0.9,0.99"]) == {
        "optim.learning_rate": "1e-3",
        "optim.betas": ["0.9", "0.99"],
    }
    assert parse_overrides(["--data.sources", '["a,b", "c"]']) == {"data.sources": ["a,b", "c"]}
    assert parse_overrides(["--model", "smollm2-nano"]) == {"model.preset": "smollm2-nano"}
    with pytest.raises(ConfigError, match=r"--data.sources is '\[a'; it should be a list such as a,b"):
        parse_overrides(["--data.sources", "[a"])


def test_metrics_are_formatted():
    metrics = {
        "loss": 2.5,
        "tokens_per_second": 1234.5,
        "mfu": 0.416,
        "learning_rate": 0.003,
        "grad_norm": 0.5,
        "peak_memory_bytes": 2**30,
    }
    rest = ["lr 3.00e-03", "grad 0.50", "1.00 GiB"]
    assert metrics_parts(metrics) == ["loss 2.500", "1,234 tokens/s", "MFU 42%", *rest]
    running = {"tokens_per_second_median": 2000.0, "seconds_left": 61.0}
    assert metrics_parts(metrics | running) == ["loss 2.500", "2,000 tokens/s", "MFU 42%", *rest, "61 s left"]


def test_arithmetic_line_names_dtype_and_compilation():
    assert precision_line(Train(dtype="float32", compile=False)) == "float32"
    dear = Train(dtype="bfloat16", compile=True, activation_checkpointing="full")
    assert precision_line(dear) == (
        "bfloat16, compiled, for which the first step takes a minute or two, full activation checkpointing"
    )


def test_profile_flag_writes_a_trace_and_a_summary(tmp_path, recipe_file, capsys):
    words = ["train", recipe_file, "--run", tmp_path / "run", "--train.steps", "4", "--profile"]
    assert call(capsys, *words, 2)[0] == 0
    assert (tmp_path / "run" / "profile" / "trace.json.gz").is_file()
    summary = (tmp_path / "run" / "profile" / "summary.txt").read_text()
    assert summary.startswith("2 steps of ")
    assert "aten::mm" in summary
    code, _, said = call(capsys, *words, 0)
    assert (code, said) == (2, "smolforge: --profile is 0; it should be a number of steps above 0\n")


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."),
    RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_names_settings_that_need_less(tmp_path, recipe_file, capsys, monkeypatch, error):
    def backward(*_, **__):
        raise error

    monkeypatch.setattr(loop, "forward_backward", backward)
    one, full = ("--train.micro-batch-size", 1), ("--train.activation-checkpointing", "full")
    for flags, way_out in (
        ((), "--train.micro-batch-size 2 (it is 4) or --train.activation-checkpointing full needs less"),
        (one, "there is; --train.activation-checkpointing full needs less"),
        (one + full, "there is; a smaller model, or a shorter --train.sequence-length, needs less"),
    ):
        code, _, said = call(capsys, "train", recipe_file, "--run", tmp_path / "run", *flags)
        assert code == 4
        assert way_out in said


def test_out_of_memory_is_recognized_on_cpu():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.long)]
)
def test_signal_to_a_training_process_saves_and_exits(tmp_path, recipe_file, number, code):
    command = [sys.executable, "-m", "smolforge", "train", recipe_file, "--run", str(tmp_path / "run")]
    started = subprocess.Popen(
        [*command, "--train.steps", "100000", "--train.evaluate-every", "none"], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.stat().st_size < 1000:
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(number)
    err = started.communicate(timeout=60)[1]
    assert started.returncode == code
    last = re.search(r"after step (\d+), everything is saved", " ".join(err.split()))
    assert training_state.list_checkpoints(tmp_path / "run")[-1] == training_state.checkpoint_dir(
        tmp_path / "run", int(last[1])
    )
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [
        ("train", signal.SIGINT, 130),
        ("train", signal.SIGTERM, 75),
        ("train", SCHEDULER_SIGNALS[0], 75),
        ("inspect", signal.SIGINT, 130),
        ("inspect", signal.SIGTERM, 130),
    ],
)
def test_signal_during_imports_prints_one_line(tmp_path, verb, number, code):
    """A library in the place of cyclopts sends it to whoever imports it."""
    (tmp_path / "cyclopts.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\n")
    command, environment = [sys.executable, "-m", "smolforge", verb], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"smolforge: stopped by {number.name} before it began\n"


def test_signal_ignored_by_the_shell_stays_ignored(tmp_path):
    (tmp_path / "cyclopts.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nraise SystemExit(7)\n")
    command, environment = (
        f"trap '' INT; {sys.executable} -m smolforge inspect",
        os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert subprocess.run(["bash", "-c", command], env=environment, check=False).returncode == 7


def test_ctrl_c_before_the_command_prints_one_line(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_cli", interrupted)
    assert call(capsys, "inspect", "machine") == (130, "", "smolforge: interrupted\n")


def test_generate_reads_stdin_and_tolerates_a_closed_pipe(tmp_path, finished):
    command = f"printf 'the model' | {sys.executable} -m smolforge generate {finished} --max-new-tokens 60 | head -c 3"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=True)
    assert done.stdout == "the"
    assert done.stderr == ""


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_generate_reports_a_full_disk_on_stdout(finished):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "smolforge", "generate", finished, "--prompt", "x", "--max-new-tokens", "3"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_result_reports_a_full_disk_on_stdout():
    """What is printed without a flush, as all results are."""
    command = [sys.executable, "-m", "smolforge", "inspect", "smollm2-135m", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, "smolforge: [Errno 28] No space left on device\n")


@pytest.mark.long
def test_result_tolerates_a_closed_pipe():
    command = f"{sys.executable} -m smolforge inspect smollm2-135m --json | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_generate_refuses_a_too_long_prompt(capsys, finished):
    code, _, err = call(capsys, "generate", finished, "--prompt", sentences(30))
    assert code == 2
    assert "this model takes 128 with its answer" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory: you tried"), 4, "micro-batch-size"),
        (OSError(28, "No space left on device", "x.bin"), 4, "x.bin: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("embedded null byte"), 2, "a name has a zero byte in it"),
        (OverflowError("int too large to convert to float"), 2, "a number that was given is too large"),
        (ZeroDivisionError("division by zero"), 1, "this should not have happened: ZeroDivisionError"),
    ],
)
def test_machine_and_internal_errors_are_one_line(capsys, monkeypatch, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(report, "build_report", fail)
    found, out, err = call(capsys, "inspect", "machine")
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert said in err
