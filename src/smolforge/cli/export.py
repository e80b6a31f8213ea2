"""`smolforge export`: write a model in another format, and check it by a round trip.

--to transformers, adapter     a folder for Transformers or peft
--to gguf                      one file for llama.cpp
--to int8, int4                a folder with quantized weights, and a table of size, loss and speed
--to hub, space                a repository with a model card, or a demo app
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from smolforge.cli.flags import Model
from smolforge.cli.table import print_result, progress_bar, table_lines
from smolforge.errors import ConfigError

if TYPE_CHECKING:
    from smolforge.evaluation.divergence import Comparison
    from smolforge.exporters.quantize import QuantizedExport

Result = tuple[dict[str, Any], list[str]]
"""What --json prints, and the lines for people, without the list of files."""
Target = Literal["transformers", "adapter", "gguf", "int8", "int4", "hub", "space"]
_FOLDER_FLAGS = ("dtype", "max_shard_size", "license_", "scores")
FLAGS_BY_TARGET: dict[Target, tuple[str, ...]] = {
    "transformers": _FOLDER_FLAGS,
    "adapter": (),
    "gguf": ("type_", "text", "calibrate"),
    "int8": ("embedding", "text"),
    "int4": ("group_size", "zero_point", "embedding", "text", "calibrate"),
    "hub": (*_FOLDER_FLAGS, "public", "replace", "dry_run"),
    "space": ("dtype", "license_"),
}
"""The flags of each target beside MODEL, --to, --out and --json."""
_SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
COST_ROWS = {
    "bytes_on_disk": ("weights on disk, bytes", ",.0f"),
    "tensor_bytes": ("  as arithmetic says", ",.0f"),
    "bytes_in_memory": ("weights in memory, bytes", ",.0f"),
}
PREDICTION_ROWS = {
    "loss": ("loss, nats a token", ".4f"),
    "bits_per_byte": ("bits a byte", ".4f"),
    "perplexity_ratio": ("perplexity, times before", ".4f"),
    "kl_divergence": ("KL divergence, nats a token", ".5f"),
    "top1_agreement": ("same likeliest token", ".2%"),
}
SPEED_ROWS = {
    "prefill_tokens_per_second": ("reading, tokens/s", ",.0f"),
    "decode_tokens_per_second": ("answering, tokens/s", ",.0f"),
}


@Parameter(name="*")
@dataclass(frozen=True)
class ExportFlags:
    """Flags that some targets take."""

    dtype: str | None = None
    """float32, bfloat16 or float16; by default as the files have it."""
    max_shard_size: str = "5GB"
    """Largest weights file, as 500MB or 2GB; more than that is cut into several."""
    type_: str = "f16"
    """Of a .gguf: how its matrices are kept: f32, f16, bf16, or q8_0, q5_1, q5_0, q4_1 and q4_0, which are blocks of 32
    with 8, 5 and 4 bits a number."""
    group_size: int | None = None
    """Of int4: how many neighbouring weights share a scale, 32 or 64; by default 32."""
    zero_point: bool = False
    """Of int4: whether each group also has an integer that stands for 0: nearer, for 4 bits a group."""
    calibrate: str | None = None
    """Of int4, and of gguf with --type q4_0 or q4_1: a text or a prepared corpus to choose the integers by (GPTQ; takes
    minutes), or none, for the nearest. By default int4 takes what the run trained on, and gguf none."""
    embedding: Literal["int8", "bfloat16"] = "int8"
    """Of int8 and int4: embedding and head as int8 too, or as they are, in bfloat16, which Transformers and vLLM read.
    """
    text: Path | None = None
    """Of gguf, int8 and int4: a file to measure the loss on, before and after; by default int8 and int4 take what a run
    held out."""
    license_: str = "apache-2.0"
    """What the card says of the licence, by the Hub's name for it. SmolLM2's own is apache-2.0."""
    scores: Path | None = None
    """What `evaluate MODEL --json` printed, for the card; it has what was measured while training anyway."""
    public: bool = False
    """Of hub: for everyone to see. Without it the repository is private."""
    replace: bool = False
    """Of hub: let this take the place of other files there; the repository's history keeps them."""
    dry_run: bool = False
    """Of hub: show files and card, and send nothing."""

    def check(self, to: Target) -> None:
        """Raise ConfigError for a flag that does not apply to a target."""
        for field in fields(self):
            if self.__dict__[field.name] != field.default and field.name not in FLAGS_BY_TARGET[to]:
                accepted = ", ".join(map(_flag, FLAGS_BY_TARGET[to])) or "no more than --out"
                raise ConfigError(f"{_flag(field.name)} is not for --to {to}, which takes {accepted}")

    @property
    def max_shard_bytes(self) -> int:
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)([KMG]B|)", self.max_shard_size.upper())
        size = int(float(match[1]) * _SIZE_UNITS[match[2]]) if match else 0
        if size < 1:
            raise ConfigError(f"max-shard-size is {self.max_shard_size!r}; it should be a size such as 500MB or 2GB")
        return size


def export(model: Model, *, to: Target, out: Path, flags: ExportFlags | None = None, json_: bool = False) -> None:
    """Hand a model on, checked by a round trip.

        smolforge export runs/mine --to gguf --type q8_0 --out mine.gguf

    Parameters
    ----------
    to
        transformers: a clean folder that AutoModelForCausalLM loads, with tokenizer and chat template; it appears
        only if Transformers says the same with it, and has a card. adapter: what training with --lora.rank learned,
        for peft. gguf: one file for llama.cpp, with tokenizer and chat template; it appears only if it reads back as
        meant. int8 and int4: the weights as integers, in a folder that every command reads, with a table of size, loss
        and speed. hub: the clean folder, as a repository. space: an app to talk to it, here or on the Hub.
    out
        The folder to write, or the .gguf; it must not be there yet. Of hub: org/name.
    json_
        Print files, max_abs_logit_diff and greedy_match as one JSON object.
    """
    flags = flags or ExportFlags()
    flags.check(to)
    writers: dict[Target, Callable[[str, Path, ExportFlags], Result]] = {
        "transformers": _to_transformers,
        "adapter": _to_adapter,
        "gguf": _to_gguf,
        "int8": partial(_to_quantized, bits=8),
        "int4": partial(_to_quantized, bits=4),
        "hub": _to_hub,
        "space": _to_space,
    }
    result, lines = writers[to](model, out, flags)
    folder = out.parent if to == "gguf" else out
    files = [f"{size:>14,}  {folder / name}" for name, size in result["files"].items()]
    print_result(result, [*files, *lines], as_json=json_)


def _flag(name: str) -> str:
    return f"--{name.rstrip('_').replace('_', '-')}"


def _to_transformers(model: str, out: Path, flags: ExportFlags, *, name: str | None = None) -> Result:
    """Write a folder whose card has the given name, by default the folder's own."""
    from smolforge.comparison.figures import draw_loss_curve
    from smolforge.exporters.model_card import write_model_card
    from smolforge.exporters.transformers import to_transformers

    describe = partial(
        write_model_card,
        model=model,
        name=name or out.resolve().name,
        draw=draw_loss_curve,
        license_id=flags.license_,
        scores_path=flags.scores,
    )
    exported = to_transformers(model, out, flags.dtype, max_shard_bytes=flags.max_shard_bytes, describe=describe)
    check = f"logits within {exported.max_abs_logit_diff:.1e}, greedy text equal"
    rounding = f"; rounding to {exported.dtype} changed them by {exported.rounding_logit_diff:.1e}"
    note = rounding if exported.rounding_logit_diff else ""
    return asdict(exported), [f"Transformers loads it and says the same: {check}{note}"]


def _to_adapter(model: str, out: Path, flags: ExportFlags) -> Result:
    from smolforge.exporters.transformers import to_adapter

    files, diff = to_adapter(model, out)
    check = f"added to its base it says the same: logits within {diff:.1e}; PeftModel.from_pretrained takes it"
    return {"files": files, "max_abs_logit_diff": diff}, [check]


def _to_gguf(model: str, out: Path, flags: ExportFlags) -> Result:
    from smolforge.exporters.gguf import to_gguf
    from smolforge.exporters.texts import NO_TEXT

    calibrate = NO_TEXT if flags.calibrate is None else flags.calibrate
    exported = to_gguf(model, out, flags.type_, text=flags.text, calibrate=calibrate, progress=progress_bar)
    lines = ["tensors: " + ", ".join(f"{count} in {name}" for name, count in exported.tensors.items())]
    if exported.max_abs_logit_diff == 0:
        lines.append(
            "read back it is the same model: every tensor and logit equal to the bit, and the same ids of text"
        )
    else:
        lines.append(
            f"read back it is what {exported.type} keeps of the model: logits changed by up to "
            f"{exported.max_abs_logit_diff:.1e}, "
            f"the likeliest token the same in {exported.top1_agreement:.1%} of places"
        )
    if exported.calibration is not None:
        lines.append(f"integers chosen by {exported.calibration}")
    if exported.comparison is not None:
        lines += comparison_lines(exported.comparison, PREDICTION_ROWS)
    return asdict(exported), lines


def _to_quantized(model: str, out: Path, flags: ExportFlags, *, bits: Literal[8, 4]) -> Result:
    from smolforge.exporters.quantize import GROUP_SIZES, to_quantized
    from smolforge.models.quantized import QuantizationScheme

    size = None if bits == 8 else GROUP_SIZES[0] if flags.group_size is None else flags.group_size
    if size is not None and size not in GROUP_SIZES:
        raise ConfigError(f"group-size is {size}; it should be {' or '.join(map(str, GROUP_SIZES))}")
    scheme = QuantizationScheme(bits, size, flags.embedding == "int8", zero_point=flags.zero_point)
    exported = to_quantized(model, out, scheme, text=flags.text, calibrate=flags.calibrate, progress=progress_bar)
    lines = quantization_lines(exported)
    if exported.calibration is not None:
        lines.append(f"integers chosen by {exported.calibration_tokens:,} tokens of {exported.calibration}")
    if flags.embedding == "int8":
        lines.append(
            "read by smolforge; --embedding bfloat16 leaves the embedding, so that Transformers and vLLM read it too"
        )
    return asdict(exported), lines


def quantization_lines(exported: "QuantizedExport") -> list[str]:
    """Return the table of the model before and after, and what became slower."""
    before, after = vars(exported.before), vars(exported.after)
    slower = [
        f"slower here than before: {label.partition(',')[0]}"
        for name, (label, _) in SPEED_ROWS.items()
        if after[name] < before[name]
    ]
    rows = COST_ROWS | PREDICTION_ROWS | SPEED_ROWS
    return comparison_lines(exported, rows) + slower


def comparison_lines(compared: "QuantizedExport | Comparison", rows: dict[str, tuple[str, str]]) -> list[str]:
    """Return a title and a table of two sides; the last column is the change, where there is more than the number."""
    changes = {"loss": "{:+.2%}", "bits_per_byte": "{:+.2%}"} | dict.fromkeys(COST_ROWS | SPEED_ROWS, "x {:.2f}")
    cells = []
    for name, (label, spec) in rows.items():
        sides = vars(compared.before)[name], vars(compared.after)[name]
        relative = sides[1] / sides[0] - (name in PREDICTION_ROWS) if name in changes else 0.0
        cells.append((label, *(f"{side:{spec}}" for side in sides), changes.get(name, "").format(relative)))
    return [f"{compared.tokens:,} tokens of {compared.text}", *table_lines(cells, ("", "before", "after", ""))]


def _to_hub(model: str, out: Path, flags: ExportFlags) -> Result:
    """Write the folder, check it by a round trip, and upload it; with `dry_run` only show it."""
    from smolforge.exporters.hub import check_repo_name, check_token, upload

    repo = str(out)
    check_repo_name(repo)
    if not flags.dry_run:
        check_token(repo)
    with tempfile.TemporaryDirectory(prefix="smolforge-export-") as temp_dir:
        folder = Path(temp_dir) / out.name
        result, _ = _to_transformers(model, folder, flags, name=repo)
        if flags.dry_run:
            who = "public" if flags.public else "private"
            card = (folder / "README.md").read_text("utf-8")
            return result, [f"\n{card}", f"nothing was sent: --dry-run; it would be {who}"]
        uploaded = upload(folder, repo, flags.public, replace=flags.replace)
    has = f"it, {'private' if uploaded.private else 'public'}," if uploaded.changed else "all of this already,"
    result |= {"url": uploaded.url, "commit": uploaded.commit}
    return result, [f"{uploaded.url} has {has} at {uploaded.commit[:12]}"]


def _to_space(model: str, out: Path, flags: ExportFlags) -> Result:
    from smolforge.exporters.space import to_space

    files = to_space(model, out, flags.dtype, license_id=flags.license_)
    return {"files": files}, [f"cd {out} && pip install -r requirements.txt && python app.py"]
