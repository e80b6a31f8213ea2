"""Who hears of a run: each metric at each step once, whatever happens to the run or to them."""

import json
import math
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from children import train_until
from conftest import NANO
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ServerAccumulator
from tensorboard.util.tensor_util import make_ndarray

from smolforge import tracking
from smolforge.cli import run as command
from smolforge.cli.overrides import overrides_from_env
from smolforge.config import Report
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.runs import callbacks as workshop_module
from smolforge.runs import train
from smolforge.testing import tiny_model
from smolforge.testing.processes import in_child
from smolforge.tracking import Ended, Started, Stepped, histograms, rows
from smolforge.tracking.histograms import Watch
from smolforge.training.run_folder import read_records

EVERYTHING = ("tensorboard", "wandb", "trackio")
NORMS = ("grad_norm", "weight_norm")


@pytest.fixture
def recipe_file(tmp_path, text_file):
    path = tmp_path / "tiny.json"
    often = {"keep_last": 9, "checkpoint_every": 2, "sample_every": 4, "sample_prompts": ["", "The"]}
    sample = {"max_new_tokens": 4}
    whole = NANO | {"train": NANO["train"] | often, "data": {"sources": [str(text_file)]}, "sample": sample}
    path.write_text(json.dumps(whole))
    return path


def through_two_kills(recipe, run, **overrides):
    """A run of eight steps with checkpoints at the even ones, killed after its 3rd and its 6th."""
    for step in (3, 6):
        assert in_child(train_until, step, recipe, run, overrides) == -9
    assert in_child(train_until, None, recipe, run, overrides) == 0


def told(run, precise=True):
    """(tag, step) to value of all numbers in metrics.jsonl, as trackers should have them."""
    return {
        (tag, record["step"]): value if precise else float(np.float32(value))
        for record in read_records(run / "metrics.jsonl")
        for tag, value in rows.values(record).items()
    }


# TensorBoard, by its own reader


def scalars(run):
    """What its library's reader finds, and the server's, which also has texts and histograms."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    served = ServerAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    found = [(tag, each.step, each.value) for tag in events.Reload().Tags()["scalars"] for each in events.Scalars(tag)]
    assert max(Counter((tag, step) for tag, step, _ in found).values()) == 1
    shown = [
        (tag, each.step, make_ndarray(each.tensor_proto).item())
        for tag in served.PluginTagToContent("scalars")
        for each in served.Tensors(tag)
    ]
    assert sorted(map(str, shown)) == sorted(map(str, found))  # not a number is never equal
    return served, {(tag, step): value for tag, step, value in found}


def texts(events, tag):
    return [(each.step, make_ndarray(each.tensor_proto).item().decode()) for each in events.Tensors(tag)]


@pytest.mark.heavy
def test_tensorboard_has_each_step_once_after_two_kills(recipe_file, tmp_path):
    run = tmp_path / "run"
    through_two_kills(recipe_file, run, **{"report.to": ["tensorboard"], "report.norms_every": 3})
    events, found = scalars(run)
    assert found == told(run, precise=False)
    assert {("train/weight_norm", 3), ("validation/loss", 4), ("seconds/data", 8), ("speed/mfu", 1)} <= found.keys()
    samples = read_records(run / "samples.jsonl")
    for number, prompt in enumerate(("", "The")):
        drawn = [(each["step"], prompt + each["text"]) for each in samples if each["prompt"] == prompt]
        shown = [(step, said.replace("\n    ", "\n")) for step, said in texts(events, f"samples/{number}")]
        assert shown == [(step, f"    {said}") for step, said in drawn]
    assert len(list((run / "tensorboard").iterdir())) == 3


@pytest.fixture
def rewound(recipe_file, poison):
    """Trains a run whose 3rd to 5th loss are none, so that it is taken back to its 2nd step."""

    def make(run, to):
        poison("loss", 2, 3, 4)
        train(recipe_file, run, **{"report.to": [to]})
        assert [each["kind"] for each in read_records(run / "incidents.jsonl")] == ["skip", "skip", "skip", "rewind"]

    return make


def test_tensorboard_shows_steps_after_a_rewind(rewound, tmp_path):
    run = tmp_path / "run"
    rewound(run, "tensorboard")
    events, found = scalars(run)
    assert found == told(run, precise=False)
    ((step, said),) = texts(events, "incidents")
    assert step == 2
    assert said.startswith("rewind: the loss is nan") and said.endswith("back from step 5")


def test_tensorboard_marks_a_skipped_step(recipe_file, tmp_path, poison):
    poison("loss", 2)
    run = train(recipe_file, tmp_path / "run", **{"report.to": ["tensorboard"]})
    events, found = scalars(run.folder)
    assert math.isnan(found["train/loss", 3])
    assert texts(events, "incidents") == [(3, "skip: the loss is nan")]


def test_trackers_added_later_receive_all_metrics(recipe_file, tmp_path):
    run = tmp_path / "run"
    train(recipe_file, run, steps=4)
    for name in EVERYTHING:
        train(recipe_file, run, steps=6, **{"report.to": [name]})
    wanted = told(run)
    assert scalars(run)[1] == told(run, precise=False)
    assert in_wandb(run) == wanted
    assert in_trackio(run) == wanted


# W&B, from the files it keeps offline


def wandb_records(run):
    """All records of a run's offline folders, in order. A file is a log as LevelDB has it, of protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        content, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:  # what is left of a block is too small for a header
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", content, place)
            if kind == 0:
                break
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # full, or last
                record = Record()
                record.ParseFromString(whole)
                yield record
                whole = b""


def wandb_records_of_all(run):
    """The same once W&B's own process has written the end of a run of this one, which it does by and by."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = list(wandb_records(run))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise TimeoutError("W&B writes no end")


def wandb_rows(run):
    for record in wandb_records_of_all(run):
        if record.HasField("history"):
            yield {"/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in record.history.item}


def in_wandb(run):
    """(tag, step) to value, of each step's last row."""
    last = {row[rows.GLOBAL_STEP]: row for row in wandb_rows(run)}
    return {
        (tag, step): value
        for step, row in last.items()
        for tag, value in row.items()
        if isinstance(value, int | float) and not tag.startswith(("_", "samples/")) and tag != rows.GLOBAL_STEP
    }


@pytest.mark.long
@pytest.mark.heavy
def test_wandb_has_each_step_after_two_kills(recipe_file, tmp_path):
    run = tmp_path / "run"
    through_two_kills(recipe_file, run, **{"report.to": ["wandb"], "report.watch": "all", "report.watch_every": 4})
    assert in_wandb(run) == told(run)
    begun = [record.run for record in wandb_records(run) if record.HasField("run")]
    assert {each.run_id for each in begun} == {json.loads((run / "tracking.json").read_text())["id"]}
    assert {each.project for each in begun} == {"smolforge"}
    config = {each.key: json.loads(each.value_json) for each in begun[0].config.update}
    assert config["recipe"]["train"]["steps"] == 8
    assert config["machine"]["torch"] == torch.__version__
    *_, last = wandb_rows(run)
    assert last["gradients/model.norm.weight/_type"] == last["parameters/model.norm.weight/_type"] == "histogram"
    assert (last["samples/_type"], last["samples/nrows"]) == ("table-file", 2)


def test_wandb_numbers_repeated_steps_anew(rewound, tmp_path):
    run = tmp_path / "run"
    rewound(run, "wandb")
    found = [(row["_step"], row[rows.GLOBAL_STEP]) for row in wandb_rows(run)]
    assert found == [(1, 1), (2, 2), (3, 3), (4, 4), *((step + 3, step) for step in range(3, 9))]
    assert in_wandb(run) == told(run)


def test_wandb_gets_checkpoints_on_request(recipe_file, tmp_path):
    for asked, wanted in ((None, []), ("end", [8]), ("checkpoint", [2, 4, 6, 8])):
        run = train(recipe_file, tmp_path / str(asked), **{"report.to": ["wandb"], "report.log_model": asked})
        given = [record.artifact for record in wandb_records_of_all(run.folder) if record.HasField("artifact")]
        models = [each for each in given if each.type == "model"]
        assert [json.loads(each.metadata)["step"] for each in models] == wanted
        for artifact in models:
            names = {entry.path for entry in artifact.manifest.contents}
            assert {"model.safetensors", "training/optimizer.safetensors", "manifest.json"} <= names


# Trackio


def in_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.name}-{json.loads((run / 'tracking.json').read_text())['id']}"
    logs = SQLiteStorage.get_logs("smolforge", name)
    found = [
        ((tag, row[rows.GLOBAL_STEP]), value)
        for row in logs
        for tag, value in row.items()
        if isinstance(value, int | float) and tag not in ("step", rows.GLOBAL_STEP)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_trackio_has_each_step_once_after_two_kills(recipe_file, tmp_path):
    run = tmp_path / "run"
    through_two_kills(recipe_file, run, **{"report.to": ["trackio"]})
    assert in_trackio(run) == told(run)


# Trackers that fail


@pytest.mark.parametrize("where", ["begin", "rows"])
def test_failing_tracker_is_reported_once_and_dropped(recipe_file, tmp_path, monkeypatch, caplog, where):
    from smolforge.tracking import wandb

    def fail(*_):
        raise TimeoutError("no answer\nfrom api.wandb.ai")

    target, name = (wandb, "create_tracker") if where == "begin" else (wandb.StepRows, "step")
    monkeypatch.setattr(target, name, fail)
    run = train(recipe_file, tmp_path / "run", **{"report.to": ["wandb", "tensorboard"]})
    assert scalars(run.folder)[1] == told(run.folder, precise=False)
    (said,) = [record.message for record in caplog.records if record.name == "smolforge" and record.levelno > 20]
    assert said.startswith("wandb hears no more of this run: no answer from api.wandb.ai. Training goes on")


@pytest.mark.parametrize("content", ["", "[]", "{}", '"id"', "\x00"])
def test_lost_tracking_id_is_reported(tmp_path, content):
    (tmp_path / "tracking.json").write_text(content)
    with pytest.raises(InvalidFileError, match=r"tracking.json has no id; without that file the run gets a new one"):
        tracking.tracking_id(tmp_path)
    (tmp_path / "tracking.json").unlink()
    assert tracking.tracking_id(tmp_path) == tracking.tracking_id(tmp_path)


def test_full_disk_ends_tensorboard_but_not_the_run(recipe_file, tmp_path, caplog):
    assert Path("/dev/full").exists()
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / ".lock").touch()
    tracker = tracking.import_tracker("tensorboard")
    heard = tracking.Trackers({"tensorboard": tracker})
    recipe = train(recipe_file, tmp_path / "other", steps=2).recipe
    heard(Started(run, recipe, {}, 0, 0, list))
    heard.active["tensorboard"].file.close()
    heard.active["tensorboard"].file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    heard(Stepped({"step": 1, "loss": 1.0}))
    assert "tensorboard hears no more of this run: [Errno 28]" in caplog.text
    assert heard.active == {}


def test_missing_tracker_package_is_reported_before_start(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MissingResourceError, match=r'^report.to has wandb, .* pip install "smolforge.wandb."$'):
        train(recipe_file, tmp_path / "run", **{"report.to": ["wandb"]})
    assert command(["train", str(recipe_file), "--run", str(tmp_path / "b"), "--report.to", "trackio"]) == 4
    assert not (tmp_path / "b" / "recipe.toml").exists()


def test_trackers_receive_how_the_run_ended(recipe_file, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(tracking.Trackers, "__call__", lambda self, event: heard.append(event))
    train(recipe_file, tmp_path / "run", steps=4)
    assert heard[-1] == Ended("finished", "")
    with pytest.raises(ConfigError):
        train(recipe_file, tmp_path / "run", steps=2)
    assert heard[-1].state == "failed"
    assert heard[-1].reason.startswith("train.steps is 2 and the run is at step 4")


# What is watched


def test_norms_are_computed_only_on_request(recipe_file, tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("nobody asked")

    monkeypatch.setattr(Watch, "record", asked)
    monkeypatch.setattr(workshop_module, "weight_norm", asked)
    train(recipe_file, tmp_path / "run", **{"report.norms_every": None})
    with pytest.raises(AssertionError, match="nobody asked"):
        train(recipe_file, tmp_path / "other", **{"report.norms_every": 4})


def test_watched_norms_add_up_to_the_total(recipe_file, tmp_path):
    settings = {"report.to": ["tensorboard"], "report.watch": "all", "report.watch_every": 4, "report.norms_every": 4}
    run = train(recipe_file, tmp_path / "run", **settings)
    for record in read_records(run.folder / "metrics.jsonl"):
        parts = {kind: [value for name, value in record.items() if name.startswith(f"{kind}/")] for kind in NORMS}
        if record["step"] % 4:
            assert parts == {"grad_norm": [], "weight_norm": []}
        else:
            for kind, found in parts.items():
                assert len(found) == len(list(run.model.parameters()))
                assert math.hypot(*found) == pytest.approx(record[kind], rel=1e-4)
    events, _ = scalars(run.folder)
    names = dict(run.model.named_parameters())
    for kind in ("gradients", "parameters"):
        for name, weight in names.items():
            first, last = (make_ndarray(each.tensor_proto) for each in events.Tensors(f"{kind}/{name}"))
            assert first[:, 2].sum() == last[:, 2].sum() == weight.numel()
    found = make_ndarray(events.Tensors("parameters/model.norm.weight")[-1].tensor_proto)
    weight = names["model.norm.weight"].detach()
    assert (found[0, 0], found[-1, 1]) == pytest.approx((float(weight.min()), float(weight.max())))


@given(st.lists(st.floats(width=32), max_size=200))
@example([3.4028234663852886e38, -1.0141204801825835e31])
@example([3.4028234663852886e38, -3.4028234663852886e38])
@example([2.0**100])
@example([2.0**-149, 3 * 2.0**-149])
def test_histogram_counts_every_finite_value(values):
    counts, edges = histograms.histogram(torch.tensor(values))
    finite = [value for value in values if math.isfinite(value)]
    assert counts.sum() == len(finite)
    assert len(edges) == len(counts) + 1
    assert all(edges[0] <= value <= edges[-1] for value in finite)


def test_watched_gradients_are_before_clipping(recipe_file, tmp_path):
    settings = {"report.watch": "gradients", "report.watch_every": 1, "optim.max_grad_norm": 1e-3}
    run = train(recipe_file, tmp_path / "run", steps=2, **settings)
    for record in read_records(run.folder / "metrics.jsonl"):
        parts = [value for name, value in record.items() if name.startswith("grad_norm/")]
        assert math.hypot(*parts) == pytest.approx(record["grad_norm"], rel=1e-4)
        assert record["grad_norm"] > 1e-2


def test_watch_waits_for_its_interval():
    model, told = tiny_model(), []
    looking = Watch(model, Report(watch="gradients", watch_every=3), told.append)
    sum(weight.sum() for weight in model.parameters()).backward()
    looking.gradients(2)
    assert looking.norms == {}
    looking.gradients(3)
    assert len(looking.finish_step(3)) == len(told[0].histograms) == len(list(model.parameters()))
    assert looking.norms == {}


# Names and variables


def test_metric_tags_are_grouped():
    wanted = {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "validation_bits_per_byte": "validation/bits_per_byte",
        "seconds_between": "seconds/between",
        "seconds_left": "seconds/left",
        "tokens_per_second": "speed/tokens_per_second",
        "tokens": "train/tokens",
        "mfu": "speed/mfu",
        "peak_memory_bytes": "machine/peak_memory_bytes",
        "cpu_percent": "machine/cpu_percent",
        "grad_norm/model.norm.weight": "grad_norm/model.norm.weight",
    }
    assert {name: rows.tag(name) for name in wanted} == wanted
    assert rows.values({"step": 3, "loss": None, "left_out": "x", "a": True}).keys() == {"train/loss"}


def test_wandb_variables_become_settings():
    assert overrides_from_env({}) == {}
    assert overrides_from_env({"WANDB_WATCH": "all", "WANDB_LOG_MODEL": "checkpoint"}) == {
        "report.watch": "all",
        "report.log_model": "checkpoint",
    }
    assert overrides_from_env({"WANDB_WATCH": "false"}) == {"report.watch": "none"}
    with pytest.raises(ConfigError, match="WANDB_LOG_MODEL is 'maybe'; it should be end, checkpoint or false"):
        overrides_from_env({"WANDB_LOG_MODEL": "maybe"})


def test_flag_overrides_a_wandb_variable(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    words = ["train", str(recipe_file), "--run", str(tmp_path / "run"), "--report.watch-every", "4", "--json"]
    assert command([*words, "--train.steps", "4"]) == 0
    assert command([*words, "--train.steps", "8", "--report.watch", "none"]) == 0
    watched = [any("/" in name for name in record) for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert watched == [False] * 3 + [True] + [False] * 4
