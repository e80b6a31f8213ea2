"""`smolforge inspect`.

What `smolforge inspect` knows of speed: where a run's time goes, why it is slow, what hurts on this machine.
"""

import json
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smolforge.cli.compare import inspect_runs, runs_named
from smolforge.cli.flags import parse
from smolforge.cli.inspect import mixture_report
from smolforge.cli.live_view import bar
from smolforge.errors import SettingError

WIDEST, BAR = 100, 40
PARTS = {"data": "waiting for data", "other": "rest of a step", "between": "between steps"}


def of_run(run: Any) -> dict[str, Any]:
    """`time`, the share of each part, and `slow`, what to do about it, of a run's history."""
    from smolforge.comparison.diagnosis import diagnose
    from smolforge.comparison.step_times import time_shares

    start = (run.starts or [{}])[-1]
    said = diagnose(run.metrics, run.recipe, start, _fastest_dtype(run.recipe, start)) if run.metrics else []
    return {"time": time_shares(run.metrics, start), "slow": said}


def _fastest_dtype(recipe: Any, start: Mapping[str, Any]) -> str | None:
    """What this machine multiplies fastest in, if it matters and the run was on one like it."""
    from smolforge.device import describe, fastest_dtype, pick_device

    if recipe.train.dtype != "float32" or not start:
        return None
    device = pick_device("auto")
    here = describe(device)
    return fastest_dtype(device) if all(here[key] == start.get(key) for key in ("device", "name", "vectors")) else None


def of_machine(device: str, threads: int) -> dict[str, Any]:
    """Cores, load, what is set, and `slow`, what of it hurts."""
    from smolforge.device.environment import hurting, surroundings

    seen = surroundings(os.environ)
    return {**seen, "slow": hurting(seen, threads, device)}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """Where the time goes, as bars, and each sentence."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    time, said = facts.get("time", {}), facts.get("slow", [])
    bars = [
        f"  {PARTS.get(part, part):<18}{share:>5.0%}  {bar(share, min(BAR, width - 27))}"
        for part, share in time.items()
    ]
    told = [
        line
        for each in said
        for line in textwrap.wrap(each, width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    ]
    return [*(["", "where the time goes"] if bars else []), *bars, *([""] if told else []), *told]


APART = ("table", "time", "slow", "overlap", "mixture", "histogram", "windows", "warnings")
"""Facts that are more than a line."""


def inspect(
    what: str,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    tasks: str | None = None,
    figure: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """What a model, recipe, corpus or run is, and what it will need.

        smolforge inspect runs/mine

    Parameters
    ----------
    what
        A model folder, .gguf, preset or Hub id, recipe, prepared corpus, run folder, or the word machine. A recipe
        takes the same dotted flags as train. Several runs, or a folder of runs, are shown as a table.
    tasks
        Of a corpus: say how many items of these tasks, named as for evaluate, share 13 words in a row with it.
    figure
        Of a corpus: draw how long its documents are into this .png, .svg or .pdf file.
    json_
        Print it as one JSON object.
    """
    for flag, value in (("tasks", tasks), ("figure", figure)):
        if value is not None and not (Path(what) / "corpus.json").is_file():
            raise SettingError(f"--{flag} is for a prepared corpus; {what} is none")
    if runs := runs_named(what, settings):
        inspect_runs(runs, json_)
        return
    overrides = parse(settings)
    facts = _facts(what, overrides)
    if tasks is not None:
        from smolforge.cli.inspect import corpus_report

        facts["overlap"] = corpus_report.of_corpus(Path(what), tasks)
    if figure is not None:
        from smolforge.cli.inspect import corpus_report
        from smolforge.data.corpus import Corpus

        corpus_report.draw(Corpus.open(Path(what)), figure)
    if json_:
        print(json.dumps(facts))
        return
    shown = facts.pop("picture", None)
    print("\n".join(_lines(facts)))
    if shown:
        from smolforge.cli.inspect.corpus_report import show

        print()
        show(shown)


def _facts(what: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What is known of it, by the kind of thing it is."""
    from smolforge.checkpoint.gguf import llama
    from smolforge.checkpoint.hub import is_id
    from smolforge.checkpoint.huggingface import INDEX, WEIGHTS
    from smolforge.checkpoint.loading import read_config
    from smolforge.config import presets
    from smolforge.config.load import admitted, find, read_recipe
    from smolforge.runs.resolve import settle
    from smolforge.training.run_folder import RECIPE

    path = Path(what)
    if overrides and (path.is_dir() or what in ("machine", *presets.names())):
        raise SettingError(f"settings are for recipes; {what} is none")
    if what == "machine":
        return _machine()
    if (path / "corpus.json").is_file():
        return _corpus(path)
    if (path / RECIPE).is_file():
        return _run(path)
    if path.is_dir() or path.name in (WEIGHTS, INDEX) or llama.is_file(path) or what in presets.names():
        return _model(read_config(what)) | _integers(what) | _tokenizer(path)
    try:
        recipe = find(what)
    except SettingError as error:
        if is_id(what) and not overrides:
            return _model(read_config(what))
        raise SettingError(f"{what!r} is no model, corpus or run, and {error}") from None
    return _recipe(settle(admitted(read_recipe(recipe, overrides), recipe), overrides.keys()))


def _model(config: Any) -> dict[str, Any]:
    from smolforge.models.stats import active_parameters, flops_per_token, kv_bytes_per_token, parameter_counts, table

    counts = parameter_counts(config)
    total = sum(counts.values())
    untied = counts.get("lm_head", 0)
    return {
        "config": {name: config.__dict__[name] for name in config.own_fields()},
        "table": [row._asdict() | {"parameters": row.parameters} for row in table(config)],
        "parameters": {
            "total": total,
            "embedding": counts["embedding"],
            "non_embedding": total - counts["embedding"] - untied,
            "active": active_parameters(config),
            **{name: count for name, count in counts.items() if name != "embedding"},
        },
        "flops_per_token": flops_per_token(config, config.max_position_embeddings),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "memory_bytes": 4 * total,
    }


def _integers(what: str) -> dict[str, Any]:
    """How a folder's weights are kept, and what they take in memory, where they are integers."""
    from smolforge.checkpoint import loading

    scheme = loading.read_scheme(what)
    if scheme is None:
        return {}
    sizes = loading.weight_bytes(loading.read_config(what), scheme)
    return {"quantization": dict(scheme.__dict__), "memory_bytes": sizes}


def _tokenizer(folder: Path) -> dict[str, Any]:
    """What there is to know of a model's tokenizer, the bytes it silently drops above all."""
    from smolforge.checkpoint.loading import tokenizer_of

    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        return {}
    missing = tokenizer.missing_bytes.hex(" ")
    return {
        "tokenizer": {
            "ids": len(tokenizer),
            "special": list(tokenizer.special.known),
            "eos": tokenizer.eos_token,
            "bytes_without_a_symbol": f"{missing} (they vanish from a text)" if missing else None,
            "chat_template": tokenizer.template is not None,
        }
    }


def _recipe(recipe: Any) -> dict[str, Any]:
    from smolforge.runs.estimate import plan

    expected = plan(recipe)
    warnings = expected.warnings()
    if recipe.train.epochs is not None:
        warnings.append(f"how many steps {recipe.train.epochs:g} epochs are is known when train has counted the text")
    shape = {key: value for key, value in _model(recipe.model).items() if key != "table"}
    mixed = mixture_report.of_recipe(recipe)
    warnings += mixture_report.warnings(recipe, mixed)
    return (
        shape
        | mixed
        | {
            "settings": recipe.model_dump(mode="json", exclude={"model"}),
            "tokens": expected.tokens,
            "flops_per_token": expected.flops_per_token,
            "memory_bytes": expected.memory_bytes,
            "disk_bytes": expected.disk_bytes,
            "seconds": expected.seconds,
            "warnings": warnings,
        }
    )


def _corpus(path: Path) -> dict[str, Any]:
    from smolforge.cli.inspect import corpus_report
    from smolforge.data.corpus import SPLITS, Corpus

    corpus = Corpus.open(path)
    sizes = {split: corpus.size(split) for split in SPLITS}
    text_bytes = sum(size["bytes"] for size in sizes.values())
    tokens = sum(size["tokens"] for size in sizes.values())
    return {
        **sizes,
        "bytes_per_token": text_bytes / tokens,
        "fingerprint": corpus.fingerprint,
        "lost_bytes": corpus.facts.get("lost_bytes", {}) or None,
        "sources": corpus.facts["request"]["data"]["sources"],
        **(corpus_report.mask_facts(corpus) if corpus.format != "text" else _of_texts(corpus)),
    }


def _of_texts(corpus: Any) -> dict[str, Any]:
    from smolforge.cli.inspect import corpus_report

    dropped = {why: count for why, count in corpus.facts.get("dropped", {}).items() if count}
    return {"left_out": dropped or None, **corpus_report.length_facts(corpus)}


def _run(path: Path) -> dict[str, Any]:
    from smolforge.checkpoint import training_state
    from smolforge.comparison import history

    run = history.read(path)
    scored = {key.removeprefix("task_") for record in run.metrics for key in record if key.startswith("task_")}
    return {
        "state": run.state,
        "why": run.why,
        "step": run.step,
        "steps": run.steps,
        "loss": run.newest("loss"),
        "validation_loss": run.newest("validation_loss"),
        **({"tasks": {key: run.newest(f"task_{key}") for key in sorted(scored)}} if scored else {}),
        "checkpoints": [folder.name for folder in training_state.all_of(path)],
        "parameters": _model(run.recipe.model)["parameters"],
        **mixture_report.of_run(run),
        **of_run(run),
    }


def _machine() -> dict[str, Any]:
    import torch

    from smolforge.device import describe, fastest_dtype, matrix_flops_per_second, memory_bytes, pick_device
    from smolforge.training.environment import versions

    device = pick_device("auto")
    return {
        **describe(device),
        "dtype": fastest_dtype(device),
        "memory_bytes": memory_bytes(device),
        "float32_flops_per_second": matrix_flops_per_second(device, torch.float32),
        "bfloat16_flops_per_second": matrix_flops_per_second(device, torch.bfloat16),
        "packages": versions(),
        **of_machine(device.type, torch.get_num_threads()),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """The parameter table, where there is one, and then one fact a line, the values below each other."""
    table = facts.get("table", [])
    rows = _flat({key: value for key, value in facts.items() if key not in APART})
    width = max(len(key) for key, _ in rows) + 2
    told = [*_table(table), *_about_the_head(facts), ""] if table else []
    facts_told = [f"{key:<{width}}{_said(key, value)}" for key, value in rows]
    facts_told += [*mixture_report.lines(facts.get("mixture", {})), *_histogram(facts)]
    facts_told += ["", *(f"warning: {each}" for each in facts["warnings"])] if facts.get("warnings") else []
    return [*told, *facts_told, *lines(facts), *_overlap(facts)]


def _overlap(facts: dict[str, Any]) -> Sequence[str]:
    if "overlap" not in facts:
        return []
    from smolforge.cli.inspect import corpus_report

    return corpus_report.overlap_lines(facts["overlap"])


def _histogram(facts: dict[str, Any]) -> list[str]:
    if "histogram" not in facts:
        return []
    from smolforge.cli.inspect import corpus_report

    return corpus_report.length_lines(facts)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Every tensor of the model, what it holds in all layers, and its share."""
    total = sum(row["parameters"] for row in rows)
    shapes = [" x ".join(f"{side:,}" for side in row["shape"]) for row in rows]
    wide = max(len(row["name"]) for row in rows)
    lines = [f"{'tensor':<{wide}}  {'component':<10}{'shape':>18}{'times':>7}{'parameters':>15}{'share':>9}"]
    lines += [
        f"{row['name']:<{wide}}  {row['component']:<10}{shape:>18}{row['times']:>7}{row['parameters']:>15,}"
        f"{row['parameters'] / total:>9.2%}"
        for row, shape in zip(rows, shapes, strict=True)
    ]
    return [*lines, f"{'total':<{wide}}{total:>52,}"]


def _about_the_head(facts: dict[str, Any]) -> list[str]:
    """Why the same model is quoted with two sizes."""
    config, parameters = facts["config"], facts["parameters"]
    matrix, total = config["vocab_size"] * config["hidden_size"], parameters["total"]
    size = f"{config['vocab_size']:,} x {config['hidden_size']:,} = {matrix:,}"
    if config["tie_word_embeddings"]:
        return [
            f"The output head is the embedding (tie_word_embeddings), so its {size} numbers are counted once.",
            f"Counted twice, or untied, it would be {total + matrix:,}: {(total + matrix) / 1e6:.1f}M instead of "
            f"{total / 1e6:.1f}M.",
        ]
    return [
        f"The output head is a matrix of its own, {size} numbers.",
        f"Tied to the embedding it would be {total - matrix:,}: {(total - matrix) / 1e6:.1f}M instead of "
        f"{total / 1e6:.1f}M.",
    ]


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): each for number, each in enumerate(value, 1)}
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _said(key: str, value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if key.endswith("bytes") and value >= 1 << 20:
        return f"{value:,} ({value / 2**20:,.0f} MiB)"
    if key == "seconds":
        from smolforge.cli.run_display import duration

        return f"about {duration(value)}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
