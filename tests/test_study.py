"""Studies: what a file may say, equal budgets, runs that are stopped, killed or fail, and what is reported."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tomli_w
from conftest import NANO

from smolforge import cli
from smolforge.comparison.history import read_history as history
from smolforge.comparison.statistics import differences
from smolforge.comparison.study import benchmarks, plan, run_variants, runner
from smolforge.comparison.study.report import render_markdown, results_json, write_report
from smolforge.comparison.study.runner import StudyListener
from smolforge.comparison.study.spec import read_study
from smolforge.errors import ConfigError, Stopped, TrainingDivergedError
from smolforge.models.stats import flops_per_token
from smolforge.testing import in_child, sentences

STUDY = {
    "recipe": "tiny.toml",
    "study": {"seeds": [0, 1, 2], "budget": {"tokens": 512}, "baseline": "plain"},
    "settings": {"train.evaluate_every": 2, "train.checkpoint_every": 2},
    "variants": {"plain": {}, "muon": {"optim": {"name": "muon"}}},
}
SHORT = {"study": {"seeds": [0]}}


def merged(base: dict, changes: dict) -> dict:
    """Tables within tables; None takes a key away."""
    tree = dict(base)
    for key, value in changes.items():
        tree[key] = merged(tree.get(key, {}), value) if isinstance(value, dict) and value else value
    return {key: value for key, value in tree.items() if value is not None}


def study_file(folder: Path, *changes: dict, name: str = "study.toml") -> Path:
    """A study of a recipe that takes a fraction of a second."""
    if not (folder / "tiny.toml").exists():
        (folder / "text.txt").write_text(sentences(300))
        recipe = NANO | {"data": {"sources": [str(folder / "text.txt")]}}
        (folder / "tiny.toml").write_text(tomli_w.dumps(recipe))
    tree = STUDY
    for each in changes:
        tree = merged(tree, each)
    (folder / name).write_text(tomli_w.dumps(tree))
    return folder / name


class Audience(StudyListener):
    """Hears which runs begin, and may do something at a step of one."""

    def __init__(self, run: str = "", step: int = 0, act=lambda: None) -> None:
        self.begun, self.run, self.step, self.act = [], run, step, act

    def on_run_start(self, name: str, number: int, of: int) -> None:
        self.begun.append((name, number, of))

    def on_step(self, metrics):
        if self.begun[-1][0] == self.run and metrics["step"] == self.step:
            self.act()


def without_speed(value):
    """What does not depend on how fast the machine was."""
    if isinstance(value, dict):
        return {key: without_speed(each) for key, each in value.items() if key != "speed"}
    return [without_speed(each) for each in value] if isinstance(value, list) else value


def conducted(path: Path, out: Path, audience: Audience | None = None):
    """The findings, and what study.json says of them without what the clock decides."""
    found = run_variants(read_study(path), out, audience or Audience(), measure_costs=False)
    return found, without_speed(json.loads(results_json(found)))


@pytest.fixture(autouse=True)
def _little_is_measured(monkeypatch):
    """Processes of their own with torch in them take seconds."""
    monkeypatch.setattr(benchmarks, "peak_memory", lambda *_, **__: 300 << 20)
    monkeypatch.setattr(benchmarks, "DECODE_TOKENS", 2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that was never disturbed: its file, its folder, its findings, what its audience heard."""
    folder = tmp_path_factory.mktemp("study")
    path, audience = study_file(folder), Audience()
    found, said = conducted(path, folder / "out", audience)
    write_report(found, folder / "out")
    return folder, path, found, said, audience


def test_study_runs_are_ordinary_runs_with_equal_tokens(done):
    folder, _, found, said, audience = done
    names = [f"{name}-seed-{seed}" for seed in (0, 1, 2) for name in ("plain", "muon")]
    assert audience.begun == [(name, number, 6) for number, name in enumerate(names, 1)]
    runs = {name: history(folder / "out" / "runs" / name) for name in names}
    assert {run.state for run in runs.values()} == {"finished"}
    assert {run.step * run.recipe.train.batch_tokens for run in runs.values()} == {512}
    for seed in (0, 1, 2):  # the last window of an epoch is shorter, and so it is for all
        assert 470 < int(runs[f"plain-seed-{seed}"].tokens[-1]) == int(runs[f"muon-seed-{seed}"].tokens[-1]) <= 512
    assert {run.recipe.optim.schedule.steps for run in runs.values()} == {4}
    assert {run.recipe.data.sources for run in runs.values()} == {(str((folder / "out" / "corpus").resolve()),)}
    assert not list((folder / "out").glob("runs/*/corpus"))
    losses = {
        name: {s: runs[f"{name}-seed-{s}"].metrics[-1]["validation_loss"] for s in (0, 1, 2)}
        for name in STUDY["variants"]
    }
    (made,) = differences({"muon": losses["muon"]}, losses["plain"]).values()
    assert found.variants[1].difference == made
    assert said["variants"]["muon"]["difference"]["mean"] == made.mean
    assert said["variants"]["plain"]["values"] == {str(seed): value for seed, value in losses["plain"].items()}


def test_finished_study_is_only_read(done, monkeypatch):
    folder, path, *_ = done
    monkeypatch.setattr(runner, "resume_or_start", None)
    before = {file.name: file.read_bytes() for file in (folder / "out").iterdir() if file.is_file()}
    audience = Audience()
    write_report(conducted(path, folder / "out", audience)[0], folder / "out")
    assert audience.begun == []
    assert {file.name: file.read_bytes() for file in (folder / "out").iterdir() if file.is_file()} == before


def killed(path, out, run, step):
    """Conduct in this process until it is killed."""
    run_variants(
        read_study(path), out, Audience(run, step, lambda: os.kill(os.getpid(), signal.SIGKILL)), measure_costs=False
    )


@pytest.mark.heavy
def test_killed_study_resumes_with_the_same_results(done, tmp_path):
    _, path, _, said, _ = done
    out = tmp_path / "out"
    for run, step in (("muon-seed-0", 1), ("plain-seed-2", 3)):
        assert in_child(killed, path, out, run, step) == -signal.SIGKILL
    audience = Audience()
    again = conducted(path, out, audience)[1]
    assert [name for name, _, _ in audience.begun] == ["plain-seed-2", "muon-seed-2"]
    assert audience.begun[0][1:] == (5, 6)
    assert again == said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_study_stopped_by_a_signal_saves_everything(tmp_path, number, code):
    path, out = study_file(tmp_path, SHORT), tmp_path / "out"
    audience = Audience("muon-seed-0", 3, lambda: signal.raise_signal(number))
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step 3, everything is saved") as caught:
        run_variants(read_study(path), out, audience, measure_costs=False)
    assert caught.value.exit_code == code
    assert [history(out / "runs" / f"{name}-seed-0").step for name in ("plain", "muon")] == [4, 3]
    audience = Audience()
    run_variants(read_study(path), out, audience, measure_costs=False)
    assert audience.begun == [("muon-seed-0", 2, 2)]


def test_flops_budget_gives_smaller_models_more_steps(tmp_path):
    changes = {
        "study": {"seeds": [0], "baseline": "wide", "budget": {"tokens": None, "flops": 3.4e8}},
        "variants": {"plain": None, "muon": None, "wide": {"model.intermediate_size": 384}, "narrow": {}},
    }
    path = study_file(tmp_path, changes)
    conducted(path, tmp_path / "out")
    runs = {name: history(tmp_path / "out" / "runs" / f"{name}-seed-0") for name in ("wide", "narrow")}
    spent = {name: float(run.tokens[-1]) * flops_per_token(run.recipe.model, 32) for name, run in runs.items()}
    assert all(abs(each / 3.4e8 - 1) <= plan.BUDGET_TOLERANCE for each in spent.values())
    assert runs["narrow"].step > 1.5 * runs["wide"].step
    assert runs["narrow"].recipe.optim.schedule.steps == runs["narrow"].step


def test_seconds_budget_is_measured_once(tmp_path, monkeypatch):
    speeds = {"muon": 3200.0, "adamw": 6400.0}
    monkeypatch.setattr(plan, "tokens_per_second", lambda recipe: speeds[recipe.optim.name])
    path = study_file(tmp_path, {"study": {"budget": {"tokens": None, "seconds": 2.0}}})
    assert plan.load_or_make_plan(read_study(path), tmp_path / "out").steps == {"plain": 100, "muon": 50}
    speeds.clear()
    assert plan.load_or_make_plan(read_study(path), tmp_path / "out").steps == {"plain": 100, "muon": 50}


def test_schedule_fractions_follow_the_steps(tmp_path):
    changes = {"optim.schedule.warmup_steps": 0.5, "optim.schedule.steps": None}
    path = study_file(tmp_path, SHORT, {"settings": changes, "variants": {"muon": {"train.batch_tokens": 64}}})
    run_variants(read_study(path), tmp_path / "out", Audience(), measure_costs=False)
    runs = [history(tmp_path / "out" / "runs" / f"{name}-seed-0") for name in ("plain", "muon")]
    assert [(run.step, run.recipe.optim.schedule.warmup_steps) for run in runs] == [(4, 2), (8, 4)]
    assert [int(run.tokens[-1]) for run in runs] == [512, 512]


def test_study_reports_a_failed_run_and_continues(tmp_path, monkeypatch, capsys):
    real = runner.resume_or_start

    def failing(recipe, folder, overrides, **more):
        if folder.name == "muon-seed-0":
            raise TrainingDivergedError("its numbers went wrong 4 times")
        if folder.name == "plain-seed-1":
            raise RuntimeError("no kernel\nfor this | shape")
        return real(recipe, folder, overrides, **more)

    monkeypatch.setattr(runner, "resume_or_start", failing)
    path = study_file(tmp_path, {"study": {"seeds": [0, 1]}})
    assert cli.run(["compare", str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "not finished: muon-seed-0: its numbers went wrong 4 times" in printed
    assert "nothing to compare: no seed was finished by both" in printed
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- muon-seed-0: its numbers went wrong 4 times" in report
    assert "- plain-seed-1: RuntimeError: no kernel for this | shape\n" in report
    assert "its numbers went wrong" in (tmp_path / "out" / "index.html").read_text()
    said = json.loads((tmp_path / "out" / "study.json").read_text())["variants"]
    assert (said["plain"]["difference"], said["muon"]["difference"]["n"]) == (None, 0)
    monkeypatch.setattr(runner, "resume_or_start", real)
    assert conducted(path, tmp_path / "out")[1]["variants"]["muon"]["failed"] == {}


def test_diverged_run_is_not_repeated(tmp_path):
    """Its numbers would go wrong again. A rate like this one makes weights that are no numbers."""
    wild = {"optim.learning_rate": 1e30, "optim.max_grad_norm": "none", "guard.max_rewinds": 0}
    path = study_file(tmp_path, SHORT, {"variants": {"muon": None, "wild": wild}})
    first, said = conducted(path, tmp_path / "out")
    assert list(said["variants"]["wild"]["failed"]) == ["wild-seed-0"]
    assert history(tmp_path / "out" / "runs" / "wild-seed-0").state == "diverged"
    audience = Audience()
    assert conducted(path, tmp_path / "out", audience)[1] == said
    assert audience.begun == []
    assert "nothing to compare: no seed was finished by both" in render_markdown(first, [])


def test_learning_rate_search_uses_its_own_seeds(tmp_path):
    rates = {"seeds": [0], "learning_rates": [0.1, 1, 3], "learning_rate_seeds": [70]}
    path = study_file(tmp_path, {"study": rates})
    audience = Audience()
    found, said = conducted(path, tmp_path / "out", audience)
    assert len(audience.begun) == 2 * 3 + 2
    assert audience.begun[0] == ("plain-rate-0.1-seed-70", 1, 8)
    for variant in found.variants:
        means = variant.rates.means
        assert variant.rates.factor == min(means, key=lambda factor: means[factor])
        chosen = history(tmp_path / "out" / "runs" / f"{variant.name}-seed-0").recipe.optim
        assert chosen.learning_rate == pytest.approx(3e-3 * variant.rates.factor)
        assert chosen.matrix_learning_rate == pytest.approx(0.02 * variant.rates.factor)
        assert chosen.schedule.final_learning_rate == pytest.approx(3e-4 * variant.rates.factor)
        assert variant.rates.at_the_end == (variant.rates.factor in (0.1, 3.0))
        assert list(variant.values) == [0]
    ends = [variant.rates.at_the_end for variant in found.variants]
    report = render_markdown(found, [])
    assert report.count("a better one may lie beyond") == sum(ends)
    assert "## Learning rates, tried with seed 70" in report
    assert conducted(path, tmp_path / "out")[1] == said


def test_variant_with_another_vocabulary_has_its_own_corpus(tmp_path):
    other = {"variants": {"muon": None, "small": {"model.vocab_size": 288}}}
    path = study_file(tmp_path, SHORT, other, {"study": {"metric": "validation_bits_per_byte"}})
    found, said = conducted(path, tmp_path / "out")
    sources = [history(tmp_path / "out" / "runs" / name).recipe.data.sources[0] for name in found.runs]
    assert sources == [str(tmp_path / "out" / "corpus"), str(tmp_path / "out" / "texts" / "small" / "corpus")]
    last = {name: run["measured"][-1]["validation_bits_per_byte"] for name, run in said["runs"].items()}
    assert said["variants"]["small"]["values"]["0"] == last["small-seed-0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"study": None}, "study.toml: study is not given; it should be a table of settings"),
        ({"recipe": None}, "study.toml: recipe is not given; it should be text that is not empty"),
        ({"study": {"budget": None}}, "study.toml: study.budget is not given"),
        ({"recipe": "tini"}, "there is no recipe 'tini'"),
        ({"variant": {"a": {}}}, "there is no table 'variant' in a study. Did you mean variants?"),
        ({"variants": {"muon": None}}, "a study needs two variants or more, each a table [variants.NAME]"),
        ({"variants": {"muon": 3}}, "variants.muon is 3; it should be a table of settings"),
        ({"variants": {"../up": {}}}, "variants.'../up' names folders, so it should be up to 41 letters"),
        ({"study": {"baseline": "plian"}}, "study.baseline is 'plian', which is no variant. Did you mean plain?"),
        ({"study": {"sedes": [1]}}, "there is no setting 'study.sedes'. Did you mean study.seeds?"),
        ({"study": {"seeds": [1, 1]}}, "study.seeds has something twice"),
        ({"study": {"seeds": []}}, "study.seeds"),
        ({"study": {"seeds": [-1]}}, "study.seeds has -1 in it; it should be"),
        ({"study": {"test": "sign"}}, "study.test is 'sign'; it should be paired-t or welch-t"),
        ({"study": {"metric": "loss"}}, "study.metric is 'loss'; it should be validation_loss,"),
        ({"study": {"tasks": ["helaswag"]}}, "there is no task 'helaswag'"),
        ({"study": {"tasks": ["a/items.jsonl", "items.jsonl"]}}, "study.tasks has two that are called the same"),
        (
            {"study": {"law": {"predicted": ["large"]}}},
            "study.law.predicted has 'large', which is no variant",
        ),
        ({"study": {"law": {"predicted": ["muon"]}}}, "is fitted to the variants that are not predicted, and needs 3"),
        ({"study": {"law": {"predicted": ["muon"], "floor": -1.0}}}, "study.law"),
        ({"study": {"alpha": 1.5}}, "study.alpha is 1.5; it should be a finite number above 0 and below 1"),
        ({"study": {"budget": {"flops": 1e9}}}, "study.budget: it should be one of tokens, flops and seconds"),
        ({"study": {"budget": {"tokens": 0}}}, "study.budget.tokens is 0; it should be a whole number above 0"),
        (
            {"study": {"learning_rates": [1, 2], "learning_rate_seeds": [2]}},
            "share a seed: the choice would judge itself",
        ),
        (
            {"variants": {"muon": {"optim.nam": "muon"}}},
            "study.toml: variants.muon: there is no setting 'optim.nam'. Did you mean optim.name?",
        ),
        ({"variants": {"muon": {"optim": {"name": "mu"}}}}, "study.toml: variants.muon: optim.name is 'mu'"),
        ({"variants": {"muon": {"model": "smollm2-nanno"}}}, "Did you mean smollm2-nano?"),
        (
            {"variants": {"muon": {"train": {"steps": 5}}}},
            "train.steps is the study's to decide: they follow from study.budget",
        ),
        ({"settings": {"seed": 5}}, "study.toml: settings: seed is the study's to decide: study.seeds has them"),
        (
            {"variants": {"muon": {"data.sources": ["b.txt"]}}},
            "data.sources differs from the baseline's; all variants learn from the same text",
        ),
        ({"variants": {"muon": {"model.vocab_size": 300}}}, 'study.metric = "validation_bits_per_byte" compares them'),
        (
            {"settings": {"train.evaluate_every": "none"}},
            "train.evaluate_every is off, and validation_loss is measured on held-out text",
        ),
        ({"settings": {"data.held_out": 0.0}}, "data.held_out is off"),
        ({"variants": {"muon": {"train.evaluate_tokens": 100}}}, "train.evaluate_tokens differs from the baseline's"),
    ],
)
def test_study_file_errors_are_one_sentence(tmp_path, capsys, changes, said):
    path = study_file(tmp_path, changes)
    assert cli.run(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_study_refuses_a_budget_below_one_step(tmp_path):
    path = study_file(tmp_path, {"study": {"budget": {"tokens": 200}}})
    with pytest.raises(
        ConfigError, match=r"variants.plain: a step takes 128 tokens, so no number of steps comes within 5%"
    ):
        plan.load_or_make_plan(read_study(path), tmp_path / "out")


def test_study_of_an_earlier_version_resumes(tmp_path):
    """Settings that it did not have were at their defaults; that they still are must be so."""
    path = study_file(tmp_path)
    plan.load_or_make_plan(read_study(path), tmp_path / "out")
    file = tmp_path / "out" / plan.PLAN
    kept = json.loads(file.read_text())
    del kept["study"]["settings"]["tasks"], kept["study"]["settings"]["law"]
    for variant in kept["study"]["variants"].values():
        del variant["lora.rank"], variant["data.format"]
    file.write_text(json.dumps(kept))
    plan.load_or_make_plan(read_study(path), tmp_path / "out")
    with pytest.raises(ConfigError, match="other settings: variants.muon.data.format"):
        plan.load_or_make_plan(
            read_study(study_file(tmp_path, {"variants": {"muon": {"data.format": "chat"}}})), tmp_path / "out"
        )


def test_study_refuses_changes_after_the_start(tmp_path):
    plan.load_or_make_plan(read_study(study_file(tmp_path)), tmp_path / "out")
    more = study_file(
        tmp_path, {"study": {"seeds": [0, 1, 2, 3], "alpha": 0.1}, "variants": {"muon": {"optim.eps": 1e-6}}}
    )
    with pytest.raises(ConfigError, match=r"begun with other settings: seeds, alpha, variants.muon.optim.eps; what is"):
        plan.load_or_make_plan(read_study(more), tmp_path / "out")


def test_study_refuses_foreign_folders(tmp_path):
    path = study_file(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not a study's folder"):
        plan.load_or_make_plan(read_study(path), tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="plan.json is broken"):
        plan.load_or_make_plan(read_study(path), tmp_path / "out")


def test_study_report_shows_the_results(done):
    folder, _, found, said, _ = done
    out = folder / "out"
    report, page = (out / "report.md").read_text(), (out / "index.html").read_text()
    muon = found.variants[1]
    for shown in (
        f"{muon.mean:.4f} ± {muon.spread:.4f}",
        f"{muon.difference.mean:+.4f}",
        muon.verdict,
        "512 tokens",
        "tiny with train.evaluate_every 2, train",
    ):
        assert shown in report
        assert shown in page
    tables = re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for table in tables[:-1]:
        assert [line.split()[1] for line in table.splitlines()[2:]] == ["plain", "muon"]
    assert tables[-1].splitlines()[::2] == ["| setting | plain | muon |", "| optim.name | - | muon |"]
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
    for name in ("loss-tokens", "loss-flops", "loss-seconds", "difference"):
        assert f"![{name.replace('-', ' ')}]({name}.svg)" in report
        words = "".join(ElementTree.parse(out / f"{name}.svg").getroot().itertext())
        assert "muon" in words
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert said["variants"]["plain"]["cost"]["flops"] == 512 * said["variants"]["plain"]["cost"]["flops_per_token"]


def test_verdict_follows_the_difference(done):
    """Muon's losses made lower, higher, or the same: the verdict follows."""
    from smolforge.comparison.study.results import verdict

    base = found_values(done)
    for shift, word in ((-1.0, "better, by 1.00"), (1.0, "worse, by 1.00"), (0.0, "no difference: each pair of runs")):
        made = differences({"a": {s: v + shift + s * shift / 1e3 for s, v in base.items()}}, base)["a"]
        assert verdict(made).startswith(word)
    one = differences({"a": {0: 1.0}}, base)["a"]
    assert verdict(one) == "nothing to say: 1 of the 3 pairs of runs that are the fewest"


def found_values(done) -> dict[int, float]:
    return done[2].variants[0].values


def test_compare_prints_study_json_and_progress(done, capsys):
    folder, path, _, said, _ = done
    assert cli.run(["compare", str(path), "--out", str(folder / "out"), "--json"]) == 0
    assert without_speed(json.loads(capsys.readouterr().out)) == said
    speed = json.loads((folder / "out" / "study.json").read_text())["variants"]["muon"]["speed"]
    assert speed["peak_memory_bytes"] == 300 << 20
    assert len(speed["decode_tokens_per_second"]) == benchmarks.ROUNDS
    copy = folder / "copy"
    shutil.copytree(folder / "out", copy)
    shutil.rmtree(copy / "runs" / "muon-seed-2")
    assert cli.run(["compare", str(path), "--out", str(copy)]) == 0
    shown = capsys.readouterr()
    assert "run 6 of 6: muon-seed-2" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[:3]] == ["variant", "plain", "muon"]
    assert "index.html has the figures" in shown.out
