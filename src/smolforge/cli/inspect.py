"""`smolforge inspect`."""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smolforge.cli.flags import parse
from smolforge.errors import SettingError


def inspect(
    what: str,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """What a model, recipe, corpus or run is, and what it will need.

    Parameters
    ----------
    what
        A model folder, preset or Hub id, recipe, prepared corpus, run folder, or the word machine. A recipe takes the
        same dotted flags as train.
    json_
        Print it as one JSON object.
    """
    overrides = parse(settings)
    facts = _facts(what, overrides)
    if json_:
        print(json.dumps(facts))
        return
    print("\n".join(_lines(facts)))


def _facts(what: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What is known of it, by the kind of thing it is."""
    from smolforge import presets
    from smolforge.checkpoint.hub import is_id
    from smolforge.checkpoint.resolve import read_config
    from smolforge.checkpoint.weights import INDEX, WEIGHTS
    from smolforge.recipe.read import find, read_recipe
    from smolforge.recipe.settle import settle
    from smolforge.runs import RECIPE

    path = Path(what)
    if overrides and (path.is_dir() or what in ("machine", *presets.names())):
        raise SettingError(f"settings are for recipes; {what} is none")
    if what == "machine":
        return _machine()
    if (path / "corpus.json").is_file():
        return _corpus(path)
    if (path / RECIPE).is_file():
        return _run(path)
    if path.is_dir() or path.name in (WEIGHTS, INDEX) or what in presets.names():
        return _model(read_config(what))
    try:
        recipe = find(what)
    except SettingError as error:
        if is_id(what) and not overrides:
            return _model(read_config(what))
        raise SettingError(f"{what!r} is no model, corpus or run, and {error}") from None
    return _recipe(settle(read_recipe(recipe, overrides), overrides.keys()))


def _model(config: Any) -> dict[str, Any]:
    from smolforge.sizes import flops_per_token, parameter_counts

    counts = parameter_counts(config)
    total = sum(counts.values())
    untied = 0 if config.tie_word_embeddings else counts["lm_head"]
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * 4
    return {
        "config": config.model_dump(),
        "parameters": {
            "total": total,
            "embedding": counts["embedding"],
            "non_embedding": total - counts["embedding"] - untied,
            "active": total,
            **{name: count for name, count in counts.items() if name != "embedding"},
        },
        "flops_per_token": flops_per_token(config, config.max_position_embeddings),
        "kv_bytes_per_token": kv_bytes,
        "memory_bytes": 4 * total,
    }


def _recipe(recipe: Any) -> dict[str, Any]:
    from smolforge.recipe.plan import plan

    expected = plan(recipe)
    return _model(recipe.model) | {
        "settings": recipe.model_dump(mode="json", exclude={"model"}),
        "tokens": expected.tokens,
        "flops_per_token": expected.flops_per_token,
        "memory_bytes": expected.memory_bytes,
        "disk_bytes": expected.disk_bytes,
        "seconds": expected.seconds,
        "warnings": expected.warnings(),
    }


def _corpus(path: Path) -> dict[str, Any]:
    from smolforge.data.corpus import SPLITS, TRAIN, Corpus

    corpus = Corpus.open(path)
    sizes = {split: corpus.size(split) for split in SPLITS}
    text_bytes = sum(size["bytes"] for size in sizes.values())
    tokens = sum(size["tokens"] for size in sizes.values())
    return {
        **sizes,
        "bytes_per_token": text_bytes / tokens,
        "fingerprint": corpus.fingerprint,
        "sources": corpus.facts["request"]["data"]["sources"],
        "beginning": corpus.tokenizer().decode(corpus.tokens(TRAIN)[:64].tolist()),
    }


def _run(path: Path) -> dict[str, Any]:
    from smolforge.checkpoint import state
    from smolforge.recipe.read import read_recipe
    from smolforge.runs import METRICS, RECIPE, read_records

    recipe = read_recipe(path / RECIPE)
    records = read_records(path / METRICS) if (path / METRICS).is_file() else []
    last = records[-1] if records else {"step": 0}
    measured = [record for record in records if "validation_loss" in record]
    return {
        "state": "finished" if last["step"] >= recipe.train.steps else "unfinished",
        "step": last["step"],
        "steps": recipe.train.steps,
        "loss": last.get("loss"),
        "validation_loss": measured[-1]["validation_loss"] if measured else None,
        "checkpoints": [folder.name for folder in state.all_of(path)],
        "parameters": _model(recipe.model)["parameters"],
    }


def _machine() -> dict[str, Any]:
    import torch

    from smolforge.device import describe, matrix_flops_per_second, memory_bytes, pick_device, pick_dtype
    from smolforge.runs import versions

    device = pick_device("auto")
    return {
        **describe(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        "memory_bytes": memory_bytes(device),
        "float32_flops_per_second": matrix_flops_per_second(device, torch.float32),
        "bfloat16_flops_per_second": matrix_flops_per_second(device, torch.bfloat16),
        "packages": versions(),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """One fact a line, the values below each other."""
    rows = _flat(facts)
    width = max(len(key) for key, _ in rows) + 2
    return [f"{key:<{width}}{_said(key, value)}" for key, value in rows]


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in facts.items():
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
        from smolforge.cli.terminal import duration

        return f"about {duration(value)}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
