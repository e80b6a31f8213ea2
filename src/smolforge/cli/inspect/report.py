"""What `smolforge inspect` reports of models, recipes, runs and the machine, of the last two also what makes them slow.

A report is what --json prints. For people it is one line per value, with views for what is more than a value.
"""

import os
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smolforge.checkpoint import training_state
from smolforge.checkpoint.gguf import llama
from smolforge.checkpoint.hub import is_hub_id
from smolforge.checkpoint.huggingface import INDEX, WEIGHTS
from smolforge.checkpoint.loading import read_config, read_scheme, tokenizer_of, weight_bytes
from smolforge.cli.inspect.corpus import corpus_report, length_lines, mask_lines, overlap_lines
from smolforge.cli.inspect.mixture import (
    mixture_lines,
    recipe_mixture_report,
    recipe_warnings,
    run_mixture_report,
)
from smolforge.cli.table import bar, table_lines
from smolforge.comparison.diagnosis import diagnose
from smolforge.comparison.history import read_history
from smolforge.comparison.step_times import time_shares
from smolforge.config import Recipe, presets
from smolforge.config.load import find_recipe, import_recipe_classes, read_recipe
from smolforge.config.model import ModelConfig
from smolforge.device import describe_device, describe_speed, fastest_dtype, pick_device
from smolforge.device.environment import describe_environment, find_slowdowns
from smolforge.errors import ConfigError
from smolforge.formatting import flatten, format_bytes, format_duration, format_setting
from smolforge.models import stats
from smolforge.runs.estimate import estimate_run
from smolforge.runs.resolve import resolve_recipe
from smolforge.training.environment import versions
from smolforge.training.run_folder import RECIPE

MAX_WIDTH, MAX_BAR_WIDTH = 100, 40
PHASE_LABELS = {"data": "waiting for data", "other": "rest of a step", "between": "between steps"}


def build_report(target: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the report on a model, recipe, corpus, run or machine, by its kind."""
    path = Path(target)
    if overrides and (path.is_dir() or target in ("machine", *presets.names())):
        raise ConfigError(f"settings are for recipes; {target} is none")
    if target == "machine":
        return _machine_report()
    if (path / "corpus.json").is_file():
        return corpus_report(path)
    if (path / RECIPE).is_file():
        return _run_report(path)
    if path.is_dir() or path.name in (WEIGHTS, INDEX) or llama.is_gguf_file(path) or target in presets.names():
        return model_report(read_config(target)) | quantization_report(target) | tokenizer_report(path)
    try:
        recipe = find_recipe(target)
    except ConfigError as error:
        if is_hub_id(target) and not overrides:
            return model_report(read_config(target))
        raise ConfigError(f"{target!r} is no model, corpus or run, and {error}") from None
    return _recipe_report(
        resolve_recipe(import_recipe_classes(read_recipe(recipe, overrides), recipe), overrides.keys())
    )


def model_report(config: ModelConfig) -> dict[str, Any]:
    """Return the parameters of a model, and what it costs in FLOPs and memory."""
    counts = stats.parameter_counts(config)
    total = sum(counts.values())
    return {
        "config": config.model_dump(include={*config.family_fields()}, exclude_none=True),
        "table": [row._asdict() | {"parameters": row.parameters} for row in stats.parameter_table(config)],
        "parameters": {
            "total": total,
            "embedding": counts["embedding"],
            "non_embedding": total - counts["embedding"] - counts.get("lm_head", 0),
            "active": stats.active_parameters(config),
            **{name: count for name, count in counts.items() if name != "embedding"},
        },
        "flops_per_token": stats.flops_per_token(config, config.max_position_embeddings),
        "kv_bytes_per_token": stats.kv_bytes_per_token(config),
        "memory_bytes": 4 * total,
    }


def quantization_report(name_or_path: str) -> dict[str, Any]:
    """Return the quantization of a folder's weights and their bytes in memory; empty where they are not quantized."""
    scheme = read_scheme(name_or_path)
    if scheme is None:
        return {}
    sizes = weight_bytes(read_config(name_or_path), scheme)
    return {"quantization": dict(scheme.__dict__), "memory_bytes": sizes}


def tokenizer_report(folder: Path) -> dict[str, Any]:
    """Return the facts of a model's tokenizer, with the bytes it silently drops."""
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


def _recipe_report(recipe: Recipe) -> dict[str, Any]:
    expected, mixture = estimate_run(recipe), recipe_mixture_report(recipe)
    warnings = expected.warnings()
    if recipe.train.epochs is not None:
        warnings.append(f"how many steps {recipe.train.epochs:g} epochs are is known when train has counted the text")
    shape = model_report(recipe.model)
    del shape["table"]
    return {
        **shape,
        **mixture,
        "settings": recipe.model_dump(mode="json", exclude={"model"}),
        "tokens": expected.tokens,
        "flops_per_token": expected.flops_per_token,
        "memory_bytes": expected.memory_bytes,
        "disk_bytes": expected.disk_bytes,
        "seconds": expected.seconds,
        "warnings": warnings + recipe_warnings(recipe, mixture),
    }


def _run_report(path: Path) -> dict[str, Any]:
    run = read_history(path)
    task_keys = sorted({key for record in run.metrics for key in record if key.startswith("task_")})
    start = (run.starts or [{}])[-1]
    dtype = _fastest_dtype(run.recipe, start)
    return {
        "state": run.state,
        "why": run.reason,
        "step": run.step,
        "steps": run.steps,
        "loss": run.newest("loss"),
        "validation_loss": run.newest("validation_loss"),
        **({"tasks": {key.removeprefix("task_"): run.newest(key) for key in task_keys}} if task_keys else {}),
        "checkpoints": [folder.name for folder in training_state.list_checkpoints(path)],
        "parameters": model_report(run.recipe.model)["parameters"],
        **run_mixture_report(run),
        "time": time_shares(run.metrics, start),
        "slow": diagnose(run.metrics, run.recipe, start, fastest_dtype=dtype) if run.metrics else [],
    }


def _fastest_dtype(recipe: Recipe, start: Mapping[str, Any]) -> str | None:
    """Return this machine's fastest dtype, if it matters and the run was on a machine like it."""
    if recipe.train.dtype != "float32" or not start:
        return None
    device = pick_device("auto")
    here = describe_device(device)
    return fastest_dtype(device) if all(here[key] == start.get(key) for key in ("device", "name", "vectors")) else None


def _machine_report() -> dict[str, Any]:
    device, environment = pick_device("auto"), describe_environment(os.environ)
    return {
        **describe_device(device),
        **describe_speed(device),
        "packages": versions(),
        **environment,
        "slow": find_slowdowns(environment, torch.get_num_threads(), device.type),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return the parameter table, if any, then one value per line, then the other views of a report."""
    views_below = {
        "mixture": mixture_lines,
        "histogram": length_lines,
        "warnings": _warning_lines,
        "time": _time_lines,
        "slow": _slowdown_lines,
        "overlap": overlap_lines,
        "picture": mask_lines,
    }
    values = {key: value for key, value in report.items() if key not in ("table", "windows", *views_below)}
    rows = [(name, _format_value(name, value)) for name, value in flatten(values).items()]
    above = _parameter_lines(report) if "table" in report else []
    below = [line for key, view in views_below.items() if report.get(key) for line in view(report)]
    return [*above, *table_lines(rows, align="<"), *below]


def _parameter_lines(report: dict[str, Any]) -> list[str]:
    """Return one line per tensor, its size over all layers and its share, and below what the output head counts for."""
    total = report["parameters"]["total"]
    rows = [
        (name, component, " x ".join(f"{dim:,}" for dim in shape), times, size, f"{size / total:.2%}")
        for name, component, shape, times, size in map(dict.values, report["table"])
    ]
    head = ("tensor", "component", "shape", "times", "parameters", "share")
    return [*table_lines([*rows, ("total", "", "", "", total, "")], head, "<<>"), *_head_lines(report["config"], total)]


def _head_lines(config: dict[str, Any], total: int) -> list[str]:
    """Return what a tied head, or one of its own, changes in the total: models are quoted with both."""
    vocab_size, hidden_size, tied = (config[key] for key in ("vocab_size", "hidden_size", "tie_word_embeddings"))
    matrix = vocab_size * hidden_size
    size, other = f"{vocab_size:,} x {hidden_size:,} = {matrix:,}", total + matrix if tied else total - matrix
    sizes = f"it would be {other:,}: {other / 1e6:.1f}M instead of {total / 1e6:.1f}M."
    if not tied:
        return [f"The output head is a matrix of its own, {size} numbers.", f"Tied to the embedding {sizes}", ""]
    tied_line = f"The output head is the embedding (tie_word_embeddings), so its {size} numbers are counted once."
    return [tied_line, f"Counted twice, or untied, {sizes}", ""]


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return format_setting(value)
    if name.endswith("bytes") and value >= 2**20:
        return f"{value:,} ({format_bytes(value)})"
    if name == "seconds":
        return f"about {format_duration(value)}"
    return f"{value:,}" if isinstance(value, int) else f"{int(value):,}" if value.is_integer() else f"{value:.4g}"


def _warning_lines(report: dict[str, Any]) -> list[str]:
    return ["", *(f"warning: {warning}" for warning in report["warnings"])]


def _time_lines(report: dict[str, Any]) -> list[str]:
    """Return each phase's share of the time, as a bar too."""
    width = min(MAX_BAR_WIDTH, shutil.get_terminal_size().columns - 27)
    rows = [
        (f"  {PHASE_LABELS.get(phase, phase)}", f"{share:.0%}", bar(share, width))
        for phase, share in report["time"].items()
    ]
    return ["", "where the time goes", *table_lines(rows, align="<><")]


def _slowdown_lines(report: dict[str, Any]) -> list[str]:
    """Return what makes it slow, and how to fix it, as a list with bullets."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    bullets = textwrap.TextWrapper(width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return ["", *(line for finding in report["slow"] for line in bullets.wrap(finding))]
