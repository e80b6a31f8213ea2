"""Runs read back and shown side by side: states, tables, curves, figures, the page, the commands."""

import json
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import NANO
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import cli
from smolforge.cli.compare import report_lines
from smolforge.comparison import figures, page, style, summaries
from smolforge.comparison.history import TIME_PARTS, holds_runs, read_history, select, shortest_names
from smolforge.config.load import to_recipe, write_recipe
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.runs import train
from smolforge.training.run_folder import as_line

FIXTURES = Path(__file__).parent / "fixtures"
HOLD = """
import pathlib, sys
from smolforge.atomic import lock_file
with lock_file(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def step_line(step: int, **more) -> dict:
    """What a run writes of a step that takes half a second, a fifth of it in data."""
    seconds = {"seconds_data": 0.1, "seconds_forward": 0.2, "seconds_backward": 0.1, "seconds_optimizer": 0.1}
    rates = {"tokens_per_second": 256.0, "mfu": 0.4, "seconds_other": 0.0, **seconds}
    held = {"validation_loss": 6 - step / 10, "validation_bits_per_byte": 2.0} if step % 4 == 0 else {}
    return {
        "step": step,
        "tokens": 128 * step,
        "loss": 6 - step / 9,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        **rates,
        **held,
        **more,
    }


def start(step: int = 0, **more) -> dict:
    return {"step": step, "time": "2026-08-20T10:11:12+0000", "name": "a cpu", "threads": 2, "seen": {}, **more}


def ended(state: str, reason: str = "") -> dict:
    return {"ended": {"time": "2026-08-20T11:00:00+0000", "state": state, "reason": reason}}


FINISHED = (start(**ended("finished")),)


def make_run(folder: Path, metrics=8, starts=FINISHED, samples=(), incidents=(), **changes) -> Path:
    """A run as its folder tells it; `metrics` are its lines, or how many."""
    tree = json.loads(json.dumps(NANO | {"data": {"sources": ["text.txt"]}}))
    for dotted, value in changes.items():
        group, _, name = dotted.partition("__")
        tree[group][name] = value
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(write_recipe(to_recipe(tree)))
    lines = [step_line(step) for step in range(1, metrics + 1)] if isinstance(metrics, int) else metrics
    for name, records in {"metrics": lines, "samples": samples, "incidents": incidents}.items():
        (folder / f"{name}.jsonl").write_text("".join(map(as_line, records)))
    (folder / "environment.json").write_text(json.dumps(list(starts)))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    return three_runs(tmp_path / "runs")


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """What compare writes of the three."""
    home = tmp_path_factory.mktemp("shown")
    summaries.write_report(select([three_runs(home / "runs")]), home / "out")
    return home / "out"


def three_runs(folder: Path) -> Path:
    """One through, one stopped and resumed, one that went wrong; names and texts as bad as they come."""
    make_run(folder / "through")
    texts = [{"step": step, "prompt": "", "text": "<script>alert(1)</script>\n\n\n\nthe"} for step in (2, 4, 6, 8)]
    twice = (start(**ended("stopped", "stopped by SIGINT")), start(4, threads=4, **ended("finished")))
    make_run(folder / "$a_1$ <b>", starts=twice, samples=texts, optim__learning_rate=2e-3)
    wrong = [
        step_line(step, **({"loss": None, "left_out": "the loss is nan"} if step == 5 else {})) for step in range(1, 8)
    ]
    incidents = [
        {"kind": "rewind", "step": 4, "to": 2, "reason": "the loss is 9", "next_batch": 5},
        {"kind": "skip", "step": 5, "reason": "the loss is nan"},
    ]
    make_run(folder / "_日本", wrong, (start(**ended("diverged", "its numbers went wrong")),), incidents=incidents)
    return folder


@pytest.mark.parametrize(
    ("metrics", "starts", "state", "why"),
    [
        (8, FINISHED, "finished", "all 8 steps are done"),
        (5, (start(**ended("stopped", "stopped by SIGTERM")),), "stopped", "stopped by SIGTERM"),
        (5, (start(**ended("diverged", "too often")),), "diverged", "too often"),
        (5, (start(**ended("failed", "no room")),), "failed", "no room"),
        (5, (start(**ended("failed")),), "failed", "it ended after step 5 of 8 and gave no reason"),
        (5, (start(**ended("stopped")), start(4)), "killed", "its process was gone after step 5 of 8 without a word"),
        (0, (start(),), "killed", "its process was gone before its first step without a word"),
        (0, (), "not begun", "nothing was trained yet"),
        (8, (), "finished", "all 8 steps are done"),
        (5, ({"step": 0, "time": ""},), "stopped", "by a version that did not write down why"),
    ],
)
def test_run_history_reports_the_state(tmp_path, metrics, starts, state, why):
    run = read_history(make_run(tmp_path / "run", metrics, starts))
    assert run.state == state
    assert why in run.reason
    assert (run.step, run.steps) == (metrics, 8)


def test_run_history_reports_a_running_process(tmp_path):
    folder = make_run(tmp_path / "run", 5, [start()])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    command = [sys.executable, "-c", HOLD, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline().strip() == b"held"
        run = read_history(folder)
        child.kill()
    holder = f"{child.pid} on {socket.gethostname()}"
    assert (run.state, run.reason, run.step) == ("running", f"process {holder} trains it", 5)
    assert read_history(folder).state == "killed"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("recipe.toml", None, "has no recipe.toml: no training began in it"),
        ("recipe.toml", "[train]\nsteps = 0\n", "train.steps is 0"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl, line 1 has no step that is a whole number"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', "line 2 is not a JSON object"),
        ("samples.jsonl", '{"step": 1, "prompt": "", "text": 5}\n', "samples.jsonl, line 1 has no text that is a text"),
        ("incidents.jsonl", '{"step": 1}\n', "incidents.jsonl, line 1 has no kind that is a text"),
        ("environment.json", "[{]", "environment.json is not JSON"),
        ("environment.json", "{}", "environment.json is not a list of starts"),
        ("environment.json", "[{}]", "environment.json, start 1 has no step"),
        ("environment.json", '[{"step": 0, "ended": {"state": "eaten"}}]', "ended as {'state': 'eaten'}, which this"),
    ],
)
def test_run_history_names_what_is_corrupted(tmp_path, capsys, file, content, said):
    folder = make_run(tmp_path / "all" / "run")
    make_run(tmp_path / "all" / "sound")
    (folder / file).unlink()
    for name in (".lock", "run.log"):
        (folder / name).touch()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises((InvalidFileError, ConfigError), match=re.escape(said)):
        read_history(folder)
    for words in (["compare", str(folder), "--out", str(tmp_path / "out")], ["inspect", str(folder), str(folder)]):
        assert cli.run(words) in (2, 3)
        assert said in capsys.readouterr().err
    selection = select([folder.parent])
    assert [run.name for run in selection.runs] == ["sound"]
    assert said in selection.broken["run"]
    broken = summaries.table_rows(selection)[-1]
    assert (broken.run, broken.state, broken.step) == ("run", "broken", None)


def test_step_seconds_come_from_phases_or_the_rate(tmp_path):
    lines = [step_line(1), step_line(2, seconds_between=3.0), {"step": 3, "tokens_per_second": 64.0}, {"step": 4}]
    run = read_history(make_run(tmp_path / "run", lines))
    assert run.seconds.tolist() == pytest.approx([0.5, 4.0, 6.0, 6.0])
    assert run.tokens.tolist() == [128, 256, 384, 512]
    assert set(run.phase_seconds) == set(TIME_PARTS)
    older = read_history(FIXTURES / "format-1")
    assert older.phase_seconds == {}
    rates = [json.loads(line)["tokens_per_second"] for line in (older.path / "metrics.jsonl").read_text().splitlines()]
    assert older.seconds[-1] == pytest.approx(sum(128 / rate for rate in rates))
    assert (older.state, older.step) == ("finished", 4)


def test_table_shows_each_run(runs):
    rows = summaries.table_rows(select([runs]))
    assert [row.run for row in rows] == ["$a_1$ <b>", "_日本", "through"]
    twice, wrong, through = rows
    assert (twice.resumed, wrong.resumed) == ([4], [])
    assert (through.loss, through.validation_loss) == (pytest.approx(6 - 8 / 9), pytest.approx(5.2))
    assert (through.tokens, through.seconds, through.tokens_per_second) == (8 * 128, pytest.approx(4.0), 256.0)
    assert (wrong.step, wrong.steps, wrong.state, wrong.why) == (7, 8, "diverged", "its numbers went wrong")
    heading, *lines = report_lines(summaries.runs_table(rows))
    assert heading.split()[:4] == ["run", "state", "step", "loss"]
    said = r"through +finished +8 of 8 +5\.111 +5\.200 +2\.000 +256 +0:00:04 +[\d-]{10} \d\d:\d\d  all 8 steps are done"
    assert re.fullmatch(said, lines[2])
    assert lines[2].index("all 8") == heading.index("why")


def test_newest_value_skips_missing_numbers(tmp_path):
    run = read_history(
        make_run(tmp_path / "run", [step_line(1), step_line(2, loss=None, tokens_per_second_median=99.0)])
    )
    assert run.newest("loss") == pytest.approx(6 - 1 / 9)
    assert run.newest("nothing") is None
    assert run.tokens_per_second == 99.0


NAMES = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), unique=True, min_size=1, max_size=9
)


@given(NAMES)
def test_shortest_names_are_unique(every):
    paths = [Path("/", *parts) for parts in every]
    names = shortest_names(paths)
    assert len(set(names)) == len(names)
    for path, name in zip(paths, names, strict=True):
        count = len(Path(name.strip("/")).parts)
        assert path.parts[-count:] == Path(name.strip("/")).parts
        shorter = path.parts[len(path.parts) - count + 1 :]
        assert count == 1 or sum(other.parts[-count + 1 :] == shorter for other in paths) > 1 or name == str(path)


def test_select_finds_runs_in_folders(tmp_path):
    for name in ("lr-10", "lr-2", "deep/one/run", "old/run", ".hidden/run"):
        make_run(tmp_path / name, 1)
    (tmp_path / "notes.txt").touch()
    assert [run.name for run in select([tmp_path]).runs] == ["lr-2", "lr-10", "run"]
    again = select([tmp_path / "lr-2", tmp_path / "deep", tmp_path, tmp_path / "lr-2"])
    assert [run.name for run in again.runs] == ["lr-2", "one/run", "lr-10", "old/run"]
    assert holds_runs(tmp_path)
    assert not holds_runs(tmp_path / "lr-2")
    assert not holds_runs(tmp_path / "notes.txt")


XY = st.integers(1, 400).flatmap(
    lambda n: st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=n, max_size=n)
)


@settings(deadline=None, max_examples=60)
@given(XY, st.integers(3, 50))
def test_thinned_keeps_ends_and_means(values, most):
    y = np.array(values)
    x = np.arange(len(y), dtype=float) * 3
    thin_x, thin_y = figures.downsample(x, y, most)
    assert len(thin_x) == len(thin_y) == min(most, len(y))
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert np.array_equal([thin_y[0], thin_y[-1]], [y[0], y[-1]], equal_nan=True)
    assert np.all(np.diff(thin_x) > 0)
    if np.isfinite(y).all() and len(y) > most and (len(y) - 2) % (most - 2) == 0:
        assert thin_y[1:-1].mean() == pytest.approx(y[1:-1].mean(), abs=1e-6)
    if len(y) > 1:
        assert np.isnan(y[1:-1]).all() == np.isnan(thin_y[1:-1]).all()


@settings(deadline=None, max_examples=60)
@given(XY)
def test_smoothed_starts_at_the_curve_and_stays_inside(values):
    y = np.array(values)
    smooth = figures.running_mean(y, share=0.2)
    assert np.array_equal(smooth[:1], y[:1], equal_nan=True)
    if np.isfinite(y).any():
        assert np.nanmin(y) - 1e-9 <= np.nanmin(smooth) <= np.nanmax(smooth) <= np.nanmax(y) + 1e-9
    line = np.arange(float(len(y)))
    half = int(len(y) * 0.2) // 2
    assert figures.running_mean(line, 0.2)[: len(y) - half] == pytest.approx(line[: len(y) - half])


def test_axis_extent_ignores_a_diverged_run():
    good, broken = np.linspace(9, 3, 100), np.concatenate([np.linspace(9, 5, 60), np.full(40, 1e6)])
    low, high = figures.loss_limits([good, broken])
    assert (low, high) == figures.loss_limits([np.append(good, 1e6)])
    assert 2.5 < low < 3 < 11.25 < high < 11.8
    assert figures.loss_limits([good])[1] < 9.2
    assert figures.loss_limits([np.full(9, 2.0)]) == (1.5, 2.5)
    assert figures.loss_limits([np.array([np.nan])]) is None
    assert figures.axis_unit("tokens", 2e6) == (1e6, "million tokens")
    assert figures.axis_unit("tokens", 12.0) == (1, "tokens")


def test_figures_mark_resumes_and_rewinds(runs):
    twice, wrong, _ = select([runs]).runs
    assert figures.interruptions(twice) == [(4, "resumed")]
    assert figures.interruptions(wrong) == [(2, "rewound"), (5, "left out")]
    over = select([runs / "$a_1$ <b>"]).runs[0].record_steps.astype(float)
    with style.style_context("test"):
        (axes,) = figures.loss_figure([twice], x_axis="steps").axes
    assert [text.get_text() for text in axes.texts] == ["resumed at step 4"]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [4.0]
    assert read_history(make_run(runs / "again", starts=[*FINISHED, start(8, **ended("finished"))])).resumes == []
    assert over.tolist() == list(range(1, 9))


def test_figures_drop_overlapping_labels(tmp_path):
    starts = [start(step, **ended("stopped")) for step in (0, 100, 110, 150, 160, 480)]
    run = read_history(make_run(tmp_path / "run", 500, starts, train__steps=500))
    with style.style_context("test"):
        figure = figures.loss_figure([run])
        (axes,) = figure.axes
        figure.canvas.draw()
    assert [text.get_text() for text in axes.texts] == [f"resumed at step {step}" for step in (100, 150, 480)]
    first, second, last = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)
    assert not second.overlaps(last)
    assert last.x1 <= figure.bbox.x1


def test_loss_figure_shows_the_exact_values(runs):
    through = read_history(runs / "through")
    with style.style_context("test"):
        (axes,) = figures.loss_figure([through]).axes
    each, _, held = axes.lines
    assert each.get_ydata().tolist() == through.column("loss").tolist()
    assert held.get_ydata().tolist() == pytest.approx([5.6, 5.2])
    assert held.get_xdata().tolist() == [512, 1024]


def test_mean_step_phases_skip_compile_steps(tmp_path):
    lines = [step_line(step, seconds_forward=9.0 if step in (1, 5) else 0.2) for step in range(1, 9)]
    starts = (start(**ended("stopped")), start(4, **ended("finished")))
    found = figures.mean_phase_seconds(read_history(make_run(tmp_path / "run", lines, starts)))
    assert found == pytest.approx({"data": 0.1, "forward": 0.2, "backward": 0.1, "optimizer": 0.1, "other": 0.0})


NAMES_OF_FIGURES = ["loss-tokens", "loss-steps", "loss-seconds", "learning-rate", "speed", "gradient-norm", "step-time"]


def test_figures_are_svg_and_png(shown):
    assert sorted(file.stem for file in shown.glob("*.svg")) == sorted(NAMES_OF_FIGURES)
    for name in NAMES_OF_FIGURES:
        content = (shown / f"{name}.svg").read_text()
        root = ElementTree.fromstring(content)
        assert root.tag.endswith("svg")
        assert "date" not in content.lower()
        assert (shown / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert {"$a_1$ <b>", "_??", "through"} <= {each.text for each in root.iter("{http://www.w3.org/2000/svg}text")}


def test_figures_are_reproducible(shown, tmp_path):
    selection = select([shown.parent / "runs"])
    drawn = style.draw_all({"loss-tokens": lambda: figures.loss_figure(selection.runs)}, tmp_path)
    svg, _ = drawn["loss-tokens"]
    assert svg.read_bytes() == (shown / svg.name).read_bytes()


def test_figures_need_trained_steps(tmp_path):
    runs = select([make_run(tmp_path / "none", 0, ())]).runs
    assert [draw(runs) for draw in figures.FIGURES.values()] == [None] * len(NAMES_OF_FIGURES)
    with pytest.raises(InvalidFileError, match="has no loss to draw: no step was trained"):
        figures.draw_loss_curve(tmp_path / "none", tmp_path / "loss.png", "nothing")


def test_figures_of_long_runs_are_small_files(tmp_path):
    noise = np.random.default_rng(0).normal(size=10_000)
    lines = [step_line(step, loss=6 + noise[step - 1], grad_norm=2 + noise[step - 1] ** 2) for step in range(1, 10_001)]
    run = read_history(make_run(tmp_path / "run", lines, train__steps=10_000))
    for draw in (figures.loss_figure, figures.FIGURES["gradient-norm"]):
        with style.style_context("test"):
            style.write_figure(draw([run, run, run, run]), tmp_path / "long.svg")
        assert (tmp_path / "long.svg").stat().st_size < 300_000


def test_style_gives_each_run_its_own_look():
    looks = style.line_styles(60)
    assert len(set(looks)) == 60
    assert len({look.color for look in looks[:7]}) == 7
    assert style.printable_name("x" * 100).count("x") < 40


class Page(HTMLParser):
    """Collects what a page would fetch or run, and whether its tags close."""

    VOID = ("meta", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], set(), [], []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        self.links += [found[key] for key in ("src", "href", "xlink:href", "action") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        assert not any(name.startswith("on") for name in found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def seen(shown) -> Page:
    return Page((shown / "index.html").read_text())


def test_page_is_self_contained(seen, shown):
    content = (shown / "index.html").read_text()
    assert "http:" not in content
    assert "https:" not in content
    assert "default-src 'none'" in content
    assert not {"script", "img", "link", "iframe", "object", "b"} & seen.tags
    assert all(link.startswith("#") or (shown / link).is_file() for link in seen.links)
    assert len(seen.ids) == len(set(seen.ids))
    assert {link[1:] for link in seen.links if link[0] == "#"} <= set(seen.ids)
    for match in re.findall(r"url\(#(\w+)\)", content):
        assert match in seen.ids


def test_page_escapes_texts(seen):
    assert "<script>alert(1)</script>\n\nthe" in seen.text
    assert "$a_1$ <b>" in seen.text
    for said in ("stopped by SIGINT", "update left out", "taken back to step 2", "its numbers went wrong", "a cpu"):
        assert said in seen.text
    assert re.search(r"optim\.learning_rate\s*0\.002\s*0\.003\s*0\.003", seen.text)


def test_page_replaces_every_color_for_dark_mode(shown):
    for file in shown.glob("*.svg"):
        left = set(re.findall(r"#[0-9a-f]{6}\b", page.inline_svg(file.read_text(), file.stem)))
        assert left <= {style.DARK, "#8c8c8c"}


def test_page_keeps_names_that_look_like_colors():
    text = '#0072b2 id="a_1"</text></svg>'
    svg = f'<?xml?><svg width="1pt" viewBox="0 0 1 1" height="1pt"><text id="text_9" style="fill: #0072b2">{text}'
    assert page.inline_svg(svg, "x & y") == (
        f'<svg role="img" aria-label="x &amp; y" viewBox="0 0 1 1"><text style="fill: var(--blue)">{text}'
    )


def test_page_shows_invalid_unicode(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "draw_all", lambda figures, out: {})
    sample = {"step": 2, "prompt": "\ud800", "text": "\udfff\x00"}
    folder = make_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert "After “?”" in summaries.write_report(select([folder]), tmp_path / "out")[0].read_text()


def test_samples_are_shown_side_by_side(tmp_path):
    def texts(*steps):
        return [{"step": step, "prompt": "a", "text": f"at {step}"} for step in steps]

    many = read_history(make_run(tmp_path / "many", samples=texts(*range(10, 310, 10))))
    few = read_history(make_run(tmp_path / "few", samples=texts(10, 152, 300)))
    (found,) = summaries.samples_by_prompt([many, few])
    assert (len(found.rows), found.num_omitted) == (summaries.MAX_SAMPLES, 30 - summaries.MAX_SAMPLES)
    left, right = zip(*found.rows, strict=True)
    assert (left[0].step, left[-1].step) == (10, 300)
    assert [each.step for each in right if each] == [10, 300]
    (one,) = summaries.samples_by_prompt([read_history(make_run(tmp_path / "one", samples=texts(5)))])
    assert one.rows == [[summaries.Sample(5, "at 5")]]
    late = read_history(make_run(tmp_path / "late", samples=texts(1000, 2000, 3000)))
    short = read_history(make_run(tmp_path / "short", samples=texts(20, 40)))
    (ended,) = summaries.samples_by_prompt([late, short])
    assert [row[1] and row[1].step for row in ended.rows] == [40, None, None]


def test_timeline_lists_events_in_order(runs):
    twice, wrong, through = select([runs]).runs
    assert [event.label for event in summaries.timeline(twice)] == ["began", "stopped", "resumed", "finished"]
    assert [event.label for event in summaries.timeline(wrong)] == [
        "began",
        "taken back to step 2",
        "update left out",
        "diverged",
    ]
    first, second = summaries.environments(twice)
    assert first.metadata == {"name": "a cpu", "threads": "2"}
    assert second.metadata == {"threads": "4"}
    assert summaries.compare_settings([twice, through])["optim.learning_rate"] == ["0.002", "0.003"]
    assert summaries.compare_settings([twice, through])["optim.betas"] == ["0.9, 0.95"]
    assert summaries.format_setting(0.1 + 0.2) != summaries.format_setting(0.3)


def test_compare_writes_page_figures_and_json(runs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(style, "DPI", 30)
    assert cli.run(["compare", str(runs), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == ["$a_1$ <b>", "_日本", "through"]
    assert found["runs"][2]["validation_loss"] == pytest.approx(5.2)
    assert found["files"][0] == str(out / "index.html")
    assert len(found["files"]) == 15
    assert sorted(map(str, out.iterdir())) == sorted(found["files"])
    monkeypatch.setattr(style, "draw_all", lambda figures, out: {})
    assert cli.run(["compare", str(runs / "through"), str(runs / "_日本"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["through", "_日本"]
    assert str(out / "index.html") in lines[-1]


def test_inspect_shows_runs_as_a_table(runs, capsys):
    assert cli.run(["inspect", str(runs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["state"] for row in rows] == ["finished", "diverged", "finished"]
    assert cli.run(["inspect", str(runs / "through"), str(runs / "_日本")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "through", "_日本"]
    assert cli.run(["inspect", str(runs), "--train.steps", "5"]) == 2
    assert "settings such as --train.steps are for recipes" in capsys.readouterr().err
    assert cli.run(["inspect", "nano", "nonsense"]) == 2
    assert "one word too many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "compare needs RUN"),
        (["runs/throuh"], "there is no run runs/throuh. Did you mean runs/through?"),
        (["zzz"], "there is no run zzz. A run is a folder that smolforge train made."),
        (["file"], "file is a file; a run is a folder that smolforge train made"),
        (["empty"], "empty holds no run; smolforge train RECIPE --run empty/NAME makes one"),
        (["runs/through/checkpoints"], "runs/through/checkpoints is a part of the run"),
        (["runs", "--out", "file"], "--out file is a file; it should be a folder"),
        (["runs", "--out", "file/below"], "file could not be written: Not a directory"),
    ],
)
def test_compare_refuses_what_is_not_a_run(runs, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    (runs / "through" / "checkpoints").mkdir()
    assert cli.run(["compare", *words]) in (2, 4)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("comparison").exists()


def test_comparison_reads_a_real_run(text_file, tmp_path):
    folder = tmp_path / "run"
    settings = {"train.sample_every": 4, "data.sources": [str(text_file)]}
    (tmp_path / "nano.json").write_text(json.dumps(NANO))
    train(tmp_path / "nano.json", folder, **settings)
    train(tmp_path / "nano.json", folder, steps=12, **settings)
    selection = select([folder])
    (row,) = summaries.table_rows(selection)
    assert (row.state, row.step, row.steps, row.resumed) == ("finished", 12, 12, [8])
    assert 0 < row.seconds < 60
    figures.draw_loss_curve(folder, tmp_path / "loss.svg", "twelve steps")
    assert {"resumed at step 8", "twelve steps"} <= set(
        re.findall(r">([^<]+)</text>", (tmp_path / "loss.svg").read_text())
    )
    seen = Page(page.render_page(summaries.runs_report(selection), {}))
    for said in ("A new document", "resumed", "step 12", str(text_file)):
        assert said in seen.text
