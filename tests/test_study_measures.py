"""What a study measures beside its metric: tasks, decoding, memory; the law of a ladder; numbers that read back."""

import json
import math

import numpy as np
import pytest
from test_multiple_choice import score_slowly
from test_study import Audience, conducted, study_file, without_speed

from smolforge.checkpoint.loading import load
from smolforge.comparison.study import benchmarks
from smolforge.comparison.study.report import render_markdown, results_json, write_report
from smolforge.comparison.study.results import read_results
from smolforge.comparison.study.scaling_law import fit_law, fit_power_law
from smolforge.comparison.study.spec import LawSettings, read_study
from smolforge.errors import InvalidFileError
from smolforge.evaluation.multiple_choice import summary
from smolforge.evaluation.tasks import read_items

ITEMS = [
    {"query": "The sun", "choices": ["is red", "sees the old man", "x"], "gold": 0},
    {"query": "One day", "choices": ["a", "the small dog", "he"], "gold": 1},
    {"query": "A", "choices": ["dog", "cat"], "gold": 1},
]
SIZES = {"a": 1e6, "b": 2e6, "c": 4e6, "d": 8e6, "e": 3e7}


def losses_of(power, noise: float = 0.0) -> dict[str, dict[int, float]]:
    """Five seeds of each size."""
    chance = np.random.default_rng(3)
    return {n: {s: power(size) + noise * float(chance.normal()) for s in range(5)} for n, size in SIZES.items()}


def test_study_evaluates_tasks_once_per_finished_run(tmp_path, monkeypatch):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    path, out = study_file(tmp_path, {"study": {"seeds": [0, 1], "tasks": ["items.jsonl"]}}), tmp_path / "out"
    found, said = conducted(path, out)
    items = read_items(tmp_path / "items.jsonl")
    for variant in found.variants:
        models = [load(out / "runs" / f"{variant.name}-seed-{seed}") for seed in (0, 1)]
        slow = [summary([score_slowly(model, item) for item in items])["acc"] for model in models]
        assert variant.also["items.acc"].mean == pytest.approx(np.mean(slow))
        assert variant.also["items.acc"].spread == pytest.approx(np.std(slow, ddof=1))
    last = [run.measured[-1]["validation_accuracy"] for run in found.runs_of("muon")]
    assert found.variants[1].also["validation_accuracy"].mean == pytest.approx(sum(last) / 2)
    assert "items acc" in render_markdown(found, [])
    asked, real = [], benchmarks.score
    monkeypatch.setattr(benchmarks, "score", lambda model, items: asked.append(model) or real(model, items))
    (tmp_path / "items.jsonl").rename(tmp_path / "gone")
    assert conducted(path, out)[1] == said
    assert asked == []
    (tmp_path / "gone").rename(tmp_path / "items.jsonl")
    (out / "tasks" / "muon-seed-1.json").write_text("{}")
    assert conducted(path, out)[1] == said
    assert len(asked) == 1


def test_decoding_benchmark_alternates_and_drops_the_first_round(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(benchmarks, "load", lambda run, device: run.name)
    monkeypatch.setattr(benchmarks, "decoding_speed", lambda name: order.append(name) or float(len(order)))
    found = benchmarks.decoding_speeds({name: (tmp_path / name, "cpu") for name in ("a", "b")})
    assert order[:6] == ["b", "a", "a", "b", "b", "a"]
    assert {len(each) for each in found.values()} == {benchmarks.ROUNDS}
    assert min(map(min, found.values())) == 3.0


def test_study_keeps_measurements_until_their_file_is_deleted(tmp_path, monkeypatch):
    path, out = study_file(tmp_path, {"study": {"seeds": [0]}}), tmp_path / "out"
    told = []
    audience = Audience()
    audience.on_measure_start = told.append
    monkeypatch.setattr(benchmarks, "DECODE_TOKENS", 2)
    monkeypatch.setattr(benchmarks, "peak_memory", lambda recipe, changes, steps, **_: steps << 20)
    from smolforge.comparison.study import run_variants

    found = run_variants(read_study(path), out, audience)
    assert found.variants[0].speed["peak_memory_bytes"] == found.variants[0].steps << 20
    assert all(value > 0 for value in found.variants[1].speed["decode_tokens_per_second"])
    assert told == ["decoding", "the memory of training"]
    assert without_speed(json.loads(results_json(found))) == conducted(path, out)[1]
    assert run_variants(read_study(path), out, audience) == found
    (out / "decoding.json").unlink()
    run_variants(read_study(path), out, audience)
    assert told == ["decoding", "the memory of training", "decoding"]


@pytest.mark.long
def test_peak_memory_is_measured_in_a_separate_process(tmp_path, monkeypatch):
    """One that begins as large as this one would hide what the variant needs."""
    study_file(tmp_path)
    large = np.ones(1 << 27)  # 1 GiB
    peak = benchmarks.peak_memory(tmp_path / "tiny.toml", {"train.batch_tokens": 64}, 4, classes_dir=tmp_path)
    assert 100 << 20 < peak < 0.8 * large.nbytes
    monkeypatch.setattr(benchmarks, "CHILD_SCRIPT", "raise SystemExit('no room')")
    assert benchmarks.peak_memory(tmp_path / "tiny.toml", {}, 4, classes_dir=tmp_path) is None


@pytest.mark.parametrize(("floor", "asked"), [(0.0, 0.0), (1.5, 1.5), (1.5, "fitted")])
def test_scaling_law_recovers_a_power_law(floor, asked):
    chosen, values = LawSettings(predicted=("e",), floor=asked), losses_of(lambda n: floor + 300 * n**-0.3)
    found = fit_law(chosen, SIZES, values, alpha=0.05)
    assert found.power.exponent == pytest.approx(0.3, rel=1e-3)
    assert found.power.scale == pytest.approx(300, rel=1e-2)
    (said,) = found.predictions
    assert said.predicted == pytest.approx(floor + 300 * 3e7**-0.3, rel=1e-4)
    assert said.low == pytest.approx(said.high, rel=1e-3)
    assert found.fitted == ["a", "b", "c", "d"]
    elsewhere = fit_law(chosen, SIZES, values | {"e": dict.fromkeys(range(5), 9.0)}, alpha=0.05)
    assert elsewhere.power == found.power
    assert elsewhere.predictions[0].measured == 9.0


def test_scaling_law_interval_grows_with_seed_noise():
    chosen, widths = LawSettings(predicted=("e",)), []
    for noise in (0.01, 0.1):
        (said,) = fit_law(chosen, SIZES, losses_of(lambda n: 300 * n**-0.3, noise), alpha=0.05).predictions
        assert said.low < said.predicted < said.high
        assert said.missed_low <= said.measured - said.predicted <= said.missed_high
        widths.append(said.high - said.low)
    assert 5 < widths[1] / widths[0] < 20


def test_scaling_law_is_none_where_it_cannot_be_fitted():
    values = losses_of(lambda n: 300 * n**-0.3)
    assert fit_law(LawSettings(predicted=("e",), floor=9.0), SIZES, values, alpha=0.05) is None
    assert fit_law(LawSettings(predicted=("e",)), SIZES, values | {"a": {}}, alpha=0.05) is None
    assert math.isnan(fit_power_law(np.array([1.0, 2.0]), np.array([1.0, 1.0]), 1.0).exponent)


@pytest.mark.heavy
def test_study_with_a_scaling_law_is_reported_and_read_back(tmp_path):
    widths = {f"w{width}": {"model.intermediate_size": width} for width in (16, 32, 64, 128)}
    changes = {"variants": {"plain": None, "muon": None, **widths}}
    changes["study"] = {"seeds": [0, 1], "baseline": "w16", "law": {"predicted": ["w128"]}}
    found, _ = conducted(study_file(tmp_path, changes), tmp_path / "out")
    assert [each.name for each in found.law.predictions] == ["w128"]
    write_report(found, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    for said in (
        f"{found.law.predictions[0].predicted:.4f}",
        f"N^{found.law.power.exponent:.4f}, N being parameters",
        "fitted to the means of w16, w32, w64 over 2 seeds",
        "The floor of 0 was chosen before the runs",
    ):
        assert said in report
    assert "What the sizes predicted" in (tmp_path / "out" / "index.html").read_text()
    again = read_results(tmp_path / "out" / "study.json")
    assert results_json(again) == results_json(found)
    assert render_markdown(again, []) == render_markdown(found, [])
    (tmp_path / "half.json").write_text((tmp_path / "out" / "study.json").read_text()[:500])
    with pytest.raises(InvalidFileError, match="is no study's"):
        read_results(tmp_path / "half.json")
