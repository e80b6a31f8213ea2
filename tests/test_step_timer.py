"""Every printed rate against a clock that goes by hand."""

import itertools
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolforge.training.step_timer import WINDOW, HostClock, StepCost, StepTimer, StreamClock, clock

PARTS = ("data", "forward", "backward", "optimizer", "other")
WORK = StepCost(tokens=1000, flops_per_token=600, flops_per_token_full_attention=900, peak_flops_per_second=1e6)


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.time = 1e6

    def __call__(self):
        return self.time

    def clock(self):
        return HostClock(self)

    def step(self, meter, **parts):
        with meter.step():
            for name, seconds in parts.items():
                if name == "other":
                    self.time += seconds
                    continue
                with meter.phase(name):
                    self.time += seconds


@pytest.fixture
def hand():
    return Hand()


def test_step_timer_sums_phases_over_micro_batches(hand):
    meter = StepTimer(WORK, 10, hand.clock())
    with meter.step():
        hand.time += 0.5
        with meter.phase("data"):
            hand.time += 1
        for _ in range(3):
            with meter.phase("forward"):
                hand.time += 2
            with meter.phase("backward"):
                hand.time += 4
        hand.time += 0.25
        with meter.phase("optimizer"):
            hand.time += 8
            with meter.phase("other"):
                hand.time += 16
            hand.time += 32
    figures = meter.read()
    seconds = {name: figures[f"seconds_{name}"] for name in PARTS}
    assert seconds == {"data": 1, "forward": 6, "backward": 12, "optimizer": 40, "other": 16.75}
    assert figures["tokens_per_second"] == pytest.approx(1000 / 75.75)


def test_step_timer_medians_exclude_the_first_step(hand):
    meter = StepTimer(WORK, 4, hand.clock())
    hand.step(meter, forward=100)
    assert not {"tokens_per_second_median", "seconds_left"} & meter.read().keys()
    hand.step(meter, forward=2)
    figures = meter.read()
    assert figures["tokens_per_second_median"] == figures["tokens_per_second"] == 500
    assert figures["seconds_left"] == 2 * 2
    hand.step(meter, forward=4)
    assert meter.read()["tokens_per_second_median"] == pytest.approx(1000 / 3)
    hand.step(meter, forward=2.5)
    figures = meter.read()
    assert figures["tokens_per_second_median"] == 400
    assert figures["seconds_left"] == 0


def test_step_timer_median_covers_a_recent_window(hand):
    meter = StepTimer(WORK, 100, hand.clock())
    for seconds in [1] + [10] * WINDOW + [2] * WINDOW:
        hand.step(meter, forward=seconds)
        figures = meter.read()
    assert figures["tokens_per_second_median"] == 500


def test_step_timer_gaps_count_for_time_left_not_for_rate(hand):
    meter = StepTimer(WORK, 105, hand.clock())
    for step in range(5):
        hand.step(meter, forward=2)
        figures = meter.read()
        hand.time += 30 if step == 1 else 0  # an evaluation after the second of five steps
        assert figures["tokens_per_second"] == 500
    assert figures["tokens_per_second_median"] == 500
    assert figures["seconds_left"] == pytest.approx(100 * (2 + 30 / 4))


def test_seconds_between_belong_to_the_next_step(hand):
    meter, between = StepTimer(WORK, 9, hand.clock()), []
    for seconds in (7, 0, 3):
        hand.step(meter, data=1, forward=2)
        between.append(meter.read()["seconds_between"])
        hand.time += seconds
    hand.step(meter, forward=2)
    assert [*between, meter.read()["seconds_between"]] == [0, 7, 0, 3]


def test_seconds_left_count_the_steps_of_this_start(hand):
    """A run resumed at 990 of 1000: its first step compiles again and is left out again."""
    meter = StepTimer(WORK, 1000 - 990, hand.clock())
    hand.step(meter, forward=50)
    assert "seconds_left" not in meter.read()
    hand.step(meter, forward=2)
    assert meter.read()["seconds_left"] == 8 * 2


def test_step_timer_may_be_read_late(hand):
    """As on a GPU, where the next step is begun before this one's loss is known."""
    prompt, late = StepTimer(WORK, 9, hand.clock()), StepTimer(WORK, 9, hand.clock())
    at_once, afterwards = [], []
    for seconds in (3, 1, 2, 5):
        with prompt.step(), late.step(), prompt.phase("forward"), late.phase("forward"):
            hand.time += seconds
        at_once.append(prompt.read())
        afterwards += [late.read()] if seconds != 3 else []
        hand.time += 7
    afterwards.append(late.read())
    assert at_once == afterwards


def test_step_timer_forgets_a_failed_step(hand):
    meter = StepTimer(WORK, 9, hand.clock())
    with pytest.raises(ZeroDivisionError), meter.step(), meter.phase("forward"):
        raise ZeroDivisionError
    hand.step(meter, forward=2)
    assert meter.read()["tokens_per_second"] == 500
    with pytest.raises(IndexError):
        meter.read()


def test_phase_outside_a_step_is_refused(hand):
    meter = StepTimer(WORK, 9, hand.clock())
    hand.step(meter, forward=2)
    with pytest.raises(AssertionError, match="a part belongs to a step"), meter.phase("data"):
        pass


SMOLLM2 = StepCost(524_288, 1_019_215_872, 1_231_552_512, 790e12)
"""At 2048 tokens, on a GPU that multiplies at 790 TFLOP/s."""
GPT2 = StepCost(
    524_288, 6 * 124_475_904 + 6 * 12 * 768 * 1024, 6 * 124_475_904 + 12 * 12 * 768 * 1024, 312e12, devices=8
)
"""llm.c's run on eight A100s, 300 ms a step."""


@pytest.mark.parametrize(
    ("work", "seconds", "rate", "mfu", "full"),
    [
        (SMOLLM2, 524_288 / 775_106, 775_106, 1.0, 1.2083),
        (SMOLLM2, 524_288 / 641_467, 641_467, 0.8276, 1.0),
        (replace(SMOLLM2, peak_flops_per_second=989.5e12), 524_288 / 388_000, 388_000, 0.3997, 0.4829),
        (GPT2, 0.3, 1_747_627, 0.5626, 0.6022),
    ],
)
def test_mfu_equals_known_cases(hand, work, seconds, rate, mfu, full):
    meter = StepTimer(work, 9, hand.clock())
    hand.step(meter, forward=seconds)
    figures = meter.read()
    assert figures["tokens_per_second"] == pytest.approx(rate, rel=1e-6)
    assert figures["mfu"] == pytest.approx(mfu, abs=1e-4)
    assert figures["mfu_full_attention"] == pytest.approx(full, abs=1e-4)


SECONDS = st.floats(1e-4, 1e4)
STEPS = st.lists(st.tuples(st.dictionaries(st.sampled_from(PARTS), SECONDS, min_size=1), SECONDS), min_size=2)


@given(STEPS, st.floats(1e3, 1e15), st.integers(1, 512))
def test_step_timer_figures_are_consistent_for_any_steps(steps, peak, devices):
    hand = Hand()
    work = replace(WORK, peak_flops_per_second=peak, devices=devices)
    meter, plain = StepTimer(work, len(steps), hand.clock()), StepTimer(WORK, len(steps), hand.clock())
    wholes, rates, before = [], [], 0.0
    for parts, between in steps:
        start = hand.time
        with plain.step():
            hand.step(meter, **parts)
        wholes.append(hand.time - start)
        figures, other = meter.read(), plain.read()
        assert sum(figures[f"seconds_{name}"] for name in PARTS) == pytest.approx(wholes[-1])
        assert figures["mfu"] * peak * devices == pytest.approx(other["mfu"] * WORK.peak_flops_per_second)
        assert figures["mfu_full_attention"] == pytest.approx(1.5 * figures["mfu"])
        assert figures["seconds_between"] == pytest.approx(before, rel=1e-6, abs=1e-6)
        rates.append(figures["tokens_per_second"])
        hand.time += between
        before = between
    recent = rates[1:][-WINDOW:]
    assert min(recent) * 0.999 <= figures["tokens_per_second_median"] <= max(recent) * 1.001
    assert figures["tokens_per_second_median"] == pytest.approx(1000 / statistics.median(wholes[1:][-WINDOW:]))
    assert figures["seconds_left"] == 0


class FakeEvent:
    """A CUDA event on a stream that is `stream.time` seconds into its work; waiting for it moves the stream there."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.stream, self.at = stream, stream.queued

    def synchronize(self):
        self.stream.time = max(self.stream.time, self.at)

    def elapsed_time(self, end):
        assert self.stream.time >= end.at, "the event has not happened yet"
        return 1000 * (end.at - self.at)


def test_stream_clock_waits_only_when_read(monkeypatch):
    class Stream:
        time = queued = 0.0

    streams = {0: Stream(), 1: Stream()}
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    meter, stream = StepTimer(WORK, 9, clock(torch.device("cuda:1"))), streams[1]
    for seconds in (4.0, 2.0, 3.0):
        with meter.step():
            with meter.phase("forward"):
                stream.queued += seconds
            with meter.phase("optimizer"):
                stream.queued += 1
        stream.queued += 0.5
    assert stream.time == 0
    assert meter.read()["seconds_forward"] == 4
    second = meter.read()
    assert (second["seconds_optimizer"], second["seconds_between"]) == (1, 0.5)
    assert stream.time == 8.5, "the third step is still under way"
    assert streams[0].time == 0


def test_clock_is_chosen_by_device():
    assert clock(torch.device("cpu")) == HostClock(time.perf_counter)
    assert isinstance(clock(torch.device("cuda")), StreamClock)


def test_phases_are_annotated_for_a_profiler(hand):
    shown = []

    @contextmanager
    def annotate(name):
        shown.append(name)
        yield

    hand.step(StepTimer(WORK, 9, hand.clock(), annotate=annotate), data=1, forward=1)
    assert shown == ["data", "forward"]


def test_step_timer_reads_the_clock_twice_per_phase():
    """And for nothing else: timestamps are compared when the step is read, without another look at the clock."""
    ticks, phases = itertools.count(), ["data", *["forward", "backward"] * 8, "optimizer"]
    timer = StepTimer(WORK, 9, HostClock(lambda: float(next(ticks))))
    with timer.step():
        for name in phases:
            with timer.phase(name):
                pass
    timer.read()
    assert next(ticks) == 2 + 2 * len(phases)
