"""How fast one GPU trains SmolLM2-135M on rows of 2048 tokens: ours, Transformers', and what the GPU could do.

    python benchmarks/gpu.py --out DIR [--minutes 8] [--rows 8 16 32] [--preset smollm2-135m] [--length 2048]
                             [--groups N] [--device cuda] [--quick]

Printed as it comes, and kept in DIR/results.md and DIR/results.json after every group:

    1. the device: large products and copies, this shape's own products, attention by every backend, each alone
    2. ours and Transformers', compiled and eager, in turn on the same weights and batches; where our time goes;
       whether a step of ours waits for the device, and whether the same steps end at the same weights
    3. other micro-batches and shapes, attention backends, layers compiled by themselves, documents kept apart

It needs torch, safetensors, numpy, jaxtyping, tokenizers and PyYAML, and Transformers for that comparison. To a
machine without a network the rest, pydantic and tomli-w, is carried as wheels, 3 MB, made where there is one:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --dest .wheels \\
        --constraint constraints.txt annotated-types pydantic pydantic-core tomli-w typing-inspection

and there, in the root of this repository:

    python3 -m pip install --no-index --no-deps --target /tmp/site .wheels/*.whl
    PYTHONPATH=src:/tmp/site python3 benchmarks/gpu.py --out DIR

What fails, or runs out of memory or of time, is a line and not the end. `--groups 1` ends after the comparison of 2;
`--device cpu --preset smollm2-nano --length 64 --rows 2 --quick` executes every line but CUDA's, and measures nothing.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gpu_page
import job
from contest import Contestant, ContestantError, Entrant, race, start_by
from roofline import Machine, fastest_step

from smolforge.config import ModelConfig, presets
from smolforge.models.stats import flops_per_token

OURS, THEIRS = "smolforge", "transformers"
LEARNING_RATE = 3e-4
AGREEMENT = 2e-3
"""Relative difference that bf16's rounding may make to the first loss, which is of the same weights."""
LEAST_SECONDS = 45
"""A group is left out when less time is left."""
PATIENCE_SECONDS = 200
"""Within which a contestant must answer; compiling takes the longest."""
SIDE_BY_SIDE_TOKENS = 40_000
"""Micro-batches up to so large compile side by side, as they have room beside each other."""
OTHER_SHAPES = ("pow2-135m", "study-pow2-151m", "study-original-174m")
KINDS = {
    "no": "eager",
    "whole": "compiled",
    "layers": "compiled by layer",
    "autotuned": "compiled, autotuned",
    "graphs": "compiled, CUDA graphs",
}


@dataclass(frozen=True)
class Case:
    """A contestant and what it trains."""

    preset: str
    rows: int
    peer: str = OURS
    compiled: str = "whole"
    attention: str = "default"
    deterministic: bool = False

    @property
    def name(self) -> str:
        more = [self.attention] * (self.attention != "default") + ["deterministic"] * self.deterministic
        return ", ".join([f"{self.peer} {KINDS[self.compiled]}", *more])


class Group(NamedTuple):
    """Cases that take turns; where `probed`, ours are also asked what no clock tells."""

    cases: list[Case]
    probed: bool = False


def groups(preset: str, rows: list[int]) -> list[Group]:
    """In the order in which they should be known when time runs out."""
    middle = sorted(rows)[len(rows) // 2]
    ours = Case(preset, middle)
    theirs = replace(ours, peer=THEIRS)
    eager = [replace(case, compiled="no") for case in (ours, theirs)]
    largest_first = sorted(set(rows) - {middle}, reverse=True)
    others = [Group([replace(case, rows=count) for case in (ours, theirs)]) for count in largest_first]
    shapes = OTHER_SHAPES if preset == "smollm2-135m" else ()
    return [
        Group([ours, theirs, *eager], probed=True),
        *others[:1],
        Group([Case(shape, middle) for shape in shapes]),
        Group([*(replace(ours, attention=name) for name in ("flash", "cudnn")), replace(ours, compiled="layers")]),
        *others[1:],
        Group([replace(ours, attention="documents"), replace(ours, deterministic=True)], probed=True),
        Group([replace(ours, compiled="graphs", rows=min(rows))]),
        Group([replace(ours, compiled="autotuned")]),
    ]


class Bench:
    """What was asked for, and what was found so far."""

    def __init__(self, asked: argparse.Namespace, scratch: Path) -> None:
        self.asked, self.scratch, self.out = asked, scratch, Path(asked.out).resolve()
        self.deadline = time.monotonic() + 60 * asked.minutes
        self.dtype = "bfloat16" if asked.device == "cuda" else "float32"
        self.machine, self.peak = Machine(float("nan"), float("nan")), float("nan")
        self.lines: list[str] = []
        self.found: dict[str, Any] = {"asked": {**vars(asked), "out": str(self.out)}, "cases": []}

    def say(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        (self.out / "results.md").write_text("\n".join(self.lines) + "\n", "utf-8")
        (self.out / "results.json").write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")

    def patience(self) -> float:
        return max(1.0, min(PATIENCE_SECONDS, self.deadline - time.monotonic()))

    def log(self, name: str) -> Path:
        return self.out / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.log"

    def gauge(self) -> None:
        """The device by itself. Raises ContestantError where it cannot be used."""
        asked, config = self.asked, shape(self.asked.preset)
        rows = sorted(asked.rows)[len(asked.rows) // 2]
        tokens = rows * asked.length
        given = {"device": asked.device, "dtype": self.dtype, "quick": asked.quick}
        with Contestant("roofline:Gauge", log=self.log("device"), **given) as gauge:
            gauge.answer(self.patience())
            about = self.found["device"] = self.told(gauge, "about")
            self.peak = about["peak_flops_per_second"]
            self.machine, rates = self.told(gauge, "machine")
            self.found |= {"measured": self.machine._asdict(), "rates": rates}
            self.say(*gpu_page.of_device(about, self.machine, rates))
            parts, strict = (fastest_step(config, asked.length, tokens, self.machine, bold) for bold in (False, True))
            self.found["roofline"] = {"tokens": tokens, "seconds": parts, "seconds_strict": strict}
            self.say(*gpu_page.of_roofline(parts, strict, tokens))
            products = self.found["products"] = self.told(gauge, "products", config=config, tokens=tokens)
            self.say(*gpu_page.of_products(products, self.machine))
            backends = self.told(gauge, "attention", config=config, rows=rows, length=asked.length)
            self.found["attention"] = backends
            self.say(*gpu_page.of_attention(backends))

    def told(self, contestant: Contestant, method: str, **given: Any) -> Any:
        contestant.ask(method, **given)
        return contestant.answer(self.patience())

    def compete(self, group: Group) -> None:
        """Those that found no memory beside the others have another try by themselves."""
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS and not self.asked.quick:
            for case in group.cases:
                self.skip(case, f"not run: {left:.0f} seconds are left")
            return
        for case in self.run(group.cases, group.probed):
            self.run([case], group.probed)

    def run(self, cases: list[Case], probed: bool) -> list[Case]:
        """Race and report; returns those that ran out of memory in company."""
        steps, warm, rounds = (1, 0, 1) if self.asked.quick else (10, 1, 3)
        with ExitStack() as leaving:
            running = {case: leaving.enter_context(self.started(case)) for case in cases}
            entrants = {case: Entrant(contestant, self.patience) for case, contestant in running.items()}
            compiling = [
                each
                for case, each in entrants.items()
                if case.compiled != "no" and case.rows * self.asked.length <= SIDE_BY_SIDE_TOKENS
            ]
            race(list(entrants.values()), rounds, steps, warm, together=compiling)
            crowded = [
                case for case, each in entrants.items() if "out of memory" in (each.failed or "") and len(cases) > 1
            ]
            for case, each in entrants.items():
                if case not in crowded:
                    self.report(case, each, entrants, steps)
            for case, each in entrants.items():
                if probed and case.peer == OURS and each.failed is None:
                    self.probe(case, each)
        return crowded

    def started(self, case: Case) -> Contestant:
        folder = self.scratch / case.preset
        if not folder.exists():
            job.prepared(case.preset, folder)
        given = {key: value for key, value in asdict(case).items() if key != "preset"}
        given |= {"folder": folder, "length": self.asked.length, "learning_rate": LEARNING_RATE}
        given |= {"device": self.asked.device, "dtype": self.dtype}
        maker = "peers:Smolforge" if case.peer == OURS else "peers:Peer"
        return Contestant(maker, log=self.log(f"{case.name} {case.preset} {case.rows}"), **given)

    def report(self, case: Case, entrant: Entrant, entrants: dict[Case, Entrant], steps: int) -> None:
        if entrant.failed is not None:
            self.skip(case, entrant.failed)
            return
        beside = entrants.get(Case(case.preset, case.rows, THEIRS)) if case.peer == OURS else None
        row = {"case": case.name, **asdict(case), **self.figures(case, entrant, steps)}
        row |= {"times_transformers": times(entrant, beside), "notes": notes(case, entrant, beside)}
        self.found["cases"].append(row)
        self.say(gpu_page.of_case(row))

    def skip(self, case: Case, why: str) -> None:
        row = {"case": case.name, **asdict(case), "failed": why}
        self.found["cases"].append(row)
        self.say(gpu_page.of_case(row))

    def figures(self, case: Case, entrant: Entrant, steps: int) -> dict[str, Any]:
        config, length, tokens = shape(case.preset), self.asked.length, case.rows * self.asked.length
        first, *turns = entrant.turns
        seconds = statistics.median(turn["seconds"] / steps for turn in turns)
        rate = tokens / seconds
        roofline = fastest_step(config, length, tokens, self.machine)
        return {
            "tokens_per_second": rate,
            "seconds_by_turn": [turn["seconds"] / steps for turn in turns],
            "mfu": rate * flops_per_token(config, length) / self.peak,
            "mfu_full_attention": rate * flops_per_token(config, length, "full") / self.peak,
            "of_roofline": sum(roofline.values()) / seconds,
            "peak_bytes": turns[-1]["peak_bytes"],
            "first_step_seconds": first["seconds"],
            "losses": [loss for turn in entrant.turns for loss in turn["losses"]],
            "graphs": [turn["graphs"] for turn in entrant.turns],
        }

    def probe(self, case: Case, entrant: Entrant) -> None:
        """What a step waits for, whether steps repeat to the bit, where their time goes."""
        folder = self.out / f"profile-{case.compiled}-{case.attention}{'-deterministic' * case.deterministic}"
        answers: dict[str, Any] = {}
        for method, given in {"waits": {}, "repeats": {}, "profile": {"out": folder}}.items():
            entrant.ask(method, **given)
            answers[method] = entrant.hear()
            answers["failed"] = entrant.failed
        self.found.setdefault("probes", {})[f"{case.name}, {case.rows} rows"] = answers

    def conclude(self) -> None:
        for name, answers in self.found.get("probes", {}).items():
            self.say(*gpu_page.of_probe(name, answers))
        self.say(*gpu_page.of_verdict(self.found["cases"]))


def shape(preset: str) -> ModelConfig:
    return ModelConfig.model_validate(presets.shape(preset))


def times(ours: Entrant, theirs: Entrant | None) -> dict[str, float] | None:
    """How many times as fast, within each round."""
    if theirs is None or theirs.failed is not None:
        return None
    pairs = zip(ours.turns[1:], theirs.turns[1:], strict=True)
    ratios = [other["seconds"] / mine["seconds"] for mine, other in pairs]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def notes(case: Case, entrant: Entrant, beside: Entrant | None) -> list[str]:
    """What makes a figure another than it seems."""
    said, graphs = [], [turn["graphs"] for turn in entrant.turns]
    if case.compiled != "no" and not graphs[-1]:
        said.append("NOT COMPILED")
    if graphs[-1] > graphs[0]:
        said.append(f"COMPILED AGAIN: {graphs[0]} to {graphs[-1]} graphs")
    if beside is not None and beside.turns:
        mine, other = (each.turns[0]["losses"][0] for each in (entrant, beside))
        if not abs(mine - other) <= AGREEMENT * other:
            said.append(f"ANOTHER LOSS than Transformers, {other:.4f}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--groups", type=int, metavar="N", help="only the first so many groups of contestants")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one step of each, to see that all of it runs")
    asked = parser.parse_args()
    Path(asked.out).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # These leave CUDA alone when imported, as forking needs.
    start_by("forkserver", "torch._dynamo", "smolforge.training.loop")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(asked, Path(scratch))
        try:
            bench.gauge()
        except ContestantError as why:
            bench.say(f"The device could not be measured: {why}; see {bench.log('device')}")
            start_by("spawn")
        bench.say(gpu_page.CASES)
        for group in groups(asked.preset, asked.rows)[: asked.groups]:
            bench.compete(group)
        bench.conclude()


if __name__ == "__main__":
    main()
