"""Decoding: the engine beside `transformers generate`, llama.cpp where it is installed, and plain F.linear.

    python benchmarks/decoding.py [--preset smollm2-135m] [--prompt 64] [--new 24] [--rounds 5] [--llama PYTHON]

The same random weights, fp32, contestants in turn, llama.cpp in a process of its own (`make .llama` builds it, and
`--llama .llama/venv/bin/python` lets it take part) and the others in one; greedy ids must be the same. tokens/s and
GB/s (the weights, once a step) are by the clock between the first new token and the last. Ratios within a round are by
the clock and by the processor's seconds; the latter hardly hear of other work on the machine. Then the first token
beside a plain prefill, and what `smolforge generate` takes from Enter to its first token, with imports told apart.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contest import Contestant
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import BaseStreamer

from smolforge.checkpoint import huggingface
from smolforge.config import Generation, ModelConfig, presets
from smolforge.exporters.gguf import to_gguf
from smolforge.generation.cpu_decoding import prepack
from smolforge.generation.engine import Engine, Request
from smolforge.generation.samplers import make_sampler
from smolforge.models.decoder import LanguageModel, build
from smolforge.testing import tiny_tokenizer

GREEDY = make_sampler(Generation(temperature=0))
PARALLEL = 8


class Turn(NamedTuple):
    """Seconds a token and processor's seconds a token, of all rows together; ids of the first row."""

    clock: float
    busy: float
    ids: list[int]
    steps_a_second: float


class Stamps(BaseStreamer):
    """When each new token came."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def put(self, value: Any) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        pass


def turn(at: Sequence[tuple[float, float]], rows: int, ids: list[int]) -> Turn:
    """From the times of each step, the first of which had a prefill before it."""
    (clock, busy), steps = [last - first for first, last in zip(at[0], at[-1], strict=True)], len(at) - 1
    return Turn(clock / steps / rows, busy / steps / rows, ids, steps / clock)


def transformers(model: LanguageModel, prompt: list[int], new: int) -> Callable[[], Turn]:
    config = LlamaConfig(**model.config.model_dump(exclude={"model_type"}, exclude_none=True))
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    ids = torch.tensor([prompt])

    def run() -> Turn:
        stamps, mask = Stamps(), torch.ones_like(ids)
        found = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=stamps,
        )
        return turn(stamps.at[1:], 1, found[0, len(prompt) :].tolist())

    return run


def ours(model: LanguageModel, prompt: list[int], new: int, rows: int, plain: bool) -> Callable[[], Turn]:
    """The engine, with its weights packed, or with every product an F.linear."""
    network = model if plain else prepack(model)

    def run() -> Turn:
        engine = Engine(model, rows, len(prompt) + new + rows)
        engine.decoding_model = network
        numbers = [engine.submit(Request(prompt, GREEDY, new + rows)) for _ in range(rows)]
        while len(engine.decoding) < rows:
            engine.step()
        stamps, ids = [(time.perf_counter(), time.process_time())], list(engine.decoding[0].token_ids)
        while len(stamps) <= new - 1:
            ids += [token.id for token in engine.step() if token.row == numbers[0]]
            stamps.append((time.perf_counter(), time.process_time()))
        return turn(stamps, rows, ids[len(prompt) :][:new])

    if plain:  # it would be packed at its first step
        import smolforge.generation.engine as module

        def unpacked() -> Turn:
            before, module.prepack = module.prepack, lambda model: model
            try:
                return run()
            finally:
                module.prepack = before

        return unpacked
    return run


def llama_cpp(running: Contestant) -> Callable[[], Turn]:
    """llama.cpp, which took the same weights from a .gguf in f32."""

    def run() -> Turn:
        running.ask("turn")
        found = running.answer()
        return turn([*map(tuple, found["at"])], 1, found["ids"])

    return run


def exported(model: LanguageModel, folder: Path) -> Path:
    """A .gguf in f32, with a tokenizer that only fills its place."""
    huggingface.save(model, folder / "model", tiny_tokenizer())
    to_gguf(folder / "model", folder / "model.gguf", "f32")
    return folder / "model.gguf"


def first_token(model: LanguageModel, prompt: list[int], rounds: int) -> list[float]:
    """Times a plain prefill, forward pass and head of the last token, until the engine gives a token; by round."""
    ratios = []
    for _ in range(rounds):
        begun = time.process_time()
        with torch.inference_mode():
            model.logits(model.hidden_states(torch.tensor([prompt]))[:, -1]).argmax(-1).item()
        between = time.process_time()
        engine = Engine(model, 1, len(prompt) + 24)
        engine.submit(Request(prompt, GREEDY, 24))
        while not engine.step():
            pass
        ratios.append((time.process_time() - between) / (between - begun))
    return ratios


def from_enter(model: LanguageModel, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of `smolforge generate` for one token of a model in a folder, and those of importing what it does."""
    modules = "smolforge.checkpoint.loading, smolforge.generation.stream, smolforge.device"
    whole, imports = [], []
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(model, Path(folder), tiny_tokenizer())
        command = ["-m", "smolforge", "generate", folder, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
        for _ in range(rounds):
            for found, words in ((imports, ["-c", f"import {modules}"]), (whole, command)):
                begun = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, capture_output=True)
                found.append(time.perf_counter() - begun)
    return whole, imports


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def agreed(turns: Sequence[Turn], name: str, model: LanguageModel, prompt: list[int]) -> None:
    """Refuse figures of contestants that say something else, but for near ties."""
    for one in turns[1:]:
        place = next((i for i, pair in enumerate(zip(one.ids, turns[0].ids, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            top = model(torch.tensor([prompt + one.ids[:place]]))[0, -1].topk(2).values
            if top[0] - top[1] >= 1e-4:
                raise SystemExit(f"{name} differs from the others at new token {place}")


def raced(contestants: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Turns of each, the first left out, which allocates."""
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            found = run()
            if number:
                turns[name].append(found)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", type=Path, help="interpreter of the environment that has llama-cpp-python")
    asked = parser.parse_args()
    model = build(ModelConfig.model_validate(presets.shape(asked.preset))).eval()
    prompt = torch.randint(3, model.config.vocab_size, (asked.prompt,), generator=torch.Generator().manual_seed(0))
    prompt, size = prompt.tolist(), sum(each.numel() * each.element_size() for each in model.parameters()) / 1e9
    given = (model, prompt, asked.new)
    contestants = {
        "transformers generate": transformers(*given),
        "F.linear": ours(*given, 1, True),
        "smolforge": ours(*given, 1, False),
        f"F.linear, {PARALLEL} requests": ours(*given, PARALLEL, True),
        f"smolforge, {PARALLEL} requests": ours(*given, PARALLEL, False),
    }
    with ExitStack() as leaving:
        if asked.llama is not None:
            scratch = Path(leaving.enter_context(tempfile.TemporaryDirectory()))
            told = {"file": exported(model, scratch), "threads": torch.get_num_threads(), "prompt": prompt}
            entrant = Contestant("llama:LlamaCpp", str(asked.llama), scratch / "llama.log", **told, new=asked.new)
            contestants["llama.cpp, f32"] = llama_cpp(leaving.enter_context(entrant))
            entrant.answer()
        turns = raced(contestants, asked.rounds)
    names = list(turns)
    for name in names[1:]:
        agreed([turns[names[0]][0], *turns[name]], name, model, prompt)
    what = f"{asked.preset}, fp32, {torch.get_num_threads()} threads, {asked.prompt} + {asked.new} tokens"
    print(f"{what}, {asked.rounds} rounds")
    print(
        "| contestant | tokens/s | GB/s | times transformers, clock (range) | processor | times F.linear, processor |"
    )
    print("|---|---|---|---|---|---|")
    for name, own in turns.items():
        speed = statistics.median(1 / one.clock for one in own)
        read = statistics.median(one.steps_a_second for one in own) * size
        ratios = [
            [getattr(base, field) / getattr(one, field) for base, one in zip(turns[against], own, strict=True)]
            for against, field in ((names[0], "clock"), (names[0], "busy"), ("F.linear", "busy"))
        ]
        print(f"| {name} | {speed:.1f} | {read:.1f} | {' | '.join(map(spread, ratios))} |", flush=True)
    if asked.llama is None:
        print("| llama.cpp, f32 | not asked: make .llama, and --llama .llama/venv/bin/python | | | | |")
    print(f"first token: {spread(first_token(model, prompt, asked.rounds))} times a plain prefill, processor")
    whole, imports = from_enter(model, min(asked.rounds, 3))
    print(f"Enter to first token: {spread(whole)} s, of which imports {spread(imports)} s")


if __name__ == "__main__":
    main()
