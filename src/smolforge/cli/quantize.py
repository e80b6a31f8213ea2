"""`smolforge export --to int8` and `int4`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smolforge.errors import SettingError

if TYPE_CHECKING:
    from smolforge.export.quantize import Exported

ROWS = {
    "bytes_on_disk": "weights on disk, bytes",
    "tensor_bytes": "  as arithmetic says",
    "bytes_in_memory": "weights in memory, bytes",
    "loss": "loss, nats a token",
    "bits_per_byte": "bits a byte",
    "top1_agreement": "same likeliest token",
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "answering, tokens/s",
}


def quantize(
    model: str, bits: Literal[8, 4], out: Path, group_size: int | None, embedding: str, text: Path | None, json_: bool
) -> None:
    """Write the folder and show the table."""
    from smolforge.export.quantize import GROUP_SIZES, to_integers
    from smolforge.quantized import Scheme

    size = None if bits == 8 else GROUP_SIZES[0] if group_size is None else group_size
    if size is not None and size not in GROUP_SIZES:
        raise SettingError(f"group-size is {size}; it should be {' or '.join(map(str, GROUP_SIZES))}")
    made = to_integers(model, out, Scheme(bits, size, embedding == "int8"), text)
    if json_:
        print(json.dumps(asdict(made)))
        return
    for name, written in made.files.items():
        print(f"{written:>14,}  {out / name}")
    for line in lines(made):
        print(line)
    if embedding == "int8":
        print("read by smolforge; --embedding bfloat16 leaves the embedding, so that Transformers and vLLM read it too")


def lines(made: "Exported") -> list[str]:
    """The table, the last column what came of what was."""
    told = [f"{made.tokens:,} tokens of {made.text}", f"{'':<26}{'before':>14}{'after':>14}{'':>10}"]
    for name, said in ROWS.items():
        before, after = made.before.__dict__[name], made.after.__dict__[name]
        digits = ".4f" if name in ("loss", "bits_per_byte") else ".2%" if name == "top1_agreement" else ",.0f"
        change = f"{after / before - 1:+.2%}" if digits == ".4f" else f"x {after / before:.2f}"
        told.append(f"{said:<26}{before:>14{digits}}{after:>14{digits}}{'' if digits == '.2%' else change:>10}")
    rates = [name for name in ROWS if name.endswith("per_second")]
    slower = [ROWS[name] for name in rates if made.after.__dict__[name] < made.before.__dict__[name]]
    return [*told, *(f"slower here than before: {each.partition(',')[0]}" for each in slower)]
