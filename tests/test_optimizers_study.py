"""The study of optimizers: its arithmetic, and its quick form from end to end."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "optimizers.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("optimizers_study", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_steps_to_interpolates_between_measurements(study):
    curve = [{"step": step, "weights": loss} for step, loss in ((10, 6.0), (20, 5.0), (30, 5.2), (40, 4.0))]
    assert study.steps_to(5.5, curve, "weights") == pytest.approx(15)
    assert study.steps_to(5.0, curve, "weights") == 20
    assert study.steps_to(4.6, curve, "weights") == pytest.approx(35)
    assert study.steps_to(3.9, curve, "weights") == math.inf
    assert study.steps_to(7.0, curve, "weights") == 10


@pytest.mark.parametrize("best", [0.25, 1.0, 2.0, 16.0])
def test_best_rate_extends_the_sweep_until_it_is_inside(study, best):
    tried = []
    assert study.best_rate(lambda rate: tried.append(rate) or abs(math.log(rate / best)), (1.0, 2.0, 4.0)) == best
    assert min(tried) < best < max(tried)
    assert len(tried) == len(set(tried))


@pytest.mark.long
def test_quick_study_trains_once_and_reports_twice(study, tmp_path, text_file, capsys):
    words = ["--quick", "--data", str(text_file), "--out", str(tmp_path / "study.json")]
    study.main(words)
    first = capsys.readouterr().out
    kept = json.loads((tmp_path / "study.json").read_text())
    study.main(words)
    again = capsys.readouterr().out
    assert first.endswith(again)
    assert "seed 101" in first
    assert set(kept["found"]) == set(kept["milliseconds"]) == {str(each) for each in study.CANDIDATES}
    seeds = {key.rpartition(" ")[2] for key in kept["runs"]}
    assert seeds == {"0", "1", *map(str, study.SWEEP_SEEDS)}
    for each in study.CANDIDATES:
        (row,) = [line for line in again.splitlines() if line.startswith(f"| {each} ") and line.count("|") == 9]
        found = kept["found"][str(each)]
        assert f"{found['rate']:g}" in row
        assert all(steps <= 4 for steps in found["steps"])
        assert found["end"][0] == kept["runs"][f"{each.optimizer} {found['rate']:g} seed 0"][-1][found["weights"]]
    assert again.count("| AdamW at ") == len(study.DECAYS) * len(
        {found["rate"] for name, found in kept["found"].items() if "AdamW" in name}
    )
    with pytest.raises(SystemExit, match="is of another study"):
        study.main([*words, "--recipe", "shakespeare"])
