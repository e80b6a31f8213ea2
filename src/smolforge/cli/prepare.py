"""`smolforge prepare`."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from smolforge.config import Data
from smolforge.config.base import validated
from smolforge.errors import InvalidFile, MissingResource, SettingError

EXPLAINED = {
    "filtered": "by data.filters",
    "missing": "not in the store",
    "near_duplicates": "nearly the same as one before",
    "repeated": "repeated",
    "too_long": "too long",
    "too_short": "too short",
    "unanswered": "without an answer to learn",
}
"""Why documents are left out, as a person reads it."""
OTHERWISE = {"--filters": "--filter", "--sources": "SOURCE"}


@contextmanager
def in_flags() -> Iterator[None]:
    """Sentences that speak of a recipe's settings speak of this command's flags."""
    names = "|".join(Data.model_fields).replace("_", "[_-]")
    try:
        yield
    except (SettingError, InvalidFile, MissingResource) as error:
        flag = lambda found: f"--{found[1]}".replace("_", "-")  # noqa: E731
        said = re.sub(rf"(?:--)?\bdata\.({names})\b", lambda found: OTHERWISE.get(flag(found), flag(found)), str(error))
        raise type(error)(said) from error


@in_flags()
def prepare(
    *sources: str,
    out: Path,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    tokens: str | None = None,
    format_: Annotated[Literal["text", "chat", "pairs"], Parameter(name="--format")] = "text",
    text_key: str = "text",
    text_template: str | None = None,
    text_url: str | None = None,
    encoding_key: str | None = None,
    split: str = "train",
    filter_: Annotated[tuple[str, ...], Parameter(name="--filter", show_default=False)] = (),
    min_characters: int = 0,
    max_characters: int | None = None,
    deduplication: Literal["exact", "minhash"] = "exact",
    group_key: str | None = None,
    held_out: float = 0.05,
    workers: int | None = None,
    executor: Literal["local", "slurm", "ray"] = "local",
    partition: str | None = None,
    hours: int = 24,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Text to token shards, which train reads with --data.sources OUT.

        smolforge prepare my.txt --out corpus --vocab-size 4096

    Parameters
    ----------
    sources
        Text, .jsonl (also .gz, .zst), .parquet and datatrove's .ds files, directories, globs, or data sets on the Hub
        as org/name[@revision][:config]; none is the documentation that Python carries.
    out
        Folder of the corpus. It appears whole or not at all; the same command goes on with one that was stopped, and
        finds a whole one done.
    tokenizer
        A folder with a tokenizer.json, or a Hub id; by default one is trained on these sources.
    vocab_size
        Size of the tokenizer that is trained.
    tokens
        Stop after this many, as 50000, 10M or 2B.
    format_
        chat reads conversations, messages or a prompt and a completion a .jsonl line, and marks what is to be learned;
        pairs reads a prompt with a chosen and a rejected answer a line.
    text_key
        Key of the text in a .jsonl line, or its column.
    text_template
        Text made of several columns, as "{title}: {text}".
    text_url
        Where the text of a row is to be had, as https://softwareheritage.s3.amazonaws.com/content/{blob_id}.
    encoding_key
        Column with the encoding of what text_url names.
    split
        Which split of a data set on the Hub.
    filter_
        Only rows that meet this, as "int_score >= 3"; may be given several times.
    min_characters
        Leave out shorter documents.
    max_characters
        Leave out longer ones.
    deduplication
        minhash leaves out near duplicates of documents as well, by datatrove's MinHash; exact the same ones alone.
    group_key
        Key in a .jsonl line, or column, that names documents to be held out together.
    held_out
        Share of the text kept back to measure on.
    workers
        Processes that work at a time, by default one for each core; the corpus is the same for any number.
    executor
        Where they work: on this machine, or as jobs on a cluster through datatrove's executors.
    partition
        The partition of a Slurm cluster.
    hours
        The time limit of a Slurm job.
    json_
        Print documents, tokens, bytes and tokens_per_second as one JSON object.
    """
    from smolforge.checkpoint import loading
    from smolforge.data.prepare import build
    from smolforge.device import usable_cores
    from smolforge.runs.estimate import parse_count

    given: dict[str, Any] = {
        "format": format_,
        "text_key": text_key,
        "deduplication": deduplication,
        "group_key": group_key,
        "held_out": held_out,
        "split": split,
        "text_template": text_template,
        "text_url": text_url,
        "encoding_key": encoding_key,
        "filters": filter_,
        "min_characters": min_characters,
        "max_characters": max_characters,
    }
    data = validated(Data, ({"sources": sources} if sources else {}) | given)
    if workers is not None and workers < 1:
        raise SettingError(f"--workers is {workers}; it should be at least 1, or left out for one for each core")
    if hours < 1:
        raise SettingError(f"--hours is {hours}; it should be at least 1")
    if partition is not None and executor != "slurm":
        raise SettingError(f"--partition is one of Slurm's, and --executor is {executor}; --executor slurm takes it")
    named = loading.tokenizer(tokenizer) if tokenizer else None
    limit = None if tokens is None else parse_count(tokens, "--tokens")
    if executor != "local":
        from smolforge.data.prepare.cluster import Cluster, submit

        count = submit(data, out, named, vocab_size, limit, Cluster(executor, workers or -1, partition, hours))
        print(f"{count:,} tasks were handed to {executor}; once they end, {out} is there, or the same command goes on")
        return
    if not json_:
        tell_sizes(data)
    begun = time.perf_counter()
    progress = PreparationProgress()
    made = build.prepare(
        *(data, out, named, vocab_size, limit),
        report=lambda counts: None if json_ else progress.tell(counts),
        workers=workers or max(1, round(usable_cores())),
    )
    tell_result(made, out, time.perf_counter() - begun, json_)


def tell_sizes(data: Data) -> None:
    """What each streamed source holds, before it is read."""
    from smolforge.data import sources

    for source in data.sources:
        if sources.on_hub(source):
            print(f"{source}: {sources.size(source, data)}", flush=True)


class PreparationProgress:
    """A line now and then: how much, how fast, and how long still."""

    SECONDS = 2.0

    def __init__(self) -> None:
        self.begun = self.told = time.perf_counter()
        self.first: dict[str, int] | None = None

    def tell(self, counts: dict[str, int]) -> None:
        from smolforge.cli.run_display import corpus_line

        now = time.perf_counter()
        if self.first is None:
            self.first, self.begun = counts, now
            print(corpus_line(counts), flush=True)
        elif now - self.told >= self.SECONDS:
            self.told = now
            print(f"{corpus_line(counts)}{self.rate(counts, now - self.begun)}", flush=True)

    def rate(self, counts: dict[str, int], seconds: float) -> str:
        from smolforge.cli.run_display import duration

        first = self.first or counts
        done = {key: counts[key] - first[key] for key in ("tokens", "bytes")}
        left = [
            seconds * max(0, counts[f"of_{key}"] - counts[key]) / done[key]
            for key in ("tokens", "bytes")
            if f"of_{key}" in counts and done[key]
        ]
        eta = f", about {duration(min(left))} left" if left else ""
        return f", {done['bytes'] / seconds / 1e6:.1f} MB/s{eta}"


def tell_result(made: Any, out: Path, seconds: float, as_json: bool) -> None:
    """What came of it."""
    from smolforge.data import corpus

    sizes = [made.size(split) for split in corpus.SPLITS]
    total = {key: sum(size[key] for size in sizes) for key in ("documents", "tokens", "bytes")}
    dropped = {why: count for why, count in made.facts["dropped"].items() if count}
    if as_json:
        print(json.dumps(total | {"tokens_per_second": total["tokens"] / seconds, "dropped": dropped}))
        return
    train, held = sizes
    print(f"{out}: {train['tokens']:,} tokens to train on, {held['tokens']:,} held out")
    if made.format != "text":
        learned = train.get("learned_tokens", 0)
        found = f"{train['documents']:,} conversations"
        found = found if made.format == "chat" else f"{train['documents'] // 2:,} pairs"
        print(f"{found}, of whose tokens {learned / max(1, train['tokens']):.0%} are learned")
    if dropped:
        print("left out: " + ", ".join(f"{count:,} {EXPLAINED[why]}" for why, count in sorted(dropped.items())))
