"""`smolforge export`.

`smolforge export --to int8` and `int4`.

`smolforge export --to hub` and `--to space`: a model with its card, out into the world.
"""

import inspect
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smolforge.errors import SettingError

if TYPE_CHECKING:
    from smolforge.exporters.quantize import Exported

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
    from smolforge.exporters.quantize import GROUP_SIZES, to_integers
    from smolforge.models.quantized import Scheme

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


def describing(model: str, name: str, licence: str, scores: Path | None) -> Callable[[Path], None]:
    """Writes the card of a MODEL into a folder."""
    from smolforge.comparison.figures import loss_curve
    from smolforge.exporters import model_card

    return partial(model_card.write, model=model, name=name, draw=loss_curve, licence=licence, told=scores)


def hub(
    model: str,
    repo: str,
    dtype: str | None,
    largest: int,
    describe: Callable[[Path], None],
    public: bool,
    replace: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Make the folder, checked by a round trip, and upload it; or only show it."""
    from smolforge.exporters.hub import check_name, check_token, upload
    from smolforge.exporters.transformers import to_transformers

    check_name(repo)
    if not dry_run:
        check_token(repo)
    with tempfile.TemporaryDirectory(prefix="smolforge-export-") as place:
        folder = Path(place) / repo.rpartition("/")[2]
        made = to_transformers(model, folder, dtype, largest, describe)
        done = None if dry_run else upload(folder, repo, public, replace)
        if json_:
            print(json.dumps(made.__dict__ | ({"url": done.url, "commit": done.commit} if done else {})))
            return
        show(made.files, repo)
        if done is None:
            print(f"\n{(folder / 'README.md').read_text('utf-8')}")
            print(f"nothing was sent: --dry-run; it would be {'public' if public else 'private'}")
        elif not done.changed:
            print(f"{done.url} has all of this already, at {done.commit[:12]}")
        else:
            print(f"{done.url} has it, {'private' if done.private else 'public'}, at {done.commit[:12]}")


def space(model: str, out: Path, dtype: str | None, licence: str, json_: bool) -> None:
    """Write the app, and say how to start it."""
    from smolforge.exporters.space import to_space

    files = to_space(model, out, dtype, licence)
    if json_:
        print(json.dumps({"files": files}))
        return
    show(files, out)
    print(f"cd {out} && pip install -r requirements.txt && python app.py")


def show(files: dict[str, int], below: Path | str) -> None:
    """A line a file."""
    for name, size in files.items():
        print(f"{size:>14,}  {below}/{name}")


GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_FOLDER = ("dtype", "max_shard_size", "license", "scores")
FLAGS = {
    "transformers": _FOLDER,
    "adapter": (),
    "gguf": ("type", "text"),
    "int8": ("embedding", "text"),
    "int4": ("group_size", "embedding", "text"),
    "hub": (*_FOLDER, "public", "replace", "dry_run"),
    "space": ("dtype", "license"),
}
"""What each form takes beside MODEL, --to, --out and --json."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    model: str,
    *,
    to: Literal["transformers", "adapter", "gguf", "int8", "int4", "hub", "space"],
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    type_: Annotated[GgufType, Parameter(name="--type")] = "f16",
    group_size: int | None = None,
    embedding: Literal["int8", "bfloat16"] = "int8",
    text: Path | None = None,
    license_: Annotated[str, Parameter(name="--license")] = "apache-2.0",
    scores: Path | None = None,
    public: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Hand a model on, checked by a round trip.

        smolforge export runs/mine --to gguf --type q8_0 --out mine.gguf

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints.
    to
        transformers: a clean folder that AutoModelForCausalLM loads, with tokenizer and chat template; it appears
        only if Transformers says the same with it, and has a card. adapter: what training with --lora.rank learned,
        for peft. gguf: one file for llama.cpp, with tokenizer and chat template; it appears only if it reads back as
        meant. int8 and int4: the weights as integers, in a folder that every command reads, with a table of size, loss
        and speed. hub: the clean folder, as a repository. space: an app to talk to it, here or on the Hub.
    out
        The folder to write, or the .gguf; it must not be there yet. Of hub: org/name.
    dtype
        float32, bfloat16 or float16; by default as the files have it.
    max_shard_size
        Largest weights file, as 500MB or 2GB; more than that is cut into several.
    type_
        Of a .gguf: how its matrices are kept. q8_0 and q4_0 are blocks of 32 with 8 and 4 bits a number.
    group_size
        Of int4: how many neighbouring weights share a scale, 32 or 64; by default 32.
    embedding
        Of int8 and int4: embedding and head as int8 too, or as they are, in bfloat16, which Transformers and vLLM read.
    text
        Of gguf, int8 and int4: a file to measure the loss on, before and after; by default int8 and int4 take what a
        run held out.
    license_
        What the card says of the licence, by the Hub's name for it. SmolLM2's own is apache-2.0.
    scores
        What `evaluate MODEL --json` printed, for the card; it has what was measured while training anyway.
    public
        Of hub: for everyone to see. Without it the repository is private.
    replace
        Of hub: let this take the place of other files there; the repository's history keeps them.
    dry_run
        Of hub: show files and card, and send nothing.
    json_
        Print files, max_abs_logit_diff and greedy_match as one JSON object.
    """
    _refuse_others(to, locals())
    largest = _bytes(max_shard_size)
    if to in ("int8", "int4"):
        quantize(model, 8 if to == "int8" else 4, out, group_size, embedding, text, json_)
        return
    if to == "adapter":
        _adapter(model, out, json_)
        return
    if to == "gguf":
        _gguf(model, out, type_, text, json_)
        return

    if to == "space":
        space(model, out, dtype, license_, json_)
        return
    describe = describing(model, str(out) if to == "hub" else out.resolve().name, license_, scores)
    if to == "hub":
        hub(model, str(out), dtype, largest, describe, public, replace, dry_run, json_)
        return
    from smolforge.exporters.transformers import to_transformers

    made = to_transformers(model, out, dtype, largest, describe)
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


def _refuse_others(to: str, given: dict[str, Any]) -> None:
    """A flag that says nothing of what is made was meant for something else."""
    for name, parameter in inspect.signature(export).parameters.items():
        flag = name.rstrip("_")
        needed = parameter.default is parameter.empty or flag == "json"
        if not needed and given[name] != parameter.default and flag not in FLAGS[to]:
            takes = ", ".join(f"--{each.replace('_', '-')}" for each in FLAGS[to]) or "no more than --out"
            raise SettingError(f"--{flag.replace('_', '-')} is not for --to {to}, which takes {takes}")


def _adapter(model: str, out: Path, json_: bool) -> None:
    from smolforge.exporters.transformers import to_adapter

    files, worst = to_adapter(model, out)
    if json_:
        print(json.dumps({"files": files, "max_abs_logit_diff": worst}))
        return
    for name, size in files.items():
        print(f"{size:>14,}  {out / name}")
    print(f"added to its base it says the same: logits within {worst:.1e}; PeftModel.from_pretrained takes it")


def _gguf(model: str, out: Path, kind: str, text: Path | None, json_: bool) -> None:
    from smolforge.data.prepare.documents import read_text
    from smolforge.exporters.gguf import to_gguf

    made = to_gguf(model, out, kind, None if text is None else read_text(text))
    if json_:
        print(json.dumps(made.__dict__))
        return
    print(f"{made.files[out.name]:>14,}  {out}")
    print("tensors: " + ", ".join(f"{count} in {name}" for name, count in made.tensors.items()))
    if made.max_abs_logit_diff == 0:
        print("read back it is the same model: every tensor and logit equal to the bit, and the same ids of text")
    else:
        print(
            f"read back it is what {made.type} keeps of the model: logits changed by up to "
            f"{made.max_abs_logit_diff:.1e}, the likeliest token the same in {made.top1_agreement:.1%} of places"
        )
    if made.loss is not None:
        before, after = made.loss
        print(f"loss on {text}: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")


def _bytes(size: str) -> int:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)([KMG]B|)", size.upper())
    if found is None or float(found[1]) * _UNITS[found[2]] < 1:
        raise SettingError(f"max-shard-size is {size!r}; it should be a size such as 500MB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])
