"""`smolforge export`."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smolforge.errors import SettingError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    model: str,
    *,
    to: Literal["transformers", "adapter"],
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Hand a model on, checked by a round trip.

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints.
    to
        transformers: a clean folder that AutoModelForCausalLM loads, with tokenizer and chat template; it appears
        only if Transformers says the same with it. adapter: what training with --lora.rank learned, for peft.
    out
        The folder to write; it must not be there yet.
    dtype
        float32, bfloat16 or float16; by default as the files have it.
    max_shard_size
        Largest weights file, as 500MB or 2GB; more than that is cut into several.
    json_
        Print files, max_abs_logit_diff and greedy_match as one JSON object.
    """
    largest = _bytes(max_shard_size)
    if to == "adapter":
        _adapter(model, out, json_)
        return
    from smolforge.export.transformers import to_transformers

    made = to_transformers(model, out, dtype, largest)
    if json_:
        print(json.dumps(made.__dict__))
        return
    for name, size in made.files.items():
        print(f"{size:>14,}  {out / name}")
    rounded = f"; rounding to {made.dtype} changed them by {made.rounding_logit_diff:.1e}"
    print(
        f"Transformers loads it and says the same: logits within {made.max_abs_logit_diff:.1e}, greedy text equal"
        + (rounded if made.rounding_logit_diff else "")
    )


def _adapter(model: str, out: Path, json_: bool) -> None:
    from smolforge.export.adapter import to_adapter

    files, worst = to_adapter(model, out)
    if json_:
        print(json.dumps({"files": files, "max_abs_logit_diff": worst}))
        return
    for name, size in files.items():
        print(f"{size:>14,}  {out / name}")
    print(f"added to its base it says the same: logits within {worst:.1e}; PeftModel.from_pretrained takes it")


def _bytes(size: str) -> int:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)([KMG]B|)", size.upper())
    if found is None or float(found[1]) * _UNITS[found[2]] < 1:
        raise SettingError(f"max-shard-size is {size!r}; it should be a size such as 500MB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])
