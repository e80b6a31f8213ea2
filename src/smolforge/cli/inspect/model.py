"""What `smolforge inspect MODEL` reports: its shape, parameters, quantization and tokenizer."""

from pathlib import Path
from typing import Any

from smolforge.checkpoint import loading
from smolforge.cli.table import table_lines
from smolforge.config.model import ModelConfig
from smolforge.models import stats


def model_report(config: ModelConfig) -> dict[str, Any]:
    """Return the parameters of a model, and what it costs in FLOPs and memory."""
    counts = stats.parameter_counts(config)
    total = sum(counts.values())
    return {
        "config": {name: config.__dict__[name] for name in config.family_fields()},
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
    scheme = loading.read_scheme(name_or_path)
    if scheme is None:
        return {}
    sizes = loading.weight_bytes(loading.read_config(name_or_path), scheme)
    return {"quantization": dict(scheme.__dict__), "memory_bytes": sizes}


def tokenizer_report(folder: Path) -> dict[str, Any]:
    """Return the facts of a model's tokenizer, with the bytes it silently drops."""
    tokenizer = loading.tokenizer_of(folder)
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


def parameter_lines(report: dict[str, Any]) -> list[str]:
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
