"""Check that the present tree computes what an earlier commit computed, bit for bit.

    python tests/same_as_before.py [--before COMMIT] [--now FOLDER] [--keep FOLDER]

    the earlier commit  -> the same commands on the same files -> FOLDER/old --+
    the present tree    -> the same commands on the same files -> FOLDER/new --+-> equal or DIFFERS, item by item

Both versions are used through the command line only, so names inside the package may change. The workload trains,
stops, resumes, tunes, exports, generates and evaluates small models, with one thread for each version. It takes about
four minutes on two cores. The exit code is 1 when a result differs or a command fails.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
from safetensors import deserialize

REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT = "e1a2559"
"""The last commit before names were changed."""

RENAMED_KEYS: dict[str, str] = {}
"""Key of JSON as the earlier commit writes it -> as it is written now."""

IGNORED_KEYS = frozenset(
    """
    tokens_per_second tokens_per_second_median prefill_tokens_per_second decode_tokens_per_second
    mfu mfu_full_attention seconds seconds_data seconds_forward seconds_backward seconds_optimizer seconds_other
    seconds_between seconds_left
    cpu_percent machine_cpu_percent memory_bytes peak_memory_bytes seen
    time commit versions packages
    sha256 README.md loss.png
    """.split()  # noqa: SIM905
)
"""Keys of JSON whose values change from run to run: speed, memory, dates and versions. sha256 is that of a file which
may hold an absolute path; the file itself is compared. The last two are sizes of files that are not compared."""

IGNORED_FILES = (".lock", "run.log", "events.out.tfevents.*", "*.md", "*.png")
"""Logs, cards and figures, which hold times and prose."""

EXPERTS = """
tokenizer = "nano"

[model]
model_type = "mixtral"
vocab_size = 512
hidden_size = 64
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 256
num_local_experts = 4

[data]
intra_document_masking = true
warn_epochs = "none"

[data.mixture.lines]
source = "documents.jsonl"
text_key = "content"
weight = 0.7

[data.mixture.text]
source = "text.txt"
weight = 0.3

[optim]
name = "adamw"
learning_rate = 3e-3

[train]
steps = 10
sequence_length = 128
batch_tokens = 512
micro_batch_size = 2
checkpoint_every = 10
evaluate_every = 5
sample_every = "none"
"""

SHORT = "--train.steps 20 --train.sequence-length 128 --train.batch-tokens 512 --train.micro-batch-size 2"
SHORT += " --train.checkpoint-every 10 --train.evaluate-every 10 --train.sample-every none --data.held-out 0.1"
PROMPT = "--prompt 'The model reads' --max-new-tokens 24 --temperature 0"

COMMANDS = {
    "corpus-prepared": "prepare documents.jsonl text.txt --out corpus --vocab-size 510 --text-key content"
    " --group-key source --deduplication minhash",
    "nano-started": "train nano --run nano --data.sources text.txt --tokenizer corpus/tokenizer"
    " --special-tokens '<|im_start|>,<|im_end|>' --model.vocab-size 512 --train.batch-tokens 1024"
    " --train.micro-batch-size 4 --train.checkpoint-every 20 --train.evaluate-every 20 --train.sample-every 20"
    " --optim.schedule.steps 60 --train.steps 30",
    "nano-resumed": "train nano/recipe.toml --run nano --train.steps 60",
    "nano-extended": "train nano/recipe.toml --run nano --train.steps 70",
    "lora": f"train nano-chat --run lora --init-from nano --data.sources chats.jsonl --lora.rank 4 {SHORT}",
    "dpo": "train smollm2-135m-dpo --run dpo --init-from nano --data.sources pairs.jsonl"
    f" --optim.learning-rate 1e-4 --optim.schedule.warmup-steps 0 {SHORT}",
    "experts": "train experts.toml --run experts",
    "chats-prepared": "prepare chats.jsonl --out chats --format chat --tokenizer nano",
    "adapter-exported": "export lora --to adapter --out adapter",
    "transformers-exported": "export nano --to transformers --out transformers",
    "q8_0-exported": "export nano --to gguf --type q8_0 --out q8_0.gguf",
    "f32-exported": "export nano --to gguf --type f32 --out f32.gguf",
    "int8-exported": "export nano --to int8 --out int8",
    "int4-exported": "export nano --to int4 --out int4",
    "nano-generated": f"generate nano {PROMPT}",
    "adapter-generated": f"generate adapter {PROMPT}",
    "int4-generated": f"generate int4 {PROMPT}",
    "q8_0-generated": f"generate q8_0.gguf {PROMPT}",
    "nano-evaluated": "evaluate nano --text held_out.txt --tasks items.jsonl",
}
"""Name -> command. What it prints, with --json, is kept as NAME.json. A later command may need an earlier one."""

OLD, NEW = "old", "new"
"""The result folders. Their names are equally long, and so are files that hold their paths."""

ABSENT = "(absent)"
DATE = 1_700_000_000
"""When every input was last changed: a corpus remembers it."""

WORDS = "the model reads a token and learns what follows another so it can say more of less when time goes on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the workload by both versions and print what differs. Return the exit code."""
    options = parse(arguments)
    with result_folder(options.keep) as root:
        run_workload({root / OLD: extract(options.before, root / "source"), root / NEW: options.now.resolve()})
        lines = list(report(root / OLD, root / NEW))
    print(*lines, sep="\n")
    return int(any(line.startswith("DIFFERS") for line in lines))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=COMMIT, metavar="COMMIT", help=f"the earlier version (default {COMMIT})")
    parser.add_argument("--now", type=Path, default=REPOSITORY, metavar="FOLDER", help="the later one")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder, to keep all results in")
    return parser.parse_args(arguments)


@contextmanager
def result_folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder of all results: a new one that stays, or a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="same-as-before-") as name:
            yield Path(name).resolve()


def has_commit(commit: str) -> bool:
    """Say whether the history of this repository has a commit."""
    command = ["git", "-C", str(REPOSITORY), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def extract(commit: str, folder: Path) -> Path:
    """Write the source and recipes of a commit into a folder. Return the folder."""
    if not has_commit(commit):
        raise SystemExit(f"{REPOSITORY} has no commit {commit}; a shallow clone gets it by `git fetch --unshallow`")
    command = ["git", "-C", str(REPOSITORY), "archive", commit, "src", "recipes"]
    archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


# The workload


def run_workload(trees: dict[Path, Path]) -> None:
    """Run all commands in each of the result folders, by the version in its source tree."""
    for folder, tree in trees.items():
        folder.mkdir()
        write_inputs(folder)
        check_source(tree, folder)
    with ThreadPoolExecutor(len(trees)) as pool:
        for name in COMMANDS:
            begin = time.perf_counter()
            list(pool.map(partial(run_command, name), trees.values(), trees))
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


def run_command(name: str, tree: Path, folder: Path) -> None:
    """Run one command in a folder, and keep what it prints."""
    printed = call(tree, folder, ["-m", "smolforge", *shlex.split(COMMANDS[name]), "--json"])
    (folder / f"{name}.json").write_text(printed, "utf-8")


def check_source(tree: Path, folder: Path) -> None:
    """Check that it is the tree's own package that runs, not one that is installed."""
    imported = Path(call(tree, folder, ["-c", "import smolforge; print(smolforge.__file__)"]).strip())
    if not imported.is_relative_to(tree / "src"):
        raise SystemExit(f"{imported} is imported in place of {tree / 'src'}")


def call(tree: Path, folder: Path, arguments: list[str]) -> str:
    """Run Python with a tree's package in a folder. Return what it prints; a failure ends the comparison."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(tree, folder), capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise SystemExit(f"{folder.name}: {shlex.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Return the variables of a command: one thread, no network, and nothing of the user's Hub folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "WANDB_"))}
    hub = {"HF_HOME": f"{folder}-hub", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return kept | hub | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_inputs(folder: Path) -> None:
    """Write the files that the commands read. They are the same each time, and so are their dates."""
    draw = random.Random(1)
    inputs = {
        "text.txt": "\n".join(sentences(draw, 4) for _ in range(500)),
        "held_out.txt": sentences(draw, 60),
        "documents.jsonl": json_lines(documents(draw)),
        "chats.jsonl": json_lines(conversation(draw) for _ in range(200)),
        "pairs.jsonl": json_lines(pair(draw) for _ in range(150)),
        "items.jsonl": json_lines(question(draw) for _ in range(20)),
        "experts.toml": EXPERTS,
    }
    for name, content in inputs.items():
        (folder / name).write_text(content, "utf-8")
        os.utime(folder / name, (DATE, DATE))


def sentences(draw: random.Random, count: int) -> str:
    """Return so many sentences of random words."""
    drawn = (" ".join(draw.choices(WORDS.split(), k=draw.randint(4, 12))) for _ in range(count))
    return " ".join(f"{sentence.capitalize()}." for sentence in drawn)


def documents(draw: random.Random) -> list[dict[str, Any]]:
    """Return documents in groups; each tenth is followed by a copy that has one more sentence."""
    rows = []
    for number in range(120):
        row = {"content": sentences(draw, draw.randint(8, 20)), "source": f"group {number % 30}"}
        rows.append(row)
        if number % 10 == 0:
            rows.append(row | {"content": f"{row['content']} {sentences(draw, 1)}"})
    return rows


def conversation(draw: random.Random) -> dict[str, Any]:
    """Return a conversation of one or two turns."""
    roles = ("user", "assistant") * draw.randint(1, 2)
    return {"messages": [{"role": role, "content": sentences(draw, 1)} for role in roles]}


def pair(draw: random.Random) -> dict[str, str]:
    """Return a prompt with a better and a worse answer."""
    return {key: sentences(draw, 1) for key in ("prompt", "chosen", "rejected")}


def question(draw: random.Random) -> dict[str, Any]:
    """Return a multiple-choice item."""
    choices = [f" {sentences(draw, 1)}" for _ in range(4)]
    return {"query": sentences(draw, 2), "choices": choices, "gold": draw.randrange(4)}


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as JSON, one a line."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


# The comparison


def report(old: Path, new: Path) -> Iterator[str]:
    """Yield one line an item of two result folders: that its files are equal, or each file that differs."""
    items = defaultdict(list)
    for path in sorted(files(old) | files(new)):
        items[path.parts[0]].append(path)
    for item, paths in items.items():
        differing = {path: text for path in paths if (text := difference(old / path, new / path, (old, new)))}
        yield from (f"DIFFERS  {path}: {text}" for path, text in differing.items())
        if not differing:
            yield f"equal    {item}" + (f" ({len(paths)} files)" if len(paths) > 1 else "")


def files(folder: Path) -> set[Path]:
    """Return the files below a folder that are to be compared, relative to it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if not any(path.match(pattern) for pattern in IGNORED_FILES)}


def difference(old: Path, new: Path, folders: tuple[Path, Path]) -> str:
    """Return how two files differ in a few words, or nothing where they are equal."""
    if not (old.is_file() and new.is_file()):
        return "only the old version wrote it" if old.is_file() else "only the new version wrote it"
    match new.suffix:
        case ".safetensors":
            return tensor_difference(old.read_bytes(), new.read_bytes())
        case ".json" | ".jsonl" | ".toml":
            values = (read_value(path, folder) for path, folder in zip((old, new), folders, strict=True))
            return value_difference(renamed(next(values)), next(values))
    return byte_difference(old.read_bytes(), new.read_bytes())


def tensor_difference(old: bytes, new: bytes) -> str:
    """Compare two safetensors files bit for bit."""
    if old == new:
        return ""
    before, after = dict(deserialize(old)), dict(deserialize(new))
    if before.keys() != after.keys():
        return f"tensor {min(before.keys() ^ after.keys())} is in one of them only"
    for name, tensor in before.items():
        for key in ("dtype", "shape"):
            if tensor[key] != after[name][key]:
                return f"{key} of {name}: {tensor[key]} -> {after[name][key]}"
        if tensor["data"] != after[name]["data"]:
            return f"tensor {name}: {byte_difference(tensor['data'], after[name]['data'])}"
    return "the tensors are equal, the header is not"


def byte_difference(old: bytes, new: bytes) -> str:
    """Compare two strings of bytes."""
    if old == new:
        return ""
    if len(old) != len(new):
        return f"{len(old)} bytes -> {len(new)}"
    unequal = np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)
    return f"{unequal.sum()} of {len(old)} bytes, first at {unequal.argmax()}"


def read_value(path: Path, folder: Path) -> Any:
    """Read JSON, lines of JSON or TOML; the result folder's own path is left out of it."""
    text = path.read_text("utf-8").replace(str(folder), "FOLDER")
    match path.suffix:
        case ".toml":
            return tomllib.loads(text)
        case ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line]
    return json.loads(text)


def renamed(value: Any) -> Any:
    """Return JSON of the earlier version with the present names of its keys."""
    match value:
        case dict():
            return {RENAMED_KEYS.get(key, key): renamed(inner) for key, inner in value.items()}
        case list():
            return [renamed(inner) for inner in value]
    return value


def value_difference(old: Any, new: Any, where: str = "") -> str:
    """Compare two values of JSON, and say where they first differ. Numbers must be equal to the last digit."""
    match old, new:
        case dict(), dict():
            pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in old | new}
            kept = {key: pair for key, pair in pairs.items() if key not in IGNORED_KEYS}
        case (list(), list()) if len(old) == len(new):
            kept = dict(enumerate(zip(old, new, strict=True)))
        case _:
            unequal = json.dumps(old) != json.dumps(new)  # which knows NaN, -0.0, and 1 from 1.0
            return f"{where.lstrip('.')}: {shortened(old)} -> {shortened(new)}" if unequal else ""
    return next((text for key, pair in kept.items() if (text := value_difference(*pair, f"{where}.{key}"))), "")


if __name__ == "__main__":
    sys.exit(main())
