"""Mixtures and stages: proportions exact to a window, every window once an epoch, the same order whatever happens."""

import json
import shutil
from collections import Counter
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import cli
from smolforge.checkpoint import training_state
from smolforge.cli.inspect import mixture as mixture_report
from smolforge.cli.overrides import parse_overrides
from smolforge.comparison import history
from smolforge.comparison.history import read_source_totals, select
from smolforge.comparison.page import render_page
from smolforge.comparison.summaries import runs_report
from smolforge.config import Data
from smolforge.config.base import leaves, replace_settings
from smolforge.config.data import integer_weights
from smolforge.config.load import read_recipe, to_recipe, write_recipe
from smolforge.data.batches import IGNORE_INDEX, TokenWindows, iterate_batches, shuffled_index, unshuffled_index
from smolforge.data.corpus import HELD_OUT, TRAIN, Tokens
from smolforge.data.mixture import (
    Mixture,
    MixtureSchedule,
    MixtureWindows,
    cached_interleaving,
    earliest_deadline_first,
)
from smolforge.data.prepare.build import prepare
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation import measure_corpus
from smolforge.evaluation.perplexity import measure_mixture
from smolforge.formatting import format_setting
from smolforge.runs import resume_or_start
from smolforge.runs.context import ProgressListener
from smolforge.runs.mixture import SourceTokenCounter, mixture_warnings, source_fractions, tokens_needed, window_counts
from smolforge.runs.resolve import resolve_recipe, with_resolved_schedule
from smolforge.testing import sentences, tiny_model, tiny_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.training import guard
from smolforge.training.distributed import RankGroup, World
from smolforge.training.run_folder import read_records
from smolforge.verification.files import check_files as files_checked

WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)
few = settings(max_examples=30)


# The order of sources


@few
@given(WEIGHTS, st.data())
def test_interleaving_keeps_each_source_within_one_window(weights, data):
    given = integer_weights({str(number): weight for number, weight in enumerate(weights)})
    chosen = tuple(given.values())
    mixed, total = cached_interleaving(chosen), sum(chosen)
    length = data.draw(st.integers(1, 3 * total + 5))
    seen = [0] * len(chosen)
    for position in range(length):
        seen[mixed.source(position)] += 1
        assert all(abs(had * total - (position + 1) * share) < total for had, share in zip(seen, chosen, strict=True))
    assert seen == [mixed.count(number, length) for number in range(len(chosen))]
    far = 10**12 + length
    assert all(abs(mixed.count(n, far) * total - far * share) < total for n, share in enumerate(chosen))


def test_earliest_deadline_first_follows_the_shares():
    assert earliest_deadline_first((3, 1)).tolist() == [0, 0, 0, 1]
    assert np.bincount(earliest_deadline_first((7000, 1500, 800, 600, 100))).tolist() == [7000, 1500, 800, 600, 100]
    assert earliest_deadline_first((1,)).tolist() == [0]


def test_weights_become_exact_whole_shares():
    assert integer_weights({"a": 0.7, "b": 0.15, "c": 0.08, "d": 0.06, "e": 0.01}) == dict(
        zip("abcde", (70, 15, 8, 6, 1), strict=True)
    )
    assert integer_weights({"a": 2, "b": 4.0, "c": 0}) == {"a": 1, "b": 2, "c": 0}
    assert integer_weights({"a": 1e-4, "b": 0.9999}) == {"a": 1, "b": 9999}


@few
@given(st.lists(WEIGHTS.map(lambda each: (each + [1] * 3)[:3]), min_size=1, max_size=4), st.data())
def test_mixture_schedule_continues_sources_across_stages(weights, data):
    named = [dict(zip("abc", each, strict=True)) for each in weights]
    lengths = [data.draw(st.integers(1, 60)) for _ in named[1:]]
    ends = np.cumsum(lengths).tolist() if lengths else []
    order, own, places = MixtureSchedule(named, ends), Counter(), []
    for position in range(sum(lengths) + 50):
        stage = sum(end <= position for end in ends)
        assert order.counts(position) == [own[number] for number in range(3)]
        assert order.stage(position) == stage
        source, number = order.source_at(position)
        assert named[stage]["abc"[source]] > 0
        assert number == own[source]
        own[source] += 1
        places.append((stage, "abc"[source]))
    found = order.counts_by_stage(len(places))
    for stage, counts in enumerate(found):
        assert counts == {name: places.count((stage, name)) for name in "abc"}
        total, length = sum(named[stage].values()), sum(counts.values())
        assert all(abs(had * total - named[stage][name] * length) < total for name, had in counts.items())


@few
@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 3))
def test_unshuffled_index_inverts_shuffled_index(count, seed, epoch):
    assert all(
        unshuffled_index(shuffled_index(place, count, seed, epoch=epoch), count, seed, epoch=epoch) == place
        for place in range(count)
    )


@few
@given(st.integers(9, 90), st.integers(2, 8), st.integers(0, 40), st.integers(0, 99))
def test_token_windows_count_labels_without_reading(total, length, number, seed):
    windows = TokenWindows(Tokens([np.arange(total)]), length, seed)
    read = sum(int((windows.window(each)[1] != IGNORE_INDEX).sum()) for each in range(number))
    assert windows.labels(number) == read


# Rows


def rows_of(order, length, seed, sizes=(130, 75, 41)):
    """Of three sources whose ids follow each other."""
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return MixtureWindows(
        {name: Tokens([ids]) for name, ids in zip("abc", parts, strict=True)}, order, length, seed=seed
    )


@few
@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 3).filter(any), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=2, max_size=2),
    st.integers(1, 5),
    st.integers(0, 99),
    st.sampled_from([0, 1, 3]),
    st.data(),
)
def test_mixture_reads_each_window_once_per_epoch(weights, steps, rows, seed, workers, data):
    """Any ranks, workers, restarts and borders read the same rows; of each source each window once an epoch."""
    named = [dict(zip("abc", each, strict=True)) for each in weights]
    ends = (np.cumsum(steps)[: len(named) - 1] * rows).tolist()
    length = 7
    plain = rows_of(MixtureSchedule(named, ends), length, seed)
    straight = list(islice(iterate_batches(plain, count(), rows, num_workers=0), 40))
    world = data.draw(st.integers(1, rows))
    first = data.draw(st.integers(0, 30))
    cuts = [RankGroup(World(rank, world)).rows_of_rank(rows) for rank in range(world)]
    again = rows_of(MixtureSchedule(named, ends), length, seed)
    parts = [
        list(islice(iterate_batches(again, count(first), rows, num_workers=workers, share=cut), 9)) for cut in cuts
    ]
    for step, shared in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat([each.input_ids for each in shared]), straight[first + step].input_ids)
        assert torch.equal(torch.cat([each.labels for each in shared]), straight[first + step].labels)
    starts = {name: Counter() for name in "abc"}
    for batch in straight:
        for ids in batch.input_ids:
            name = "abc"[int(np.searchsorted([130, 205], int(ids[0]), side="right"))]
            starts[name][int(ids[0])] += 1
    for name, seen in starts.items():
        each = plain.windows["abc".index(name)].count
        assert not seen or max(seen.values()) - (min(seen.values()) if len(seen) == each else 0) <= 1


@few
@given(st.integers(0, 60), st.integers(0, 99))
def test_mixture_windows_count_labels_per_source(position, seed):
    rows = rows_of(MixtureSchedule([{"a": 3, "b": 2, "c": 1}, {"a": 0, "b": 1, "c": 5}], [20]), 8, seed)
    read = Counter(dict.fromkeys("abc", 0))
    for each in range(position):
        source, number = rows.schedule.source_at(each)
        read["abc"[source]] += int((rows.windows[source].window(number)[1] != IGNORE_INDEX).sum())
    assert rows.labels(position) == dict(read)


def test_mixture_refuses_a_source_below_one_window():
    with pytest.raises(InvalidFileError, match="the source c has 4 training tokens, which is less than one window"):
        rows_of(MixtureSchedule([{"a": 1, "b": 1, "c": 1}], []), 8, 0, (99, 99, 4))


def test_mixture_sources_do_not_affect_each_other():
    one, two = (
        rows_of(MixtureSchedule([each], []), 8, 3) for each in ({"a": 1, "b": 1, "c": 1}, {"b": 5, "a": 1, "c": 0.5})
    )
    for name in "abc":
        sides = [[rows.windows[rows.schedule.names.index(name)].seed] for rows in (one, two)]
        assert sides[0] == sides[1]
    assert len({each.seed for each in one.windows}) == 3


# What was learned


@few
@given(st.integers(0, 25), st.sets(st.integers(1, 25)), st.lists(st.integers(0, 24), max_size=3, unique=True))
def test_source_token_counter_counts_trained_tokens(done, skipped, jumps):
    rows = rows_of(MixtureSchedule([{"a": 3, "b": 2, "c": 1}, {"a": 0, "b": 1, "c": 5}], [20]), 8, 1)
    taken = tuple((step, 2 * step + 3) for step in sorted(jumps))
    decisions = guard.Decisions(dict.fromkeys(skipped, "nan"), taken, len(jumps), 0)
    recipe = to_recipe(NANO)
    ledger, expected = SourceTokenCounter(rows, recipe, decisions, completed=done), Counter(dict.fromkeys("abc", 0))
    for step in set(range(1, done + 1)) - skipped:
        batch = decisions.next_batch(step - 1)
        for position in range(batch * 4, batch * 4 + 4):
            source, number = rows.schedule.source_at(position)
            expected["abc"[source]] += int((rows.windows[source].window(number)[1] != IGNORE_INDEX).sum())
    assert ledger.tokens == dict(expected)
    before = dict(ledger.tokens)
    assert ledger.after_a_step(7, left_out=True)["tokens_from_a"] == before["a"]
    told = ledger.after_a_step(7, left_out=False)
    assert told["tokens_from_b"] - before["b"] == rows.labels(32)["b"] - rows.labels(28)["b"]
    assert told["stage"] == 2


# Settings


MIXTURE = {"web": {"source": "a.txt", "weight": 0.7}, "code": {"source": "b.txt", "weight": 0.3}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sources": ["x"]}, "data: sources and mixture both say where the text comes from; keep one of them"),
        ({"mixture": {}}, r"mixture names no source; \[data.mixture.NAME\] with a source in it does"),
        ({"mixture": {"web": {"weight": 1}}}, "data.mixture.web: source is not given; it should be text"),
        (
            {"mixture": {"web": {"source": "a", "weight": -1}}},
            "weight is -1; it should be a finite number of at least 0",
        ),
        ({"mixture": {"web": {"source": "a", "wieght": 1}}}, "there is no setting 'wieght'. Did you mean weight?"),
        ({"mixture": {"web": 5}}, "data.mixture.web: it is 5 and should be a table of settings"),
        ({"mixture": {"My-Web": {"source": "a"}}}, "mixture has a source called 'My-Web'; a name is up to 40 small"),
        (
            {"mixture": {"web": {"source": "a", "weight": 0}}},
            "the weights of the mixture sum to zero; give at least one",
        ),
        ({"mixture": {"a": {"source": "a", "weight": 1 / 3}, "b": {"source": "b", "weight": 1 / 7}}}, "fewer digits"),
        (
            {"mixture": {"a": {"source": "a", "weight": 1e-200}, "b": {"source": "b", "weight": 1e200}}},
            r"as whole numbers, sum to more than 10\^12, and the most is 100,000; give them to fewer digits",
        ),
        (
            {"mixture": {"web": {"source": "a", "text_template": "{a}", "text_url": "http://x/{a}"}}},
            "data: mixture.web: text_template and text_url both say what the text is; give one of them",
        ),
        (
            {"mixture": {"web": {"source": "a", "encoding_key": "a"}}},
            "data: mixture.web: encoding_key is of what text_url fetches, which is not given",
        ),
        (
            {"mixture": {"web": {"source": "a", "max_characters": 5}}, "min_characters": 9},
            r"data: mixture.web: max_characters \(5\) is below min_characters \(9\)",
        ),
        ({"mixture": "none", "stages": [{}]}, "stages change the weights of data.mixture, and there is none"),
        ({"stages": []}, "stages is an empty list; none is one stage"),
        ({"stages": [{"weights": {"wbe": 1}}]}, "weighs 'wbe', which is no source.*Did you mean web?"),
        ({"stages": [{"weights": {"web": True}}]}, "weights is {'web': True}; it should be a table of names"),
        ({"stages": [{"weights": {"web": 0}}]}, r"the weights of stage 1 sum to zero"),
        ({"stages": [{"until_step": 3}]}, "stage 1 is the last and has until_step; the last goes on to the end"),
        ({"stages": [{"name": "first"}, {}]}, r"stage 1 \(first\) has no end; give it one of until_step"),
        ({"stages": [{"until_step": 1, "until": "decay"}, {}]}, "has until_step and until; give it one of"),
        ({"stages": [{"until_step": -1}, {}]}, "data.stages.1: until_step is -1; it should be a whole number above 0"),
        ({"stages": [{"until": "dekay"}, {}]}, "data.stages.1: until is 'dekay'; it should be decay, or none"),
        ({"stages": [{"until_step": 9}, {"until_step": 4}, {}]}, "stage 2 begins after step 9 and ends after step 4"),
        ({"stages": [{"until_step": 0.5}, {"until_step": 0.4}, {}]}, "stage 2 begins after step 500 and ends after"),
        ({"stages": [{"until_step": 9}, {"until_step": 9}, {}]}, "begins after step 9 and ends after step 9"),
        ({"stages": [{"until_tokens": 5000}, {}]}, "ends inside a step, after 5000 tokens.*make it 4096 or 8192"),
        ({"format": "chat"}, "a mixture is of text, and format is chat; name one source with data.sources"),
    ],
)
def test_mixture_config_errors_are_sentences(data, said):
    with pytest.raises(ConfigError, match=said):
        to_recipe({"data": {"mixture": MIXTURE} | data, "train": {"batch_tokens": 4096}})


def test_stages_end_with_the_schedule():
    data = {"mixture": MIXTURE, "stages": [{"until_step": 0.25}, {"until": "decay"}, {"weights": {"code": 1}}]}
    recipe = to_recipe({"data": data, "optim": {"schedule": {"decay_steps": 0.2, "warmup_steps": 3}}})
    ends = lambda recipe, steps: [each.until_step for each in with_resolved_schedule(recipe, steps).data.stages]  # noqa: E731
    assert ends(recipe, 1000) == [250, 800, None]
    assert ends(recipe, 10) == [2, 8, None]
    after_warm_up = replace_settings(recipe, {"optim.schedule.decay_steps": None, "data.stages": data["stages"][1:]})
    assert ends(after_warm_up, 1000) == [3, None]
    with pytest.raises(ConfigError, match=r"stage 2 ends with the decay, and optim\.schedule\.decay is none"):
        replace_settings(recipe, {"optim.schedule.decay": None})
    with pytest.raises(ConfigError, match=r"train\.epochs is of one text"):
        replace_settings(recipe, {"train.epochs": 2.0})


def test_budget_moves_the_stage_borders():
    asked = replace_settings(read_recipe("smollm2-curriculum"), {"budget": "50M-tokens", "train.device": "cpu"})
    small = resolve_recipe(replace_settings(asked, {"model": tiny_model_settings(), "train.sequence_length": 128}))
    horizon, ends = small.optim.schedule.steps, [each.until_step for each in small.data.stages[:-1]]
    shares_of = [end / horizon for end in ends]
    assert shares_of == pytest.approx([6 / 10.99, 8 / 10.99, 0.9], abs=0.01)
    assert ends[-1] == small.optim.schedule.decay_begins


def tiny_model_settings():
    return tiny_model().config.model_dump()


def test_resolved_mixture_survives_write_and_read(tmp_path):
    data = {"mixture": MIXTURE, "stages": [{"until": "decay", "name": "stable"}, {"weights": {"code": 2.5}}]}
    recipe = with_resolved_schedule(to_recipe({"data": data, "optim": {"schedule": {"decay_steps": 0.2}}}), 100)
    (tmp_path / "r.toml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "r.toml") == recipe


# Runs

START = {"train.steps": 2, "optim.schedule.steps": 8}
"""The first steps of one that is to have 8."""


def written(path: Path, start: int, lines: int = 400) -> str:
    path.write_text(sentences(lines, start))
    return str(path)


@pytest.fixture
def mixed(tmp_path):
    """A recipe of three stages, the last with the decay, whose second source is read several times."""
    tiny_tokenizer().save(tmp_path / "tokenizer")
    mixture = {
        "web": {"source": written(tmp_path / "web.txt", 0, 900), "weight": 3},
        "code": {"source": written(tmp_path / "code.txt", 5000, 8), "held_out": 0.2},
        "math": {"source": written(tmp_path / "math.txt", 9000), "held_out": 0.0},
    }
    stages = [
        {"until_step": 3},
        {"until": "decay", "weights": {"code": 0.5, "math": 0.5}},
        {"name": "end", "weights": {"web": 0.1, "math": 0.9}},
    ]
    tree = NANO | {"tokenizer": str(tmp_path / "tokenizer"), "data": {"mixture": mixture, "stages": stages}}
    tree["optim"] = NANO["optim"] | {"schedule": NANO["optim"]["schedule"] | {"decay_steps": 2}}
    (tmp_path / "mixed.json").write_text(json.dumps(tree))
    return tmp_path / "mixed.json"


class Killing(ProgressListener):
    """Ends a run in a hurry when it has done so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, metrics: dict) -> None:
        if metrics["step"] == self.after:
            raise KeyboardInterrupt


def weights_of(run: Path, step: int) -> bytes:
    return (training_state.checkpoint_dir(run, step) / "model.safetensors").read_bytes()


def metrics_of(run: Path) -> list[dict]:
    return read_records(run / "metrics.jsonl")


def test_run_reads_exactly_its_mixture(mixed, tmp_path, caplog):
    caplog.set_level("INFO", "smolforge")
    run = resume_or_start(mixed, tmp_path / "runs" / "a", {"data.warn_epochs": 1})
    records = metrics_of(run.folder)
    assert [record["stage"] for record in records] == [1, 1, 1, 2, 2, 2, 3, 3]
    for record in records:
        assert sum(record[f"tokens_from_{name}"] for name in ("web", "code", "math")) == record["tokens"]
    rows = {name: records[2][f"tokens_from_{name}"] / 32 for name in ("web", "code", "math")}
    assert rows["web"] == pytest.approx(12 * 3 / 5, abs=1)
    assert records[5]["tokens_from_web"] == records[2]["tokens_from_web"]
    assert caplog.text.count("code will be read 2.7 times (data.warn_epochs is 1)") == 1, "before the first step"
    assert "web will be read" not in caplog.text
    measured = [record for record in records if "validation_loss" in record]
    assert {"validation_loss_web", "validation_bits_per_byte_code"} <= measured[0].keys()
    assert "validation_loss_math" not in measured[0]
    names = {check.name: check.holds for check in files_checked(run.folder)}
    assert {name: names[name] for name in ("web", "code", "math")} == dict.fromkeys(("web", "code", "math"), True)


def test_mixture_prepares_only_the_tokens_needed(mixed, tmp_path):
    run = resume_or_start(mixed, tmp_path / "runs" / "a", START)
    text, needed = Mixture.open(run.folder), tokens_needed(run.recipe)
    assert needed["web"] == MixtureSchedule.from_data(run.recipe.data, [3, 6], 4).counts(32)[0] * 32 + 1
    assert needed["web"] <= text.sources["web"].size(TRAIN)["tokens"] <= needed["web"] + 1
    assert text.sources["math"].size(HELD_OUT)["tokens"] == 0


def test_mixture_resumes_bit_for_bit_across_stages(mixed, tmp_path):
    straight = resume_or_start(mixed, tmp_path / "runs" / "a", {"train.evaluate_every": None})
    given = {"optim.schedule.steps": 8, "data.num_workers": 3, "train.evaluate_every": None}
    resume_or_start(mixed, tmp_path / "runs" / "b", given | {"train.steps": 3})  # at a border
    with pytest.raises(KeyboardInterrupt):  # behind the next, with a checkpoint before it
        resume_or_start(mixed, tmp_path / "runs" / "b", given | {"train.steps": 8}, listener=Killing(7))
    assert metrics_of(tmp_path / "runs" / "b")[-1]["stage"] == 3
    run = resume_or_start(mixed, tmp_path / "runs" / "b", given | {"train.steps": 8})
    assert weights_of(run.folder, 8) == weights_of(straight.folder, 8)
    keys = ("loss", "stage", "tokens", "tokens_from_web", "tokens_from_code", "tokens_from_math")
    one, two = ([[record[key] for key in keys] for record in metrics_of(each.folder)] for each in (run, straight))
    assert one == two


def test_mixture_sources_are_prepared_once_for_all_runs(mixed, tmp_path, monkeypatch):
    first = resume_or_start(mixed, tmp_path / "runs" / "a", START)
    monkeypatch.setattr("smolforge.data.prepare.build.write_corpus", None)
    second = resume_or_start(mixed, tmp_path / "runs" / "b", START)
    assert Mixture.open(first.folder).fingerprint == Mixture.open(second.folder).fingerprint
    for name in ("web", "code", "math"):
        (tmp_path / f"{name}.txt").unlink()
    assert resume_or_start(mixed, tmp_path / "runs" / "b", {"train.steps": 3}).metrics["step"] == 3


def test_mixture_detects_a_changed_source(mixed, tmp_path):
    small = START
    one = resume_or_start(mixed, tmp_path / "runs" / "a", small)
    before = Mixture.open(one.folder)
    written(tmp_path / "web.txt", 77, 900)
    two = Mixture.open(resume_or_start(mixed, tmp_path / "runs" / "b", small).folder)
    same = {name: two.sources[name].folder == before.sources[name].folder for name in before.sources}
    assert same == {"web": False, "code": True, "math": True}
    tiny_tokenizer(300).save(tmp_path / "tokenizer")
    three = Mixture.open(resume_or_start(mixed, tmp_path / "runs" / "c", small).folder)
    assert not {each.folder for each in three.sources.values()} & {each.folder for each in two.sources.values()}
    shutil.rmtree(before.sources["web"].folder)
    with pytest.raises(InvalidFileError, match="the prepared source web is gone from"):
        resume_or_start(mixed, one.folder, {"train.steps": 3})
    shutil.copytree(two.sources["web"].folder, before.sources["web"].folder)
    with pytest.raises(InvalidFileError, match="the source web in .* is another than this run's"):
        resume_or_start(mixed, one.folder, {"train.steps": 3})
    (one.folder / "mixture.json").unlink()
    shutil.rmtree(before.sources["web"].folder)
    with pytest.raises(InvalidFileError, match="was trained on another corpus"):
        resume_or_start(mixed, one.folder, {"train.steps": 3})


def test_resume_refuses_changed_mixture_settings(mixed, tmp_path, text_file):
    run = tmp_path / "runs" / "a"
    resume_or_start(mixed, run, START | {"data.mixture.web.weight": 2})
    with pytest.raises(ConfigError, match=r"data\.mixture\.web\.weight \(2\.0, now 4\.0\)"):
        resume_or_start(mixed, run, {"train.steps": 3, "data.mixture.web.weight": 4})
    changed = r"data\.mixture \(a table of web, code, math, now none\), data\.stages \(a list of 3 tables, now none\)"
    with pytest.raises(ConfigError, match=rf"data\.sources \(\(\), now .* {changed}"):
        resume_or_start(mixed, run, {"train.steps": 3, "data.sources": [str(text_file)]})
    assert resume_or_start(mixed, run, {"train.steps": 3, "data.mixture.web.weight": 2}).metrics["step"] == 3
    plain = {"data.sources": [str(text_file)]} | START
    resume_or_start(mixed, tmp_path / "runs" / "b", plain)
    assert resume_or_start(mixed, tmp_path / "runs" / "b", plain).recipe.data.mixture is None


def test_longer_run_warns_that_sources_repeat(mixed, tmp_path, caplog):
    recipe = resume_or_start(mixed, tmp_path / "runs" / "a", START).recipe
    assert "prepared for the schedule" not in caplog.text
    resume_or_start(mixed, tmp_path / "runs" / "a", {"train.steps": 9})
    assert "the sources were prepared for the schedule's 8 steps; beyond them" in caplog.text
    assert window_counts(replace_settings(recipe, {"train.steps": 99})) == window_counts(recipe)


def test_mixture_requires_one_tokenizer(mixed, tmp_path):
    with pytest.raises(ConfigError, match="need the same tokenizer, and none is named; --tokenizer names one"):
        resume_or_start(mixed, tmp_path / "runs" / "a", {"tokenizer": "none"})
    web = prepare(Data(sources=(str(tmp_path / "web.txt"),)), tmp_path / "web", tiny_tokenizer())
    given = {"tokenizer": "none", "data.mixture.web.source": str(tmp_path / "web")} | START
    run = resume_or_start(mixed, tmp_path / "runs" / "b", given)
    assert Mixture.open(run.folder).sources["web"].fingerprint == web.fingerprint
    prepare(Data(sources=(str(tmp_path / "code.txt"),)), tmp_path / "code", tiny_tokenizer(300))
    other = given | {"data.mixture.code.source": str(tmp_path / "code")}
    with pytest.raises(ConfigError, match=r"data\.mixture\.code: .* was made with another tokenizer than the rest"):
        resume_or_start(mixed, tmp_path / "runs" / "c", other)
    ended = Tokenizer(tiny_tokenizer().backend, {"eos_token": "<|im_end|>"})
    prepare(Data(sources=(str(tmp_path / "code.txt"),)), tmp_path / "ended", ended)
    other = given | {"data.mixture.code.source": str(tmp_path / "ended")}
    with pytest.raises(ConfigError, match="was made with another tokenizer than the rest"):
        resume_or_start(mixed, tmp_path / "runs" / "d", other)


def test_mixture_names_a_missing_source(mixed, tmp_path):
    with pytest.raises(InvalidFileError, match=r"data\.mixture\.math: there is no file, directory or match"):
        resume_or_start(mixed, tmp_path / "runs" / "a", {"data.mixture.math.source": "nope.txt"})
    assert not list(tmp_path.rglob("corpora/*")), "before any other is prepared"


def test_validation_loss_is_weighted_by_source_fractions(mixed, tmp_path):
    run = resume_or_start(mixed, tmp_path / "runs" / "a", START)
    text, model = Mixture.open(run.folder), tiny_model()
    part = source_fractions(run.recipe)
    told = measure_mixture(model, text, part, sequence_length=32)
    alone = {name: measure_corpus(model, text.sources[name], 32) for name in ("web", "code")}
    whole = part["web"] + part["code"]
    for key in ("loss", "accuracy"):
        expected = sum(part[name] * alone[name][key] for name in alone) / whole
        assert told[key] == pytest.approx(expected)
    assert told["loss_code"] == alone["code"]["loss"]
    low, high = sorted(alone[name]["bits_per_byte"] for name in alone)
    assert low <= told["bits_per_byte"] <= high


@pytest.mark.parametrize(
    ("ends", "reached"), [({"until_step": 7}, True), ({"until_step": 8}, False), ({"until_tokens": 128 * 99}, False)]
)
def test_unreached_stage_gives_a_warning(mixed, ends, reached):
    tree = json.loads(mixed.read_text())
    tree["data"]["stages"] = [ends, {"name": "late", "weights": {"math": 1, "web": 1}}]
    mixed.write_text(json.dumps(tree))
    told = mixture_warnings(resolve_recipe(read_recipe(mixed)), {})
    begin = ends.get("until_step", 99)
    said = f"stage 2 (late) begins after step {begin}, and the schedule has 8: it is never reached (data.stages)"
    assert told == ([] if reached else [said])
    assert not mixture_warnings(resolve_recipe(read_recipe(mixed, {"train.steps": 2, "optim.schedule.steps": 100})), {})


def test_source_errors_name_the_settings_of_the_source(mixed, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "a", "score": 1}\n' * 9)
    given = {"data.mixture.web.source": str(tmp_path / "rows.jsonl")}
    for more, said in (
        ({}, r"has no text under the key 'text'; name the right one with --data\.mixture\.web\.text-key"),
        ({"text_key": "body", "filters": ["scor > 1"]}, r"has no key 'scor' \(data\.mixture\.web\.filters\)"),
    ):
        own = {f"data.mixture.web.{name}": value for name, value in more.items()}
        with pytest.raises(InvalidFileError, match=rf"data\.mixture\.web: .*rows.jsonl, line 1 {said}"):
            resume_or_start(mixed, tmp_path / "runs" / "a", given | own | START)


# What is told


def test_flags_set_mixture_settings():
    given = parse_overrides(["--data.mixture.my_web.source", "a.txt", "--data.mixture.my-web.weight=0.5"])
    assert given == {"data.mixture.my_web.source": "a.txt", "data.mixture.my_web.weight": "0.5"}
    recipe = read_recipe("nano", given)
    assert recipe.data.sources == ()
    assert recipe.data.weights == [{"my_web": 0.5}]
    for words in (["--data.mixture.web.wieght", "1"], ["--data.stages.1.until-step", "5"]):
        with pytest.raises(ConfigError, match="there is no setting --data"):
            parse_overrides(words)


def test_misspelled_source_name_is_refused():
    with pytest.raises(
        ConfigError, match=r"data\.mixture\.dlcm\.weight: .* no source 'dlcm'\. Did you mean dclm\? With"
    ):
        read_recipe("smollm2-135m", {"data.mixture.dlcm.weight": 1})
    with pytest.raises(ConfigError, match=r"no source 'web'\. With data\.mixture\.web\.source it gets one"):
        read_recipe("nano", {"data.mixture.web.weight": 1, "data.mixture.code.source": "x"})
    assert read_recipe("nano", {"data.mixture.web": {"source": "x"}}).data.weights == [{"web": 1.0}]


def test_data_sources_replace_the_mixture():
    assert read_recipe("smollm2-135m", {"data.sources": ["x.txt"]}).data.mixture is None
    with pytest.raises(ConfigError, match="sources and mixture both say where the text comes from"):
        read_recipe("smollm2-135m", {"data.sources": ["x.txt"], "data.mixture.dclm.weight": 1})


def test_mixture_source_inherits_shared_settings():
    shared = Data.model_validate(
        {"mixture": MIXTURE | {"math": {"source": "m", "held_out": 0.0}}, "text_key": "content"}
    )
    alone = shared.single_source("math")
    assert (alone.sources, alone.text_key, alone.held_out, alone.mixture) == (("m",), "content", 0.0, None)
    assert shared.single_source("web").held_out == shared.held_out


def test_sources_without_weight_are_dropped():
    weightless = {"mixture": MIXTURE | {"math": {"source": "m", "weight": 0}}}
    assert list(Data.model_validate(weightless).weights[0]) == ["web", "code"]


def test_inspect_and_compare_show_the_mixture(mixed, tmp_path, capsys):
    facts = mixture_report.recipe_mixture_report(resolve_recipe(read_recipe(mixed, {"data.mixture.code.tokens": 64})))
    stages, sources = facts["mixture"]["stages"], facts["mixture"]["sources"]
    assert [(each["name"], each["after_step"]) for each in stages] == [
        ("stage 1", 0),
        ("stage 2", 3),
        ("stage 3 (end)", 6),
    ]
    assert sum(sum(each["tokens"].values()) for each in stages) == 8 * 128
    assert sources["code"]["epochs"] == sources["code"]["tokens"] / 64
    once, never = ({"data.mixture.code.tokens": 64, "data.warn_epochs": most} for most in (1, None))
    (warned,) = mixture_report.recipe_warnings(resolve_recipe(read_recipe(mixed, once)), facts)
    assert warned.startswith(f"code will be read {sources['code']['epochs']:.1f} times (data.warn_epochs is 1)")
    assert mixture_report.recipe_warnings(resolve_recipe(read_recipe(mixed, never)), facts) == []
    elsewhere = {"data.mixture.code.source": "gone.txt", "data.mixture.web.source": "org/set"}
    (missing,) = mixture_report.recipe_warnings(resolve_recipe(read_recipe(mixed, never | elsewhere)), facts)
    assert missing == "data.mixture.code: there is no file, directory or match for the data source 'gone.txt'"
    printed = mixture_report.mixture_lines(facts)
    assert printed[1].split()[:4] == ["source", "tokens", "share", "epochs"]
    assert printed[-1] == "stage 3 (end) begins after step 6"
    run = resume_or_start(mixed, tmp_path / "runs" / "a", {})
    last = metrics_of(run.folder)[-1]
    told = read_source_totals(history.read_history(run.folder))
    assert {each.source: each.tokens for each in told} == {
        name: last[f"tokens_from_{name}"] for name in ("web", "code", "math")
    }
    sizes = {name: corpus.size(TRAIN)["tokens"] - 1 for name, corpus in Mixture.open(run.folder).sources.items()}
    assert all(each.epochs == each.tokens / sizes[each.source] for each in told)
    assert told[1].validation_loss == last["validation_loss_code"]
    assert cli.run(["inspect", str(run.folder)]) == 0
    assert "math" in capsys.readouterr().out.split("epochs")[-1]
    page = render_page(runs_report(select([run.folder])), {})
    assert "What was read" in page
    assert f"{told[0].tokens:,}" in page
    run_in_words = format_setting(leaves(run.recipe)["data.mixture"])
    assert run_in_words.startswith("web source") and "weight 3.0" in run_in_words
