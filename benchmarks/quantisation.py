"""A model in every form that `export --to int8` and `int4` write: size, loss and speed, each against the model before.

    python benchmarks/quantisation.py MODEL [--text FILE] [--tokens 16384]

The model before and after take turns in one process, so that a ratio means something on a busy machine too; losses and
sizes do not depend on it. Of a folder with random weights only sizes and speeds mean anything.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from smolforge.exporters import quantize
from smolforge.models.quantized import QuantizationScheme

SCHEMES = {
    "int8": QuantizationScheme(8, None, True),
    "int8, embedding kept": QuantizationScheme(8),
    "int4 by 32": QuantizationScheme(4, 32, True),
    "int4 by 64": QuantizationScheme(4, 64, True),
    "int4 by 32, embedding kept": QuantizationScheme(4, 32),
}
HEAD = ["form", "bytes on disk", "of the tensors, by arithmetic", "bytes in memory", "loss", "change", "bits a byte"]
HEAD += ["same likeliest token", "reading, x before", "answering, x before"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=quantize.MAX_TOKENS)
    asked = parser.parse_args()
    quantize.MAX_TOKENS = asked.tokens
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for place, (name, scheme) in enumerate(SCHEMES.items()):
        with tempfile.TemporaryDirectory() as folder:
            made = quantize.to_quantized(asked.model, Path(folder) / "out", scheme, text=asked.text)
        if not place:
            print(row("before", made.before, made.before))
        print(row(name, made.after, made.before), flush=True)
    print(f"\n{made.tokens:,} tokens of {made.text}; {torch.get_num_threads()} threads")


def row(name: str, one: quantize.ModelMeasurements, before: quantize.ModelMeasurements) -> str:
    sizes = [f"{size:,}" for size in (one.bytes_on_disk, one.tensor_bytes, one.bytes_in_memory)]
    said = [f"{one.loss:.4f}", f"{one.loss / before.loss - 1:+.3%}", f"{one.bits_per_byte:.4f}"]
    rates = [
        f"{one.prefill_tokens_per_second / before.prefill_tokens_per_second:.2f}",
        f"{one.decode_tokens_per_second / before.decode_tokens_per_second:.2f}",
    ]
    return f"| {' | '.join([name, *sizes, *said, f'{one.top1_agreement:.1%}', *rates])} |"


if __name__ == "__main__":
    main()
