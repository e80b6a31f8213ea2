"""Where the time goes, of tiny steps."""

import gzip
import json
import logging
import re

import pytest
import torch

from smolforge.models.decoder import build
from smolforge.runs.profiler import Profiler
from smolforge.testing import tiny_config
from smolforge.training.loss import loss_sum
from smolforge.training.step_timer import HostClock, StepCost, StepTimer


def steps(profile, count):
    """So many steps of a tiny model, their parts shown."""
    model, ids = build(tiny_config()), torch.randint(320, (2, 32))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = StepTimer(StepCost(64, 1, 1, 1.0), count, HostClock(), annotate=torch.profiler.record_function)
    for _ in range(count):
        with meter.step():
            with meter.phase("forward"):
                loss, _ = loss_sum(model.hidden_states(ids), model.lm_head_weight, ids)
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                optimizer.step()
        profile.step(None, {})


@pytest.mark.parametrize(("count", "timed"), [(3, 2), (6, 3)])
def test_profile_covers_three_steps_after_the_first(tmp_path, count, timed):
    with Profiler(tmp_path, 3) as profile:
        steps(profile, count)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert {"aten::mm", "forward", "backward", "optimizer"} <= set(names)
    text = (tmp_path / "profile" / "summary.txt").read_text()
    first, table = text.split("\n\n", 1)
    milliseconds = float(re.fullmatch(rf"{timed} steps of ([\d.]+) ms, and their longest operators", first)[1])
    columns = {line.split()[0]: line.split() for line in table.splitlines() if line.startswith((" ", "aten"))}
    assert int(columns["aten::mm"][-1]) % timed == 0, "the number of calls"
    rows = re.findall(r"^ *(\S+) .* ([\d.]+)% .* (\d+) *$", table, re.MULTILINE)
    assert 10 < len(rows) <= 20
    assert 0 < milliseconds < 10_000


def test_profile_of_a_one_step_run_warns_and_writes_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "smolforge"), Profiler(tmp_path, 3) as profile:
        steps(profile, 1)
    assert "nothing was profiled" in caplog.text
    assert not (tmp_path / "profile").exists()
