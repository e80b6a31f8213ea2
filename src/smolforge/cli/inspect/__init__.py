"""`smolforge inspect`: what a model, recipe, corpus, run or machine is, and what it needs.

Of a run and of the machine it also reports speed: where the time goes, what slows it down, and how to fix it.
"""

import json
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smolforge.cli.compare import inspect_runs, run_folders_named
from smolforge.cli.flags import parse_overrides
from smolforge.cli.inspect import mixture_report
from smolforge.cli.live_view import bar
from smolforge.errors import ConfigError

MAX_WIDTH, MAX_BAR_WIDTH = 100, 40
PHASE_LABELS = {"data": "waiting for data", "other": "rest of a step", "between": "between steps"}
MULTILINE_KEYS = ("table", "time", "slow", "overlap", "mixture", "histogram", "windows", "warnings")
"""Keys whose values are more than a line."""


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
            raise ConfigError(f"--{flag} is for a prepared corpus; {what} is none")
    if runs := run_folders_named(what, settings):
        inspect_runs(runs, json_)
        return
    overrides = parse_overrides(settings)
    report = _build_report(what, overrides)
    if tasks is not None:
        from smolforge.cli.inspect import corpus_report

        report["overlap"] = corpus_report.task_overlap(Path(what), tasks)
    if figure is not None:
        from smolforge.cli.inspect import corpus_report
        from smolforge.data.corpus import Corpus

        corpus_report.draw_histogram(Corpus.open(Path(what)), figure)
    if json_:
        print(json.dumps(report))
        return
    example = report.pop("picture", None)
    print("\n".join(_report_lines(report)))
    if example:
        from smolforge.cli.inspect.corpus_report import print_mask_example

        print()
        print_mask_example(example)


def _build_report(target: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the report on a model, recipe, corpus, run or machine, by its kind."""
    from smolforge.checkpoint.gguf import llama
    from smolforge.checkpoint.hub import is_hub_id
    from smolforge.checkpoint.huggingface import INDEX, WEIGHTS
    from smolforge.checkpoint.loading import read_config
    from smolforge.config import presets
    from smolforge.config.load import find_recipe, import_recipe_classes, read_recipe
    from smolforge.runs.resolve import resolve_recipe
    from smolforge.training.run_folder import RECIPE

    path = Path(target)
    if overrides and (path.is_dir() or target in ("machine", *presets.names())):
        raise ConfigError(f"settings are for recipes; {target} is none")
    if target == "machine":
        return _machine_report()
    if (path / "corpus.json").is_file():
        return _corpus_report(path)
    if (path / RECIPE).is_file():
        return _run_report(path)
    if path.is_dir() or path.name in (WEIGHTS, INDEX) or llama.is_gguf_file(path) or target in presets.names():
        return _model_report(read_config(target)) | _quantization_report(target) | _tokenizer_report(path)
    try:
        recipe = find_recipe(target)
    except ConfigError as error:
        if is_hub_id(target) and not overrides:
            return _model_report(read_config(target))
        raise ConfigError(f"{target!r} is no model, corpus or run, and {error}") from None
    return _recipe_report(
        resolve_recipe(import_recipe_classes(read_recipe(recipe, overrides), recipe), overrides.keys())
    )


def _model_report(config: Any) -> dict[str, Any]:
    from smolforge.models.stats import (
        active_parameters,
        flops_per_token,
        kv_bytes_per_token,
        parameter_counts,
        parameter_table,
    )

    counts = parameter_counts(config)
    total = sum(counts.values())
    untied = counts.get("lm_head", 0)
    return {
        "config": {name: config.__dict__[name] for name in config.family_fields()},
        "table": [row._asdict() | {"parameters": row.parameters} for row in parameter_table(config)],
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


def _quantization_report(name_or_path: str) -> dict[str, Any]:
    """Return the quantization of a folder's weights and their bytes in memory; empty where they are not quantized."""
    from smolforge.checkpoint import loading

    scheme = loading.read_scheme(name_or_path)
    if scheme is None:
        return {}
    sizes = loading.weight_bytes(loading.read_config(name_or_path), scheme)
    return {"quantization": dict(scheme.__dict__), "memory_bytes": sizes}


def _tokenizer_report(folder: Path) -> dict[str, Any]:
    """Return the facts of a model's tokenizer, with the bytes it silently drops."""
    from smolforge.checkpoint.loading import tokenizer_of

    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        return {}
    missing = tokenizer.missing_bytes.hex(" ")
    return {
        "tokenizer": {
            "ids": len(tokenizer),
            "special": list(tokenizer.special.by_text),
            "eos": tokenizer.eos_token,
            "bytes_without_a_symbol": f"{missing} (they vanish from a text)" if missing else None,
            "chat_template": tokenizer.template is not None,
        }
    }


def _recipe_report(recipe: Any) -> dict[str, Any]:
    from smolforge.runs.estimate import estimate_run

    expected = estimate_run(recipe)
    warnings = expected.warnings()
    if recipe.train.epochs is not None:
        warnings.append(f"how many steps {recipe.train.epochs:g} epochs are is known when train has counted the text")
    shape = {key: value for key, value in _model_report(recipe.model).items() if key != "table"}
    mixed = mixture_report.recipe_mixture_report(recipe)
    warnings += mixture_report.recipe_warnings(recipe, mixed)
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


def _corpus_report(path: Path) -> dict[str, Any]:
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
        "lost_bytes": corpus.metadata.get("lost_bytes", {}) or None,
        "sources": corpus.metadata["request"]["data"]["sources"],
        **(corpus_report.mask_report(corpus) if corpus.format != "text" else _text_corpus_report(corpus)),
    }


def _text_corpus_report(corpus: Any) -> dict[str, Any]:
    from smolforge.cli.inspect import corpus_report

    dropped = {reason: count for reason, count in corpus.metadata.get("dropped", {}).items() if count}
    return {"left_out": dropped or None, **corpus_report.length_report(corpus)}


def _run_report(path: Path) -> dict[str, Any]:
    from smolforge.checkpoint import training_state
    from smolforge.comparison import history

    run = history.read_history(path)
    task_keys = {key.removeprefix("task_") for record in run.metrics for key in record if key.startswith("task_")}
    return {
        "state": run.state,
        "why": run.reason,
        "step": run.step,
        "steps": run.steps,
        "loss": run.newest("loss"),
        "validation_loss": run.newest("validation_loss"),
        **({"tasks": {key: run.newest(f"task_{key}") for key in sorted(task_keys)}} if task_keys else {}),
        "checkpoints": [folder.name for folder in training_state.list_checkpoints(path)],
        "parameters": _model_report(run.recipe.model)["parameters"],
        **mixture_report.run_mixture_report(run),
        **run_speed_report(run),
    }


def run_speed_report(run: Any) -> dict[str, Any]:
    """Return `time`, the fraction of each phase, and `slow`, what to fix, from a run's history."""
    from smolforge.comparison.diagnosis import diagnose
    from smolforge.comparison.step_times import time_shares

    start = (run.starts or [{}])[-1]
    findings = (
        diagnose(run.metrics, run.recipe, start, fastest_dtype=_fastest_dtype(run.recipe, start)) if run.metrics else []
    )
    return {"time": time_shares(run.metrics, start), "slow": findings}


def _fastest_dtype(recipe: Any, start: Mapping[str, Any]) -> str | None:
    """Return this machine's fastest dtype, if it matters and the run was on a machine like it."""
    from smolforge.device import describe_device, fastest_dtype, pick_device

    if recipe.train.dtype != "float32" or not start:
        return None
    device = pick_device("auto")
    here = describe_device(device)
    return fastest_dtype(device) if all(here[key] == start.get(key) for key in ("device", "name", "vectors")) else None


def _machine_report() -> dict[str, Any]:
    import torch

    from smolforge.device import describe_device, fastest_dtype, matmul_flops_per_second, memory_bytes, pick_device
    from smolforge.training.environment import versions

    device = pick_device("auto")
    return {
        **describe_device(device),
        "dtype": fastest_dtype(device),
        "memory_bytes": memory_bytes(device),
        "float32_flops_per_second": matmul_flops_per_second(device, torch.float32),
        "bfloat16_flops_per_second": matmul_flops_per_second(device, torch.bfloat16),
        "packages": versions(),
        **machine_speed_report(device.type, torch.get_num_threads()),
    }


def machine_speed_report(device: str, threads: int) -> dict[str, Any]:
    """Return cores, load, settings, and `slow`, what of it makes training slow."""
    from smolforge.device.environment import describe_environment, find_slowdowns

    environment = describe_environment(os.environ)
    return {**environment, "slow": find_slowdowns(environment, threads, device)}


def _report_lines(report: dict[str, Any]) -> list[str]:
    """Return the parameter table, if any, and then one value per line, aligned."""
    table = report.get("table", [])
    rows = _flatten({key: value for key, value in report.items() if key not in MULTILINE_KEYS})
    width = max(len(key) for key, _ in rows) + 2
    table_lines = [*_parameter_table_lines(table), *_lm_head_lines(report), ""] if table else []
    value_lines = [f"{key:<{width}}{_format_value(key, value)}" for key, value in rows]
    value_lines += [*mixture_report.mixture_lines(report.get("mixture", {})), *_histogram_lines(report)]
    value_lines += ["", *(f"warning: {warning}" for warning in report["warnings"])] if report.get("warnings") else []
    return [*table_lines, *value_lines, *speed_lines(report), *_overlap_lines(report)]


def _flatten(report: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): item for number, item in enumerate(value, 1)}
        rows += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _format_value(key: str, value: Any) -> str:
    """Format a value for the user."""
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


def _parameter_table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per tensor: its size over all layers, and its fraction of the total."""
    total = sum(row["parameters"] for row in rows)
    shapes = [" x ".join(f"{dim:,}" for dim in row["shape"]) for row in rows]
    name_width = max(len(row["name"]) for row in rows)
    lines = [f"{'tensor':<{name_width}}  {'component':<10}{'shape':>18}{'times':>7}{'parameters':>15}{'share':>9}"]
    lines += [
        f"{row['name']:<{name_width}}  {row['component']:<10}{shape:>18}{row['times']:>7}{row['parameters']:>15,}"
        f"{row['parameters'] / total:>9.2%}"
        for row, shape in zip(rows, shapes, strict=True)
    ]
    return [*lines, f"{'total':<{name_width}}{total:>52,}"]


def _lm_head_lines(report: dict[str, Any]) -> list[str]:
    """Explain why the same model is quoted with two sizes."""
    config, parameters = report["config"], report["parameters"]
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


def speed_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the time per phase as bars, and each finding."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    time, findings = report.get("time", {}), report.get("slow", [])
    bars = [
        f"  {PHASE_LABELS.get(phase, phase):<18}{share:>5.0%}  {bar(share, min(MAX_BAR_WIDTH, width - 27))}"
        for phase, share in time.items()
    ]
    finding_lines = [
        line
        for finding in findings
        for line in textwrap.wrap(finding, width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    ]
    return [*(["", "where the time goes"] if bars else []), *bars, *([""] if finding_lines else []), *finding_lines]


def _histogram_lines(report: dict[str, Any]) -> list[str]:
    if "histogram" not in report:
        return []
    from smolforge.cli.inspect import corpus_report

    return corpus_report.length_lines(report)


def _overlap_lines(report: dict[str, Any]) -> Sequence[str]:
    if "overlap" not in report:
        return []
    from smolforge.cli.inspect import corpus_report

    return corpus_report.overlap_lines(report["overlap"])
