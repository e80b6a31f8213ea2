"""A study's tables, as both reports have them: rows of words, the first column of most the variant."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from smolforge.comparison.statistics import Difference
from smolforge.comparison.study.record import Findings, Mean, Variant
from smolforge.comparison.told import written

NOTHING = "-"
TIMES = ("tokens_per_second", "seconds")


class Table(NamedTuple):
    """A heading, and rows of which the first column is words."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(found: Findings) -> list[Table]:
    """What both reports have."""
    several = [results(found), *([predictions(found)] if found.law else []), also(found), costs(found), speeds(found)]
    return [*several, changes(found), *([learning_rates(found)] if any(each.rates for each in found.variants) else [])]


def results(found: Findings) -> Table:
    settings = found.settings
    sure = f"{1 - settings.alpha:.0%}"
    head = ["variant", "n", f"{settings.metric.replace('_', ' ')}, mean ± deviation"]
    head += ["difference", f"{sure} interval", "p (Holm)", "smallest visible", "verdict"]
    rows = [[*losses(each), *compared(each.difference), each.verdict] for each in found.variants]
    return Table("What came of it", head, rows)


def losses(variant: Variant) -> list[str]:
    mean = NOTHING if variant.mean is None else f"{variant.mean:.4f}"
    spread = "" if variant.spread is None else f" ± {variant.spread:.4f}"
    return [variant.name, str(len(variant.values)), mean + spread]


def compared(made: Difference | None) -> list[str]:
    if made is None or made.mean is None:
        return [NOTHING] * 4
    interval = NOTHING if made.low is None or made.high is None else f"{made.low:+.4f} to {made.high:+.4f}"
    p = NOTHING if made.adjusted_p is None else f"{made.adjusted_p:.2g}"
    visible = NOTHING if made.smallest_visible is None else f"{made.smallest_visible:.4f}"
    return [f"{made.mean:+.4f}", interval, p, visible]


def also(found: Findings) -> Table:
    """What else the trained models were measured on; more is better."""
    names = list(dict.fromkeys(name for each in found.variants for name in each.also))
    rows = [[each.name, *(share(each.also.get(name)) for name in names)] for each in found.variants]
    said = {"validation_accuracy": "held-out accuracy"}
    return Table(
        "What else was measured", ["variant", *(said.get(name, name.replace(".", " ")) for name in names)], rows
    )


def share(of: Mean | None) -> str:
    if of is None:
        return NOTHING
    return f"{of.mean:.2%}" + ("" if of.spread is None else f" ± {100 * of.spread:.2f}")


def costs(found: Findings) -> Table:
    head = ["variant", "parameters", "active", "FLOPs a token", "KV bytes a token (fp32)", "memory, predicted"]
    head += ["steps", "tokens", "FLOPs"]
    rows = []
    for each in found.variants:
        cost = each.cost
        sizes = ("parameters", "active", "flops_per_token", "kv_bytes_per_token")
        row = [each.name, *(f"{cost[name]:,}" for name in sizes), mebibytes(cost["predicted_memory_bytes"])]
        rows.append([*row, f"{each.steps:,}", f"{cost['tokens']:,}", f"{cost['flops']:.3g}".replace("e+", "e")])
    return Table("What it cost, a run", head, rows)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def speeds(found: Findings) -> Table:
    """What depends on the machine, and on what else it had to do."""
    head = ["variant", "training, tokens/s", "seconds a run", "decoding, tokens/s: median (lowest to highest)"]
    rows = []
    for each in found.variants:
        train, seconds = (Mean(**speed) if (speed := each.speed.get(name)) else None for name in TIMES)
        decoding, memory = each.speed.get("decode_tokens_per_second"), each.speed.get("peak_memory_bytes")
        row = [each.name, rate(train, 0), rate(seconds, 1), rounds(decoding) if decoding else NOTHING]
        rows.append([*row, NOTHING if memory is None else mebibytes(memory)])
    where = " and ".join(dict.fromkeys(run.speed["machine"] for run in found.runs.values()))
    return Table(f"How fast it was on {where or 'this machine'}", [*head, "memory of training, measured"], rows)


def rate(of: Mean | None, digits: int) -> str:
    if of is None:
        return NOTHING
    return f"{of.mean:,.{digits}f}" + ("" if of.spread is None else f" ± {of.spread:,.{digits}f}")


def rounds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def predictions(found: Findings) -> Table:
    """What the small sizes say of the larger ones, and what came."""
    made, sure = found.law, f"{1 - found.settings.alpha:.0%}"
    assert made is not None
    head = ["variant", "predicted", f"{sure} interval", "measured", "measured - predicted", "its interval"]
    rows = []
    for each in made.predictions:
        row = [each.name, f"{each.predicted:.4f}", f"{each.low:.4f} to {each.high:.4f}", f"{each.measured:.4f}"]
        gap = each.measured - each.predicted
        rows.append([*row, f"{gap:+.4f}", f"{each.missed_low:+.4f} to {each.missed_high:+.4f}"])
    return Table("What the sizes predicted", head, rows)


def changes(found: Findings) -> Table:
    """A row for each setting, since they are many and variants few."""
    names = list(dict.fromkeys(name for each in found.variants for name in each.changes))
    rows = [
        [name, *(written(each.changes[name]) if name in each.changes else NOTHING for each in found.variants)]
        for name in names
    ]
    return Table("What each changes in the recipe", ["setting", *(each.name for each in found.variants)], rows)


def learning_rates(found: Findings) -> Table:
    factors = found.settings.learning_rates
    rows = []
    for each in found.variants:
        if each.rates is None:
            continue
        means = [each.rates.means.get(factor) for factor in factors]
        chosen = NOTHING if each.rates.factor is None else f"{each.rates.factor:g}"
        said = "at the end of what was tried: a better one may lie beyond" if each.rates.at_the_end else ""
        rows.append([each.name, *(NOTHING if mean is None else f"{mean:.4f}" for mean in means), chosen, said])
    seeds = ", ".join(map(str, found.settings.learning_rate_seeds))
    head = ["variant", *(f"x {factor:g}" for factor in factors), "chosen", ""]
    return Table(f"Learning rates, tried with seed {seeds}", head, rows)
