"""Decoding: the engine beside `transformers generate`, llama.cpp where it is installed, and plain F.linear.

    python benchmarks/decoding.py [MODEL] [--prompt 64] [--new 24] [--rounds 5] [--llama PYTHON]

MODEL is any model, by default a preset with random weights; `make .released` brings the released one. All contestants
have the same weights and take turns: ours in fp32, int8 and int4, llama.cpp in f32, q8_0 and q4_0 in processes of
their own (`make .llama` builds it, and `--llama .llama/venv/bin/python` lets it take part), the others in one process.
Greedy ids in fp32 must be the same. tokens/s and GB/s (the weights, once per step) are by the clock between the first
new token and the last. Ratios within a round are by the clock and by CPU seconds; the latter hardly depend on other
work on the machine. Then the first token beside a plain prefill, and what `smolforge generate` takes from Enter to its
first token, with the imports as a separate figure.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from contest import Contestant
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import BaseStreamer

from smolforge.checkpoint import huggingface, loading
from smolforge.config import Generation
from smolforge.exporters.gguf import to_gguf
from smolforge.generation.cpu_decoding import prepack
from smolforge.generation.engine import Engine, Request
from smolforge.generation.samplers import make_sampler
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme, quantize
from smolforge.testing import tiny_tokenizer

GREEDY = make_sampler(Generation(temperature=0))
PARALLEL = 8
SCHEMES = {"int8": QuantizationScheme(8, embedding=True), "int4": QuantizationScheme(4, 32, embedding=True)}
LLAMA_TYPES = ("f32", "q8_0", "q4_0")


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


def export_ggufs(model: LanguageModel, folder: Path) -> dict[str, Path]:
    """Write a .gguf of each type; a tokenizer of random weights is only a placeholder."""
    huggingface.save(model, folder / "model", model.tokenizer or tiny_tokenizer())
    files = {kind: folder / f"{kind}.gguf" for kind in LLAMA_TYPES}
    for kind, path in files.items():
        to_gguf(folder / "model", path, kind)
    return files


def load_model(name: str, tokens: int) -> tuple[LanguageModel, list[int]]:
    """Return a model, and a prompt: random ids for random weights, Python's documentation for others."""
    model = loading.load(name, random=True)
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return model, torch.randint(3, model.config.vocab_size, (tokens,), generator=generator).tolist()
    return model, model.tokenizer.encode("\n\n".join(topics.values())[: 16 * tokens])[:tokens]


def quantized_copy(model: LanguageModel, scheme: QuantizationScheme) -> LanguageModel:
    """Return the model with integer weights."""
    copied = copy.deepcopy(model)
    quantize(copied, scheme)
    return copied


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


def from_enter(name: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of `smolforge generate` for one token, and those of importing what it does."""
    modules = "smolforge.checkpoint.loading, smolforge.generation.stream, smolforge.device"
    whole, imports = [], []
    command = ["-m", "smolforge", "generate", name, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
    for _ in range(rounds):
        for seconds, words in ((imports, ["-c", f"import {modules}"]), (whole, command)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return whole, imports


def weight_bytes(model: LanguageModel) -> float:
    """Return the gigabytes of a model's weights in memory."""
    return sum(weight.nbytes for weight in model.parameters()) / 1e9


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


def print_table(turns: Mapping[str, list[Turn]], gigabytes: Mapping[str, float]) -> None:
    """Print a row per contestant; `gigabytes` are those of its weights."""
    first = next(iter(turns))
    print(
        "| contestant | tokens/s | GB/s | times transformers, clock (range) | processor | times F.linear, processor |"
    )
    print("|---|---|---|---|---|---|")
    for name, own in turns.items():
        speed = statistics.median(1 / one.clock for one in own)
        read = statistics.median(one.steps_a_second for one in own) * gigabytes[name]
        ratios = [
            [getattr(base, field) / getattr(one, field) for base, one in zip(turns[against], own, strict=True)]
            for against, field in ((first, "clock"), (first, "busy"), ("F.linear", "busy"))
        ]
        print(f"| {name} | {speed:.1f} | {read:.1f} | {' | '.join(map(spread, ratios))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="any MODEL; a preset has random weights")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", type=Path, help="interpreter of the environment that has llama-cpp-python")
    asked = parser.parse_args()
    model, prompt = load_model(asked.model, asked.prompt)
    forms = {name: quantized_copy(model, scheme) for name, scheme in SCHEMES.items()}
    single = (prompt, asked.new, 1)
    exact = {
        "transformers generate": transformers(model, prompt, asked.new),
        "F.linear": ours(model, *single, True),
        "smolforge": ours(model, *single, False),
        f"F.linear, {PARALLEL} requests": ours(model, prompt, asked.new, PARALLEL, True),
        f"smolforge, {PARALLEL} requests": ours(model, prompt, asked.new, PARALLEL, False),
    }
    contestants = exact | {f"smolforge, {name}": ours(form, *single, False) for name, form in forms.items()}
    with ExitStack() as leaving:
        folder = Path(leaving.enter_context(tempfile.TemporaryDirectory()))
        ggufs = export_ggufs(model, folder) if asked.llama is not None else {}
        told = {"threads": torch.get_num_threads(), "prompt": prompt, "new": asked.new}
        for kind, file in ggufs.items():
            entrant = Contestant("llama:LlamaCpp", str(asked.llama), folder / "llama.log", file=file, **told)
            contestants[f"llama.cpp, {kind}"] = llama_cpp(leaving.enter_context(entrant))
            entrant.answer()
        turns = raced(contestants, asked.rounds)
        sizes = {f"smolforge, {name}": weight_bytes(form) for name, form in forms.items()}
        sizes |= {f"llama.cpp, {kind}": file.stat().st_size / 1e9 for kind, file in ggufs.items()}
        named = asked.model
        if model.tokenizer is None:
            huggingface.save(model, folder / "model", tiny_tokenizer())
            named = str(folder / "model")
        whole, imports = from_enter(named, min(asked.rounds, 3))
    names = list(turns)
    for name in [*list(exact)[1:], *(name for name in names if name == "llama.cpp, f32")]:
        agreed([turns[names[0]][0], *turns[name]], name, model, prompt)
    what = f"{asked.model}, {torch.get_num_threads()} threads, {asked.prompt} + {asked.new} tokens"
    print(f"{what}, {asked.rounds} rounds")
    print_table(turns, {name: sizes.get(name, weight_bytes(model)) for name in turns})
    if asked.llama is None:
        print("| llama.cpp | not asked: make .llama, and --llama .llama/venv/bin/python | | | | |")
    print(f"first token: {spread(first_token(model, prompt, asked.rounds))} times a plain prefill, processor")
    print(f"Enter to first token: {spread(whole)} s, of which imports {spread(imports)} s")


if __name__ == "__main__":
    main()
