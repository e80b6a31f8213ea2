"""A model in every form of 4 and 8 bits, ours and llama.cpp's: bytes, and its predictions beside the model before.

    python benchmarks/quantization.py MODEL --text FILE --calibrate FILE --out FOLDER [--forms NAME ...] [--tokens N]

Each form is made and measured once and kept in FOLDER, so a run that was cut goes on, and several can share the work.
llama.cpp's forms take `.llama`, which `make .llama` builds. Losses and sizes do not depend on the machine.
"""

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolforge.checkpoint import huggingface, loading
from smolforge.evaluation.divergence import Comparison, compare_predictions
from smolforge.exporters import gguf, texts
from smolforge.exporters.quantize import no_progress, quantize_model
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme

LLAMA = Path(".llama/build/bin")
HEAD = ["form", "bytes", "loss", "change", "perplexity ratio", "KL divergence", "same likeliest token"]


class Bench:
    """The model before, and what each form is made of."""

    def __init__(self, model: str, out: Path, *, text: Path, calibrate: Path) -> None:
        self.model, self.out, self.calibrate = model, out, calibrate
        self.before, self.source = loading.load(model), loading.resolve_model_path(model)
        self.text = texts.measured_text(self.before, self.source, text)
        self.states = torch.load(self.states_path) if self.states_path.exists() else {}

    @property
    def states_path(self) -> Path:
        return self.out / "before.pt"

    @cached_property
    def calibration(self) -> texts.CalibrationText:
        text = texts.calibration_text(self.before, self.source, str(self.calibrate))
        assert text is not None
        texts.check_distinct(self.text, text)
        return text

    def integers(self, path: Path, scheme: QuantizationScheme, *, chosen: bool = False) -> None:
        """Write a folder of integers, the nearest or those that the text chooses."""
        made = quantize_model(self.before, scheme, self.calibration if chosen else None, progress=no_progress)
        huggingface.save(made, path, made.tokenizer, dtype=torch.bfloat16, max_shard_bytes=None)

    def chosen_blocks(self, path: Path, kind: str, *, form: str) -> None:
        """Write the chosen integers of another form as blocks."""

        def made_before(*_: Any, **__: Any) -> Any:
            model = loading.load(self.path(form))
            model.set_submodule(quantized.EMBEDDING, self.before.model.embed_tokens)
            return model

        gguf.quantize_model = made_before
        gguf.to_gguf(self.model, path, kind, calibrate=str(self.calibrate))

    def blocks(self, path: Path, kind: str, *, importance: bool = False) -> None:
        """Write what llama-quantize makes, with or without the importance matrix of the text."""
        if not (full := self.out / "f32.gguf").exists():
            gguf.to_gguf(self.model, full, "f32")
        matrix, flags = self.out / "importance.gguf", []
        if importance and not matrix.exists():
            words = [
                "-m",
                full,
                "-f",
                self.calibrate,
                "-o",
                matrix,
                "-c",
                "1024",
                "--chunks",
                str(texts.MAX_TOKENS // 1024),
            ]
            subprocess.run([LLAMA / "llama-imatrix", *words], check=True, capture_output=True)
        if importance:
            flags = ["--imatrix", matrix]
        subprocess.run([LLAMA / "llama-quantize", *flags, full, path, kind], check=True, capture_output=True)

    def path(self, form: str) -> Path:
        return self.out / f"{form.replace(' ', '-')}{'.gguf' if 'gguf' in form or 'llama' in form else ''}"

    def measure(self, form: str) -> dict[str, Any]:
        """Make a form and compare it, once."""
        path = self.path(form)
        record = path.with_name(f"{path.name}.json")
        if not record.exists():
            if not path.exists():
                FORMS[form](self, path)
            after = loading.load(path)
            size = sum(file.stat().st_size for file in loading.weight_files(path))
            found = dataclasses.asdict(self.compare(after))
            record.write_text(json.dumps({"form": form, "bytes": size, **found}))
        return json.loads(record.read_text())

    def compare(self, after: LanguageModel) -> Comparison:
        """Compare with the model before, whose states are computed once."""
        compute, known = self.before.hidden_states, len(self.states)

        def hidden_states(ids: Tensor) -> Tensor:
            key = ids.numpy().tobytes()
            if key not in self.states:
                self.states[key] = compute(ids)
            return self.states[key]

        self.before.hidden_states = hidden_states  # type: ignore[assignment]
        try:
            return compare_predictions(self.before, after, self.text)
        finally:
            self.before.hidden_states = compute  # type: ignore[method-assign]
            if len(self.states) > known:
                torch.save(self.states, self.states_path)


def four_bits(group_size: int, *, zero_point: bool, chosen: bool) -> Callable[[Bench, Path], None]:
    scheme = QuantizationScheme(4, group_size, True, zero_point=zero_point)
    return partial(Bench.integers, scheme=scheme, chosen=chosen)


FORMS: dict[str, Callable[[Bench, Path], None]] = {
    "int8": partial(Bench.integers, scheme=QuantizationScheme(8, None, True)),
    "int4 by 32, rounded": four_bits(32, zero_point=False, chosen=False),
    "int4 by 32, calibrated": four_bits(32, zero_point=False, chosen=True),
    "int4 by 32 with zero, rounded": four_bits(32, zero_point=True, chosen=False),
    "int4 by 32 with zero, calibrated": four_bits(32, zero_point=True, chosen=True),
    "int4 by 64, rounded": four_bits(64, zero_point=False, chosen=False),
    "int4 by 64, calibrated": four_bits(64, zero_point=False, chosen=True),
    "int4 by 64 with zero, rounded": four_bits(64, zero_point=True, chosen=False),
    "int4 by 64 with zero, calibrated": four_bits(64, zero_point=True, chosen=True),
    "gguf q4_0, calibrated": partial(Bench.chosen_blocks, kind="q4_0", form="int4 by 32, calibrated"),
    "gguf q4_1, calibrated": partial(Bench.chosen_blocks, kind="q4_1", form="int4 by 32 with zero, calibrated"),
    "llama-quantize q4_0": partial(Bench.blocks, kind="q4_0"),
    "llama-quantize q4_0, importance": partial(Bench.blocks, kind="q4_0", importance=True),
    "llama-quantize q4_1": partial(Bench.blocks, kind="q4_1"),
    "llama-quantize q4_1, importance": partial(Bench.blocks, kind="q4_1", importance=True),
    "llama-quantize q4_k_m": partial(Bench.blocks, kind="q4_k_m"),
    "llama-quantize q4_k_m, importance": partial(Bench.blocks, kind="q4_k_m", importance=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), metavar="NAME", help=", ".join(FORMS))
    parser.add_argument("--tokens", type=int, default=texts.MAX_TOKENS, help="of each text")
    args = parser.parse_args()
    texts.MAX_TOKENS = args.tokens
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.out, text=args.text, calibrate=args.calibrate)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for form in args.forms:
        print(row(bench.measure(form)), flush=True)
    print(f"\n{len(bench.text.ids):,} tokens of {bench.text.name}, chosen by {bench.calibration.rows.numel():,} tokens")


def row(result: dict[str, Any]) -> str:
    """Return a line of the table."""
    loss, after = result["before"]["loss"], result["after"]
    numbers = [f"{result['bytes']:,}", f"{after['loss']:.4f}", f"{after['loss'] / loss - 1:+.2%}"]
    numbers += [f"{after['perplexity_ratio']:.4f}", f"{after['kl_divergence']:.4f}", f"{after['top1_agreement']:.1%}"]
    return f"| {' | '.join([result['form'], *numbers])} |"


if __name__ == "__main__":
    main()
