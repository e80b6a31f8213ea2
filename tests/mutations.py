"""Recipes and command lines as accidents and people spoil them: each is refused in one sentence, whatever was done.

`python tests/mutations.py 5000` tries as many; each follows from its number alone. Nothing is ever trained: train is
given only what is certainly wrong, and a folder for its run that belongs to something else.
"""

import contextlib
import datetime
import io
import json
import os
import random as randomness
import string
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from smolforge import cli
from smolforge.config import Recipe
from smolforge.config.base import fields, leaves, set_dotted

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
RECIPES = [path for path in SHIPPED if "init_from" not in path.read_text()]  # others ask the Hub for their shape
SECONDS, LONGEST = 2, 1250
JARGON = ("Traceback", "Input should be", "type=", "For further information", "should not have happened", "unable to")
TABLES = ("data.mixture", "data.stages")
"""Settings with settings in them, whose sentences test_mixture.py has."""
FIELDS = {name: field.annotation for name, field in fields(Recipe) if name not in TABLES}
GROUPS = ["model", "data", "optim", "optim.schedule", "train", "sample"]

Random = randomness.Random
Make = Callable[[Random], "Case"]


@dataclass(frozen=True)
class Case:
    """A command line, what it may end with (2 alone: it is certainly wrong), and what a refusal must name."""

    words: tuple[str, ...]
    codes: tuple[int, ...] = (2,)
    names: tuple[str, ...] = ()


def mutations(count: int, first: int = 0) -> str:
    """Try so many. Raises AssertionError at the first that is not refused as it should be; returns the counts."""
    codes: Counter[int] = Counter()
    with workplace():
        call(("inspect", "nano", "--train.steps", "x"))  # so that imports count for nobody
        for number in range(first, first + count):
            case = made(number)
            code, out, err, seconds = call(case.words)
            wrong = complaint(case, code, out, err, seconds)
            assert not wrong, f"mutation {number}: {wrong}\n{[word[:200] for word in case.words]} -> {code}: {err}"
            codes[code] += 1
    others = "".join(f"{codes[code]:,} with exit {code}, " for code in sorted(codes) if code not in (0, 2))
    return (
        f"mutations: {count:,} recipes and command lines, {codes[2]:,} refused with exit 2 and one sentence, {others}"
        f"{codes[0]:,} valid, 0 tracebacks"
    )


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A folder to be in, with one in it that no run may have."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("taken").mkdir()
        Path("taken", "letters.txt").touch()
        yield


def made(number: int) -> Case:
    """The case of a number; its file, where it has one, lies in the present folder."""
    random = Random(number)
    return random.choices(list(KINDS), list(KINDS.values()))[0](random)


def call(words: tuple[str, ...]) -> tuple[int, str, str, float]:
    """(exit code, standard output, standard error, processor seconds)"""
    out, err, begun = io.StringIO(), io.StringIO(), time.thread_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(words)
    return code, out.getvalue(), err.getvalue(), time.thread_time() - begun


def complaint(case: Case, code: int, out: str, err: str, seconds: float) -> str | None:
    """What is wrong with the answer, if anything is."""
    line = err.removesuffix("\n")
    problems = {
        f"exit {code} instead of {case.codes}": code not in case.codes,
        f"it took {seconds:.1f} s": seconds > SECONDS,
        "it is jargon": any(word in err for word in JARGON),
        "a valid one is silent on standard error": code == 0 and err,
        "a refused one is silent on standard output": code != 0 and out,
        "it is no single line for people": code != 0 and not (line.startswith("smolforge: ") and line.isprintable()),
        "it is too long": len(line) > LONGEST,
        "it would have been trained": "is not a run folder" in err,
        f"it should name {case.names}": code != 0 and any(name not in line for name in case.names),
    }
    return next((problem for problem, found in problems.items() if found), None)


# Where they come from


def shipped(random: Random) -> dict[str, Any]:
    """The tree of a recipe that is right."""
    return tomllib.loads(random.choice(RECIPES).read_text("utf-8"))


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def dump(random: Random, tree: dict[str, Any]) -> Path:
    """A file with a tree, in one of the formats that can say it."""
    ways = [(".toml", tomli_w.dumps), (".yaml", yaml.safe_dump), (".json", json.dumps)]
    for suffix, dumps in random.sample(ways, 3):
        with contextlib.suppress(TypeError):
            return write(f"recipe{suffix}", dumps(tree))
    raise AssertionError(f"no format for {tree}")


def asked(random: Random, path: Path | str, *more: str) -> tuple[str, ...]:
    """A command line with a recipe that is certainly wrong."""
    run = random.choice([("inspect",), ("train", "--run", "taken")])
    return (run[0], str(path), *run[1:], *more)


def misspelt(random: Random, word: str) -> str:
    """A word with one slip of the fingers: two letters swapped, one left out, doubled or another."""
    at = random.randrange(len(word) - 1)
    a, b = word[at], word[at + 1]
    slips = [b + a, b, a + a + b, random.choice(string.ascii_lowercase) + b]
    return word[:at] + random.choice(slips) + word[at + 2 :]


def kind_of(annotation: Any) -> type:
    """The plain type that wrong values of a setting are chosen for: float of `PositiveInt | Share | None`."""
    said = str(annotation)
    return next(kind for kind in (tuple, bool, float, int, str) if kind.__name__ in said or kind is str)


# Recipes

DATE = datetime.date(2024, 2, 29)
NO_NUMBERS = ["many", "", "1e", [], [1], {}, {"a": 1}, True, False, float("nan"), float("inf"), -1, DATE, "x" * 5000]
WRONG: dict[type, list[Any]] = {
    tuple: [5, 0.5, True, {}, {"a": "b"}, [[1]], [{}], [1, [2]], DATE, "one", ""],
    bool: ["maybe", "", 5, -1, 0.5, [], [True], {}, DATE],
    float: NO_NUMBERS,
    int: [*NO_NUMBERS, 1.5, 2**70, 10**400, -(2**70)],
    str: [5, 0.5, True, [], ["a"], {}, {"a": "b"}, DATE],
    dict: [5, 0.5, True, "", "text", [], [1], [{}], DATE],
}


def wrong_type(random: Random) -> Case:
    tree, name = shipped(random), random.choice(list(FIELDS))
    set_dotted(tree, name, random.choice(WRONG[kind_of(FIELDS[name])]))
    path = dump(random, tree)
    return Case(asked(random, path), names=(f"{path}: {name} ", "it should be "))


def wrong_group(random: Random) -> Case:
    tree, name = shipped(random), random.choice(GROUPS)
    set_dotted(tree, name, random.choice(WRONG[dict]))
    path = dump(random, tree)
    return Case(asked(random, path), names=(f"{path}: {name}",))


def misspelt_key(random: Random) -> Case:
    """A setting with its right value under nearly its name."""
    tree, name = shipped(random), random.choice([*FIELDS, *GROUPS])
    group, _, last = name.rpartition(".")
    slip = misspelt(random, last)
    dotted = f"{group}.{slip}" if group else slip
    if dotted in [*FIELDS, *GROUPS, "model.preset"]:
        return misspelt_key(random)
    value = {} if name in GROUPS else leaves(Recipe())[name]
    set_dotted(tree, dotted, "none" if value is None else list(value) if isinstance(value, tuple) else value)
    path = dump(random, tree)
    return Case(asked(random, path), names=(f"{path}: there is no setting '{dotted}'. Did you mean ",))


CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"train.sequence_length": 100, "train.batch_tokens": 1050}, ("batch_tokens (1050)", "sequence_length (100)")),
    ({"model.hidden_size": 100, "model.num_attention_heads": 7}, ("hidden_size (100)", "num_attention_heads (7)")),
    (
        {"model.hidden_size": 576, "model.num_attention_heads": 6, "model.num_key_value_heads": 4},
        ("num_attention_heads (6)", "num_key_value_heads (4)"),
    ),
    ({"model.head_dim": 7}, ("head_dim (7)", "even")),
    (
        {"train.sequence_length": 128, "train.batch_tokens": 128, "model.max_position_embeddings": 64},
        ("train.sequence_length (128)", "model.max_position_embeddings (64)"),
    ),
    (
        {"optim.schedule": {"steps": 1000, "warmup_steps": 900, "decay_steps": 200}},
        ("warmup_steps (900)", "decay_steps (200)", "1000 steps"),
    ),
    (
        {"optim.schedule.final_learning_rate": 0.5, "optim.learning_rate": 0.1},
        ("final_learning_rate (0.5)", "optim.learning_rate (0.1)"),
    ),
    (
        {"model.model_type": "mixtral", "model.num_local_experts": 2, "model.num_experts_per_tok": 3},
        ("num_experts_per_tok (3)", "num_local_experts (2)"),
    ),
    ({"model.model_type": "starcoder2", "model.rms_norm_eps": 0.5}, ("rms_norm_eps", "starcoder2")),
    ({"model.hidden_act": "gelu_pytorch_tanh"}, ("hidden_act", "silu")),
    ({"model.preset": "smollm2-135n"}, ("model.preset", "'smollm2-135n'", "Did you mean smollm2-135m?")),
    ({"model": "smollm"}, ("model.preset", "'smollm'")),
    ({"model": {"preset": [1]}}, ("model.preset", "'[1]'")),
]
"""Values that are right one by one, and what the sentence must say of them."""


def contradiction(random: Random) -> Case:
    tree, (changes, names) = shipped(random), random.choice(CONTRADICTIONS)
    for name, value in changes.items():
        set_dotted(tree, name, value)
    path = dump(random, tree)
    return Case(asked(random, path), names=(f"{path}: ", *names))


def spoilt(random: Random) -> Case:
    """A file with bytes lost, added or changed; some are still recipes."""
    path = dump(random, shipped(random))
    content = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(content) + 1)
        piece = random.choice(['"', "'", *"[]{}=:,.#\n\t -&*!|>%@0", chr(random.randrange(256))]).encode("latin-1")
        match random.choice(["cut", "insert", "delete", "replace", "repeat"]):
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = piece
            case "delete":
                del content[at : at + random.randint(1, 9)]
            case "replace":
                content[at : at + 1] = piece
            case "repeat":
                content += content[at : at + 200]
    path.write_bytes(content)
    return Case(("inspect", str(path)), (0, 2), (str(path),))


def other_encoding(random: Random) -> Case:
    """Right recipes as other programs save them: a BOM and CRLF are understood, UTF-16 and Latin-1 are not."""
    path = dump(random, shipped(random))
    text = path.read_text("utf-8")
    match random.choice(["bom", "crlf", "utf-16", "latin-1", "nul"]):
        case "bom":
            path.write_bytes(b"\xef\xbb\xbf" + text.encode())
            return Case(("inspect", str(path)), (0,))
        case "crlf":
            path.write_bytes(text.replace("\n", "\r\n").encode())
            return Case(("inspect", str(path)), (0,))
        case "utf-16":
            path.write_bytes(text.encode("utf-16"))
        case "latin-1":
            path.write_bytes(text.replace("a", "ä", 1).encode("latin-1"))
        case "nul":
            at = random.randrange(len(text))
            path.write_text(f"{text[:at]}\0{text[at:]}", "utf-8")
    return Case(asked(random, path), names=(f"{path} cannot be read: ",))


DEEP, BLANK = "[" * 60_000, " " * (3 << 20)
ALIASES = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{f'*{a},' * 9}]}}\n" for a, b in ("ab", "bc", "cd", "de", "ef"))
HOSTILE: dict[str, list[str]] = {
    "toml": [
        *(f"seed = {DEEP}", f"seed = {'[' * 99}{']' * 99}", BLANK, "seed = 1\nseed = 2", "[train]\n[train]"),
        *(f"{'a.' * many}b = 1" for many in (200, 900, 60_000)),
        *(f"seed = 0x{'f' * many}" for many in (30, 5000, 100_000)),
        *(f'"{key}" = 1' for key in ("a\\nb", "\\u001b[31m", "\\u202e", "x" * 9999, "", "train.steps")),
    ],
    "yaml": [
        *(
            f"seed: {DEEP}",
            f"seed: {'[' * 99}{']' * 99}",
            BLANK,
            "",
            "null",
            "[]",
            "5",
            "text",
            "- [1]",
            "seed: 1\nseed: 2",
        ),
        *(
            ALIASES,
            "train: &a\n  steps: *a",
            "&a\ntrain: *a",
            "seed: *a",
            "seed: 1\n---\nseed: 2",
            f"seed: {'1' * 9999}",
        ),
        *(f"seed: {tag} [id]" for tag in ("!!python/object/apply:os.system", "!!set", "!x", "!!binary")),
        *(f"seed: {text}" for text in ("2020-13-41", "0001-01-01 00:00:00+10:00", f"{'1:' * 999}1.5")),
        *(f"{key}: 2" for key in ("1", "null", "yes", "[1]", "{a: 1}", "? [1]\n", "<<", "2020-01-01")),
    ],
    "json": [
        *('{"train":' * depth + "1" + "}" * depth for depth in (50, 900, 12_000)),
        *(f'{{"seed": {DEEP}', BLANK, "", "null", "[]", "5", '"text"', "[[1]]", f'{{"seed": {"1" * 9999}}}'),
        *(
            '{"seed": 1, "seed": 2}',
            '{"train": {"steps": 1, "steps": 2}}',
            '{"\\ud800": 1}',
            '{"tokenizer": "\\ud800"}',
        ),
    ],
}
"""Files that somebody made to be hard to read."""


def hostile(random: Random) -> Case:
    suffix = random.choice(list(HOSTILE))
    path = write(f"hostile.{suffix}", random.choice(HOSTILE[suffix]))
    return Case(asked(random, path), names=(str(path),))


def no_file(random: Random) -> Case:
    """What may stand where a recipe should be."""
    targets = ["/dev/zero", "/dev/null", "nowhere", "odd.toml"]
    refusing = ["unreadable"] if os.geteuid() else []  # root reads everything
    path, kind = Path("odd.toml"), random.choice(["nothing", "folder", "pipe", *refusing, *targets])
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    match kind:
        case "nothing":
            pass
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "unreadable":
            path.touch(0)
        case target:
            path.symlink_to(target)
    words = ("train", str(path), "--run", "taken") if kind == "folder" else asked(random, path)  # inspect takes folders
    return Case(words, names=(str(path),))


def odd_name(random: Random) -> Case:
    """A recipe that is right, or wrong, in a file with a name that is hard to say."""
    name = random.choice(["a\nb", "\x1b[31m", "\u202e", "\udcff", "ä", "x" * 240, "-", " ", "'", "{}", "%s"])
    path, right = Path(f"{name}.json"), random.random() < 0.5
    path.write_text("{}" if right else '{"seeed": 1}', "utf-8")
    word = f"./{path}"
    return Case(("inspect", word), (0,)) if right else Case(asked(random, word), names=("'seeed'. Did you mean seed?",))


# Command lines

TEXTS = {
    tuple: ["[", "[a", "[[1]]", "[1]", "[{a=1}]", "[0.9,"],
    bool: ["maybe", "5", "", "-1", "\0"],
    float: ["fast", "", "-1", "nan", "inf", "1e999", "0x1", "1,5", "٣", "--1", "\ud800", "9" * 5000],
    int: ["many", "", "-1", "1.5", "nan", "1e3", "0x1", "1,000", "٣", "--5", "\0", "\ud800", "9" * 30, "9" * 5000],
}
"""What a flag may not be given, by its kind."""
ODD = [
    "-", "---", "--=", "--=5", "--train.", "--.steps", "--train..steps=1", "--train=5", "--train", "—train.steps", "-x",
    "-xyz", "--model=[1]", "--model=", "--model.preset=", "=", "{}", "%s", "nano", "٣", "--no-json", "--json=",
    "--help=5", "--budget=", "--budget=5x", "--train.device=x", "--prompt=x", "--out=x", "--against=golden",
    "--temperature=1", "--to=transformers", "", "\0", "--\0", "a\nb", "\ud800", "--\ud800=1", "\x1b[31m", "--\x1b[31m",
    "--json=5", "--fresh=5", "\u202e", "x" * 5000, "--" + "x" * 100_000, "--data.sources=" + "[" * 50_000,
    "--budget=" + "9" * 400 + "M-tokens",
]  # fmt: skip
"""Words that nothing can be meant by after `inspect RECIPE`."""
GOOD = ["--train.steps=7", "--seed=5", "--optim.name=adamw", "--json", "--data.sources=a,b", "--sample.top-k", "none"]
USELESS = [
    ("-",), ("--",), ("\0",), ("\ud800",), ("nano",), ("INSPECT", "nano"), ("--inspect",), ("inspect",), ("train",),
    ("train", "nano"), ("train", "--run", "taken"), ("train", "nano", "--run"), ("train", "nano", "--runn", "taken"),
    ("train", "nano", "--run", "taken", "--run", "taken"), ("train", "nano", "--run", "a\0b"), ("inspect", "x" * 5000),
    ("train", "nano", "--run", "x" * 5000), ("inspect", "\0"), ("inspect", "\ud800"), ("inspect", "--"),
    ("inspect", "-"), ("generate",), ("generate", "--bogus"), ("generate", "x", "y"), ("verify",), ("verify", "x", "y"),
    ("generate", "x", "--temperature", "hot"), ("export", "x"), ("prepare",),
    ("export", "x", "--to", "y", "--out", "z"), ("quickstart", "--bogus"), ("prepare", "--out"),
    ("prepare", "--held-out=x"),
]  # fmt: skip


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def wrong_flag(random: Random) -> Case:
    """A recipe that is right, and a flag's value that is not: the sentence names the setting, and not the file."""
    name = random.choice([name for name, annotation in FIELDS.items() if kind_of(annotation) is not str])
    text = random.choice(TEXTS[kind_of(FIELDS[name])])
    pair = (f"{flag(name)}={text}",) if text.startswith("--") or random.random() < 0.5 else (flag(name), text)
    said = flag(name) if text in ("[", "[a", "[0.9,") else name
    return Case(asked(random, dump(random, shipped(random)), *pair), names=(f"smolforge: {said} ", "it should be "))


def wrong_file(random: Random) -> Case:
    """Flags that are right, and a recipe that is not: the sentence names the file."""
    case = random.choice([wrong_type, misspelt_key, contradiction])(random)
    return Case((*case.words, *random.choice([GOOD[-2:], *([word] for word in GOOD[:-2])])), names=case.names)


def misspelt_flag(random: Random) -> Case:
    name = random.choice(list(FIELDS))
    slip = misspelt(random, name)
    if slip in FIELDS or slip == "model.preset":
        return misspelt_flag(random)
    names = (f"there is no setting {flag(slip)}. Did you mean --",)
    return Case(asked(random, dump(random, shipped(random)), flag(slip), "5"), names=names)


def unfinished_flag(random: Random) -> Case:
    """Without a value, or given twice."""
    name = flag(random.choice([name for name, annotation in FIELDS.items() if kind_of(annotation) is not tuple]))
    path = dump(random, shipped(random))
    if random.random() < 0.5:
        return Case(asked(random, path, name, *random.choice([(), ("--seed", "5")])), names=(f"{name} needs a value",))
    return Case(asked(random, path, name, "5", f"{name}=5"), names=(f"{name} is given twice",))


def odd_word(random: Random) -> Case:
    words = ["inspect", str(dump(random, shipped(random))), *random.sample(GOOD[:-2], random.randint(0, 2))]
    return Case((*words, random.choice(ODD)))


def misspelt_verb(random: Random) -> Case:
    verb = random.choice(list(cli.COMMANDS))
    slip = misspelt(random, verb)
    return misspelt_verb(random) if slip in cli.COMMANDS else Case((slip, "nano"), names=(f'"{slip}"',))


def useless(random: Random) -> Case:
    return Case(random.choice(USELESS))


def shuffled(random: Random) -> Case:
    """Good words in any order, or fewer of them; some are still right."""
    words = ["inspect", "nano", *random.sample(GOOD[:-2], 2), "--sample.top-k=5", "--", "--help", "--version"]
    return Case(tuple(random.sample(words, random.randint(1, len(words)))), (0, 2))


KINDS: dict[Make, int] = {
    wrong_type: 6, wrong_group: 2, misspelt_key: 6, contradiction: 4, spoilt: 6, other_encoding: 2, hostile: 4,
    no_file: 1, odd_name: 1, wrong_flag: 6, wrong_file: 4, misspelt_flag: 4, unfinished_flag: 2, odd_word: 4,
    misspelt_verb: 2, useless: 3, shuffled: 2,
}  # fmt: skip
"""How often each is drawn."""

if __name__ == "__main__":
    print(mutations(*map(int, sys.argv[1:])))
