"""`smolforge export`: write a model in another format, and check it by a round trip.

--to transformers, adapter     a folder for Transformers or peft
--to gguf                      one file for llama.cpp
--to int8, int4                a folder with quantized weights, and a table of size, loss and speed
--to hub, space                a repository with a model card, or a demo app
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

from smolforge.errors import ConfigError

if TYPE_CHECKING:
    from smolforge.exporters.quantize import QuantizedExport

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_FOLDER_FLAGS = ("dtype", "max_shard_size", "license", "scores")
FLAGS_BY_TARGET = {
    "transformers": _FOLDER_FLAGS,
    "adapter": (),
    "gguf": ("type", "text"),
    "int8": ("embedding", "text"),
    "int4": ("group_size", "embedding", "text"),
    "hub": (*_FOLDER_FLAGS, "public", "replace", "dry_run"),
    "space": ("dtype", "license"),
}
"""The flags of each target beside MODEL, --to, --out and --json."""
_SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
QUANTIZATION_ROWS = {
    "bytes_on_disk": "weights on disk, bytes",
    "tensor_bytes": "  as arithmetic says",
    "bytes_in_memory": "weights in memory, bytes",
    "loss": "loss, nats a token",
    "bits_per_byte": "bits a byte",
    "top1_agreement": "same likeliest token",
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "answering, tokens/s",
}


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
    _check_flags(to, locals())
    max_shard_bytes = _parse_size(max_shard_size)
    if to in ("int8", "int4"):
        export_quantized(
            model, 8 if to == "int8" else 4, out, group_size=group_size, embedding=embedding, text=text, json_=json_
        )
        return
    if to == "adapter":
        _export_adapter(model, out, json_)
        return
    if to == "gguf":
        _export_gguf(model, out, type_, text=text, json_=json_)
        return

    if to == "space":
        export_space(model, out, dtype, license_id=license_, json_=json_)
        return
    write_card = card_writer(model, str(out) if to == "hub" else out.resolve().name, license_, scores=scores)
    if to == "hub":
        export_to_hub(
            model,
            str(out),
            dtype,
            max_shard_bytes=max_shard_bytes,
            write_card=write_card,
            public=public,
            replace=replace,
            dry_run=dry_run,
            json_=json_,
        )
        return
    from smolforge.exporters.transformers import to_transformers

    exported = to_transformers(model, out, dtype, max_shard_bytes=max_shard_bytes, describe=write_card)
    if json_:
        print(json.dumps(exported.__dict__))
        return
    for name, size in exported.files.items():
        print(f"{size:>14,}  {out / name}")
    rounding_note = f"; rounding to {exported.dtype} changed them by {exported.rounding_logit_diff:.1e}"
    print(
        f"Transformers loads it and says the same: logits within {exported.max_abs_logit_diff:.1e}, greedy text equal"
        + (rounding_note if exported.rounding_logit_diff else "")
    )


def _check_flags(to: str, arguments: dict[str, Any]) -> None:
    """Raise ConfigError for a flag that does not apply to this target."""
    for name, parameter in inspect.signature(export).parameters.items():
        flag = name.rstrip("_")
        always_allowed = parameter.default is parameter.empty or flag == "json"
        if not always_allowed and arguments[name] != parameter.default and flag not in FLAGS_BY_TARGET[to]:
            accepted = (
                ", ".join(f"--{option.replace('_', '-')}" for option in FLAGS_BY_TARGET[to]) or "no more than --out"
            )
            raise ConfigError(f"--{flag.replace('_', '-')} is not for --to {to}, which takes {accepted}")


def _parse_size(size: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)([KMG]B|)", size.upper())
    if match is None or float(match[1]) * _SIZE_UNITS[match[2]] < 1:
        raise ConfigError(f"max-shard-size is {size!r}; it should be a size such as 500MB or 2GB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _export_adapter(model: str, out: Path, json_: bool) -> None:
    from smolforge.exporters.transformers import to_adapter

    files, max_abs_logit_diff = to_adapter(model, out)
    if json_:
        print(json.dumps({"files": files, "max_abs_logit_diff": max_abs_logit_diff}))
        return
    for name, size in files.items():
        print(f"{size:>14,}  {out / name}")
    print(
        f"added to its base it says the same: logits within {max_abs_logit_diff:.1e}; "
        "PeftModel.from_pretrained takes it"
    )


def _export_gguf(model: str, out: Path, kind: str, *, text: Path | None, json_: bool) -> None:
    from smolforge.data.prepare.documents import read_text
    from smolforge.exporters.gguf import to_gguf

    exported = to_gguf(model, out, kind, text=None if text is None else read_text(text))
    if json_:
        print(json.dumps(exported.__dict__))
        return
    print(f"{exported.files[out.name]:>14,}  {out}")
    print("tensors: " + ", ".join(f"{count} in {name}" for name, count in exported.tensors.items()))
    if exported.max_abs_logit_diff == 0:
        print("read back it is the same model: every tensor and logit equal to the bit, and the same ids of text")
    else:
        print(
            f"read back it is what {exported.type} keeps of the model: logits changed by up to "
            f"{exported.max_abs_logit_diff:.1e}, "
            f"the likeliest token the same in {exported.top1_agreement:.1%} of places"
        )
    if exported.loss is not None:
        before, after = exported.loss
        print(f"loss on {text}: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")


def export_quantized(
    model: str,
    bits: Literal[8, 4],
    out: Path,
    *,
    group_size: int | None,
    embedding: str,
    text: Path | None,
    json_: bool,
) -> None:
    """Write a folder with quantized weights and print the table."""
    from smolforge.exporters.quantize import GROUP_SIZES, to_quantized
    from smolforge.models.quantized import QuantizationScheme

    size = None if bits == 8 else GROUP_SIZES[0] if group_size is None else group_size
    if size is not None and size not in GROUP_SIZES:
        raise ConfigError(f"group-size is {size}; it should be {' or '.join(map(str, GROUP_SIZES))}")
    exported = to_quantized(model, out, QuantizationScheme(bits, size, embedding == "int8"), text=text)
    if json_:
        print(json.dumps(asdict(exported)))
        return
    for name, num_bytes in exported.files.items():
        print(f"{num_bytes:>14,}  {out / name}")
    for line in quantization_lines(exported):
        print(line)
    if embedding == "int8":
        print("read by smolforge; --embedding bfloat16 leaves the embedding, so that Transformers and vLLM read it too")


def quantization_lines(exported: "QuantizedExport") -> list[str]:
    """Return the table of the model before and after; the last column is the change."""
    table = [f"{exported.tokens:,} tokens of {exported.text}", f"{'':<26}{'before':>14}{'after':>14}{'':>10}"]
    for name, label in QUANTIZATION_ROWS.items():
        before, after = exported.before.__dict__[name], exported.after.__dict__[name]
        digits = ".4f" if name in ("loss", "bits_per_byte") else ".2%" if name == "top1_agreement" else ",.0f"
        change = f"{after / before - 1:+.2%}" if digits == ".4f" else f"x {after / before:.2f}"
        table.append(f"{label:<26}{before:>14{digits}}{after:>14{digits}}{'' if digits == '.2%' else change:>10}")
    rates = [name for name in QUANTIZATION_ROWS if name.endswith("per_second")]
    slower = [
        QUANTIZATION_ROWS[name] for name in rates if exported.after.__dict__[name] < exported.before.__dict__[name]
    ]
    return [*table, *(f"slower here than before: {rate.partition(',')[0]}" for rate in slower)]


def card_writer(model: str, name: str, license_id: str, *, scores: Path | None) -> Callable[[Path], None]:
    """Return a function that writes the model's card into a folder."""
    from smolforge.comparison.figures import draw_loss_curve
    from smolforge.exporters import model_card

    return partial(
        model_card.write_model_card,
        model=model,
        name=name,
        draw=draw_loss_curve,
        license_id=license_id,
        scores_path=scores,
    )


def export_to_hub(
    model: str,
    repo: str,
    dtype: str | None,
    *,
    max_shard_bytes: int,
    write_card: Callable[[Path], None],
    public: bool,
    replace: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Write the folder, check it by a round trip, and upload it; with `dry_run` only show it."""
    from smolforge.exporters.hub import check_repo_name, check_token, upload
    from smolforge.exporters.transformers import to_transformers

    check_repo_name(repo)
    if not dry_run:
        check_token(repo)
    with tempfile.TemporaryDirectory(prefix="smolforge-export-") as temp_dir:
        folder = Path(temp_dir) / repo.rpartition("/")[2]
        exported = to_transformers(model, folder, dtype, max_shard_bytes=max_shard_bytes, describe=write_card)
        uploaded = None if dry_run else upload(folder, repo, public, replace=replace)
        if json_:
            print(
                json.dumps(exported.__dict__ | ({"url": uploaded.url, "commit": uploaded.commit} if uploaded else {}))
            )
            return
        print_files(exported.files, repo)
        if uploaded is None:
            print(f"\n{(folder / 'README.md').read_text('utf-8')}")
            print(f"nothing was sent: --dry-run; it would be {'public' if public else 'private'}")
        elif not uploaded.changed:
            print(f"{uploaded.url} has all of this already, at {uploaded.commit[:12]}")
        else:
            print(f"{uploaded.url} has it, {'private' if uploaded.private else 'public'}, at {uploaded.commit[:12]}")


def export_space(model: str, out: Path, dtype: str | None, *, license_id: str, json_: bool) -> None:
    """Write the demo app and print how to start it."""
    from smolforge.exporters.space import to_space

    files = to_space(model, out, dtype, license_id=license_id)
    if json_:
        print(json.dumps({"files": files}))
        return
    print_files(files, out)
    print(f"cd {out} && pip install -r requirements.txt && python app.py")


def print_files(files: dict[str, int], folder: Path | str) -> None:
    """Print one line per file: size and path."""
    for name, size in files.items():
        print(f"{size:>14,}  {folder}/{name}")
