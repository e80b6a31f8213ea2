"""What a person sees while a run goes: curves in a terminal of any width, plain lines elsewhere."""

import io
import math
import os
import re
import select
import sys
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from smolforge.cli import run_display
from smolforge.cli.run_display import (
    BLOCK_LEVELS,
    MAX_CELLS,
    NON_FINITE,
    Curve,
    Display,
    LiveView,
    pack_into_lines,
    resample_curve,
    sparkline,
)
from smolforge.cli.table import bar
from smolforge.config.load import read_recipe
from smolforge.runs.estimate import RunEstimate
from smolforge.runs.resolve import resolve_recipe
from smolforge.training.loop import TrainState

NUMBERS = st.lists(st.none() | st.floats())
WIDTHS = st.integers(0, 200)


@given(NUMBERS, WIDTHS)
def test_sparkline_fits_the_width_and_shows_non_finite_values(values, width):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= {*BLOCK_LEVELS, NON_FINITE}
    if width >= len(values):
        broken = [value is None or not math.isfinite(value) for value in values]
        assert [each == NON_FINITE for each in line] == broken
    elif width and any(value is None or not math.isfinite(value) for value in values):
        assert NON_FINITE in line


@given(st.lists(st.floats(-1e9, 1e9), min_size=2), WIDTHS)
def test_sparkline_keeps_the_order_of_values(values, width):
    line, shown = sparkline(values, width), resample_curve(values, width)
    for (a, first), (b, second) in pairwise(sorted(zip(shown, line, strict=True))):
        assert a == b or first <= second
    if width >= len(values) and min(values) < max(values):
        assert line[values.index(min(values))] == BLOCK_LEVELS[0]
        assert line[values.index(max(values))] == BLOCK_LEVELS[-1]


def test_sparkline_equals_known_cases():
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 7) == BLOCK_LEVELS
    assert sparkline([3.0, 3.0, 3.0], 9) == "▄▄▄"
    assert sparkline([8.0, float("nan"), 1.0], 9) == "▇!▁"
    assert sparkline([0.0, 0.0, 4.0, 4.0], 2) == "▁▇"
    assert sparkline([95.0, 100.0], 9) == "▁▇"
    assert sparkline([95.0, 100.0], 9, (0.0, 100.0)) == "▇▇", "a change of 5 % is not a cliff"
    assert sparkline([None, None], 9) == "!!"
    assert sparkline([], 9) == ""


@given(st.floats(0, 1), WIDTHS)
def test_bar_length_equals_its_share(share, width):
    assert len(bar(share, width)) <= max(width, 1)
    assert abs(len(bar(share, width)) - share * width) <= 1
    assert (bar(share, width) == "") == (share == 0)


@given(st.integers(1, 5000))
def test_curve_keeps_a_run_in_bounded_memory(steps):
    curve = Curve()
    for step in range(1, steps + 1):
        curve.add(step, float(step))
    values = curve.values()
    assert len(values) <= MAX_CELLS
    assert len(values) == steps or len(values) > MAX_CELLS // 2
    assert values == sorted(values)
    assert sum(cell.total for cell in curve.cells) == steps * (steps + 1) / 2


def test_curve_forgets_values_after_a_rewind():
    curve = Curve()
    for step, value in [(1, 5.0), (2, 4.0), (3, float("nan")), (4, 9.0), (3, 3.0)]:
        curve.add(step, value)
    assert curve.values() == [5.0, 4.0, 3.0]


PLAN = RunEstimate(
    parameters={"attention": 10, "embedding": 20, "mlp": 30, "norms": 4},
    tokens=1000, flops_per_token=1, seconds=5.0, memory_bytes=1 << 30, available_bytes=8 << 30, disk_bytes=1 << 20,
    device="cpu",
)  # fmt: skip
RECIPE = resolve_recipe(read_recipe("nano", {"train.dtype": "float32", "train.compile": False}), set())


def metrics(step, loss=3.0, rate=4000.0, **more):
    running = {"tokens_per_second_median": rate, "seconds_left": 61.0} if step > 1 else {}
    return {
        "step": step, "loss": loss, "tokens_per_second": rate, "mfu": 0.4, "learning_rate": 1e-3, "grad_norm": 0.5,
        "peak_memory_bytes": 1 << 30, **running, **more,
    }  # fmt: skip


MEASURED = {"validation_loss": 3.5, "validation_bits_per_byte": 1.5}


def told(display, steps=40):
    """A run that says everything once."""
    display.on_plan(RECIPE, PLAN, TrainState())
    for step in range(1, steps + 1):
        display.on_step(metrics(step, 9 - step / 10, 10.0 if step == 1 else 4000.0, **(MEASURED if step == 20 else {})))
        if step == 10:
            display.on_sample(
                "Once upon a time there was a sentence that is long enough for two lines of a terminal. " * 3
            )


def drawn(width, **environment):
    board = LiveView(run_display.Display(quiet=True).progress)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, soft_wrap=True, _environ=environment)
    for step in range(1, 101):
        each = metrics(step, float("nan") if step == 50 else 9 - step / 20, 1.0 if step == 1 else 4000.0)
        board.on_step(each)
    board.sample = "a text " * 200
    console.print(board)
    return console.file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("width", [24, 40, 60, 100, 140])
def test_live_view_fits_any_terminal_width(width):
    lines = plain(drawn(width)).splitlines()
    assert max(map(len, lines)) <= width
    (loss,) = [line for line in lines if line.startswith("loss")]
    (speed,) = [line for line in lines if line.startswith("tokens/s")]
    assert " 4.000  ▇" in loss
    assert NON_FINITE in loss
    assert " 4,000  ▇" in speed
    assert set(speed.split("0  ")[1].split()[0]) == {"▇"}, "the first step's speed is no part of the curve"
    assert ("4.00 to 8.95" in loss and "0 to 4,000" in speed) == (width >= 60)
    parts = ("MFU 40%", "lr 1.00e-03", "grad 0.50", "1.00 GiB", "61 s left")
    assert all(any(part in line for line in lines) for part in parts), "none is broken over two lines"


def test_live_view_respects_no_color():
    colours = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])[0-9;]*m")
    assert colours.search(drawn(80, TERM="xterm-256color"))
    assert not colours.search(drawn(80, TERM="xterm-256color", NO_COLOR="1"))


@given(st.lists(st.text("abc", min_size=1, max_size=30)), st.integers(1, 80))
def test_packed_lines_keep_parts_whole(parts, width):
    lines = pack_into_lines(parts, width)
    assert "  ".join(lines) == "  ".join(parts)
    assert all(len(line) <= width or line in parts for line in lines)


@contextmanager
def in_a_terminal(monkeypatch, width):
    """Standard error is a terminal of so many columns; yields what reads all that was written to it."""
    termios = pytest.importorskip("termios")  # Windows has no terminals of this kind
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, width))
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def read():
        got = b""
        while select.select([leader], [], [], 0.1)[0]:
            got += os.read(leader, 1 << 16)
        return got.decode()

    with os.fdopen(follower, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield read
    os.close(leader)


def test_display_redraws_on_a_terminal(monkeypatch):
    with in_a_terminal(monkeypatch, 70) as read:
        with Display() as display:
            told(display)
            display.live.refresh()
        text = read()
    assert "loss         5.000  ▇" in plain(text)
    assert "step 20  loss 7.000  held out 3.500 = 1.500 bits/byte  4,000 tokens/s" in plain(text)
    assert "last sample" in text
    assert "\x1b[1A" in text, "it draws over itself"


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_display_prints_plain_lines_on_ranks_and_dumb_terminals(monkeypatch, term):
    with in_a_terminal(monkeypatch, 70) as read:
        monkeypatch.setenv("TERM", term)
        with Display(plain=term != "dumb") as display:
            told(display)
        assert "\x1b[" not in read()


def test_display_prints_few_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(run_display.time, "perf_counter", lambda: 100.0)
    with Display() as display:
        told(display)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in said if line.startswith("step ")] == ["step 1/300", "step 20/300"]
    assert said[-2].startswith("step 20/300  loss 7.000  held out 3.500 = 1.500 bits/byte  4,000 tokens/s  MFU 40%")
    assert said[-1].startswith("  sample: Once upon a time")
    with Display(quiet=True) as display:
        told(display)
    assert capsys.readouterr().err == ""
