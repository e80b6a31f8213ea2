"""What benchmarks/gpu.py found, as lines of Markdown."""

from collections.abc import Mapping
from typing import Any

from roofline import Machine

CASES = """
| case | shape | rows | tokens/s | x Transformers | MFU causal / full | of roofline | peak | first step | loss |
|---|---|---|---|---|---|---|---|---|---|"""
Rates = Mapping[str, Mapping[str, Any]]


def of_device(about: Mapping[str, Any], machine: Machine, rates: Mapping[str, float]) -> list[str]:
    products = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates.items() if " x " in name)
    copies = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.items() if " x " not in name)
    return [
        f"{about['name']}, {about['memory_bytes'] / 2**30:.0f} GiB, torch {about['torch']}, cuDNN {about['cudnn']}",
        f"measured: {machine.flops_per_second / 1e12:.1f} TFLOP/s (products of {products}),",
        f"{machine.bytes_per_second / 1e12:.2f} TB/s ({copies}).",
        f"MFU is of {about['peak_flops_per_second'] / 1e12:.1f} TFLOP/s, {about['peak_source']}.",
    ]


def of_roofline(parts: Mapping[str, float], strict: Mapping[str, float], tokens: int) -> list[str]:
    whole, bold = (tokens / sum(each.values()) for each in (parts, strict))
    return [
        f"\nRoofline, {tokens:,} tokens a step: {whole:,.0f} tokens/s ({bold:,.0f} with attention at the peak).\n",
        "| part | us a token |\n|---|---|",
        *(f"| {name} | {1e6 * seconds / tokens:.3f} |" for name, seconds in parts.items()),
    ]


def of_products(products: Rates, machine: Machine) -> list[str]:
    whole = sum(each["seconds"] for each in products.values())
    lines = [f"\nThe shape's own products, each alone: {1e3 * whole:.2f} ms a step.\n"]
    lines += ["| product | ms a step | TFLOP/s | of the peak |\n|---|---|---|---|"]
    for name, each in products.items():
        rate = each["flops_per_second"]
        share = rate / machine.flops_per_second
        lines.append(f"| {name} | {1e3 * each['seconds']:.2f} | {rate / 1e12:.0f} | {share:.0%} |")
    return lines


def of_attention(backends: Rates) -> list[str]:
    lines = ["\nAttention of one layer, forward and backward, causal FLOPs; error of the output against fp32.\n"]
    lines += ["| backend | ms | TFLOP/s | error |\n|---|---|---|---|"]
    for name, each in backends.items():
        if "failed" in each:
            lines.append(f"| {name} | {each['failed']} | | |")
        else:
            rate = each["flops_per_second"] / 1e12
            lines.append(f"| {name} | {1e3 * each['seconds']:.3f} | {rate:.0f} | {each['error']:.1e} |")
    return lines


def of_case(row: Mapping[str, Any]) -> str:
    """One line of the table that begins with CASES."""
    who = f"| {row['case']} | {row['preset']} | {row['rows']} |"
    if "failed" in row:
        return f"{who} {row['failed']} | | | | | | |"
    times = row["times_transformers"]
    ratio = f"{times['median']:.2f} ({times['least']:.2f} to {times['most']:.2f})" if times else ""
    cells = [
        f"{row['tokens_per_second']:,.0f}",
        ratio,
        f"{row['mfu']:.1%} / {row['mfu_full_attention']:.1%}",
        f"{row['of_roofline']:.1%}",
        f"{row['peak_bytes'] / 2**30:.1f} GiB",
        f"{row['first_step_seconds']:.0f} s",
        " ".join([f"{row['losses'][0]:.4f}", *row["notes"]]),
    ]
    return f"{who} {' | '.join(cells)} |"


def of_probe(name: str, answers: Mapping[str, Any]) -> list[str]:
    waits, repeats = answers.get("waits"), answers.get("repeats")
    lines = [
        f"\n## {name}\n",
        f"waits for the device inside a step: {waits or 'for nothing'}",
        f"the same steps again end at the same weights, to the bit: {'yes' if repeats else 'no'}",
    ]
    if answers["failed"]:
        return [*lines, f"failed: {answers['failed']}"]
    return [*lines, "where the time goes:\n", "```", answers["profile"].rstrip(), "```"]


def of_verdict(cases: list[dict[str, Any]]) -> list[str]:
    """The best of ours of the shape that is judged."""
    ours = [row for row in cases if row["peer"] == "smolforge" and "failed" not in row and not row["notes"]]
    ours = [row for row in ours if row["preset"] == cases[0]["preset"]]
    if not ours:
        return ["\nNone of ours came through."]
    best = max(ours, key=lambda row: row["tokens_per_second"])
    beside = [row for row in ours if row["times_transformers"]]
    lines = [
        f"\nOur fastest: {best['case']}, {best['rows']} rows: {best['tokens_per_second']:,.0f} tokens/s, "
        f"{best['of_roofline']:.1%} of the roofline measured in this run."
    ]
    for row in beside:
        lines.append(
            f"{row['case']}, {row['rows']} rows: {row['times_transformers']['median']:.2f} x Transformers compiled."
        )
    return lines
