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
from smolforge.config.base import validate_settings
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError

DROP_REASONS = {
    "filtered": "by data.filters",
    "missing": "not in the store",
    "near_duplicates": "nearly the same as one before",
    "repeated": "repeated",
    "too_long": "too long",
    "too_short": "too short",
    "unanswered": "without an answer to learn",
}
"""Why documents are dropped, for the user."""
RENAMED_FLAGS = {"--filters": "--filter", "--sources": "SOURCE"}


@contextmanager
def name_flags_in_errors() -> Iterator[None]:
    """Replace the names of recipe settings in errors by this command's flags."""
    names = "|".join(Data.model_fields).replace("_", "[_-]")
    try:
        yield
    except (ConfigError, InvalidFileError, MissingResourceError) as error:
        flag = lambda match: f"--{match[1]}".replace("_", "-")  # noqa: E731
        message = re.sub(
            rf"(?:--)?\bdata\.({names})\b", lambda match: RENAMED_FLAGS.get(flag(match), flag(match)), str(error)
        )
        raise type(error)(message) from error


@name_flags_in_errors()
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

    settings: dict[str, Any] = {
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
    data = validate_settings(Data, ({"sources": sources} if sources else {}) | settings)
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}; it should be at least 1, or left out for one for each core")
    if hours < 1:
        raise ConfigError(f"--hours is {hours}; it should be at least 1")
    if partition is not None and executor != "slurm":
        raise ConfigError(f"--partition is one of Slurm's, and --executor is {executor}; --executor slurm takes it")
    loaded_tokenizer = loading.load_tokenizer(tokenizer) if tokenizer else None
    max_tokens = None if tokens is None else parse_count(tokens, "--tokens")
    if executor != "local":
        from smolforge.data.prepare.cluster import Cluster, submit_jobs

        cluster = Cluster(executor, workers or -1, partition, hours)
        count = submit_jobs(data, out, loaded_tokenizer, vocab_size=vocab_size, limit=max_tokens, cluster=cluster)
        print(f"{count:,} tasks were handed to {executor}; once they end, {out} is there, or the same command goes on")
        return
    if not json_:
        print_source_sizes(data)
    start = time.perf_counter()
    progress = PreparationProgress()
    corpus = build.prepare(
        data,
        out,
        loaded_tokenizer,
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        report=lambda counts: None if json_ else progress.report(counts),
        workers=workers or max(1, round(usable_cores())),
    )
    print_result(corpus, out, time.perf_counter() - start, as_json=json_)


def print_source_sizes(data: Data) -> None:
    """Print the size of each streamed source before it is read."""
    from smolforge.data import sources

    for source in data.sources:
        if sources.is_on_hub(source):
            print(f"{source}: {sources.size(source, data)}", flush=True)


class PreparationProgress:
    """Print a line now and then: how much, how fast, and the time left."""

    INTERVAL_SECONDS = 2.0

    def __init__(self) -> None:
        self.start = self.last_report = time.perf_counter()
        self.first_counts: dict[str, int] | None = None

    def report(self, counts: dict[str, int]) -> None:
        from smolforge.cli.run_display import corpus_line

        now = time.perf_counter()
        if self.first_counts is None:
            self.first_counts, self.start = counts, now
            print(corpus_line(counts), flush=True)
        elif now - self.last_report >= self.INTERVAL_SECONDS:
            self.last_report = now
            print(f"{corpus_line(counts)}{self.rate(counts, now - self.start)}", flush=True)

    def rate(self, counts: dict[str, int], seconds: float) -> str:
        from smolforge.cli.run_display import duration

        first = self.first_counts or counts
        processed = {key: counts[key] - first[key] for key in ("tokens", "bytes")}
        seconds_left = [
            seconds * max(0, counts[f"of_{key}"] - counts[key]) / processed[key]
            for key in ("tokens", "bytes")
            if f"of_{key}" in counts and processed[key]
        ]
        eta = f", about {duration(min(seconds_left))} left" if seconds_left else ""
        return f", {processed['bytes'] / seconds / 1e6:.1f} MB/s{eta}"


def print_result(prepared: Any, out: Path, seconds: float, *, as_json: bool) -> None:
    """Print the sizes of the prepared corpus and what was dropped."""
    from smolforge.data import corpus

    sizes = [prepared.size(split) for split in corpus.SPLITS]
    total = {key: sum(size[key] for size in sizes) for key in ("documents", "tokens", "bytes")}
    dropped = {reason: count for reason, count in prepared.metadata["dropped"].items() if count}
    if as_json:
        print(json.dumps(total | {"tokens_per_second": total["tokens"] / seconds, "dropped": dropped}))
        return
    train, held_out = sizes
    print(f"{out}: {train['tokens']:,} tokens to train on, {held_out['tokens']:,} held out")
    if prepared.format != "text":
        learned = train.get("learned_tokens", 0)
        rows = f"{train['documents']:,} conversations"
        rows = rows if prepared.format == "chat" else f"{train['documents'] // 2:,} pairs"
        print(f"{rows}, of whose tokens {learned / max(1, train['tokens']):.0%} are learned")
    if dropped:
        print(
            "left out: " + ", ".join(f"{count:,} {DROP_REASONS[reason]}" for reason, count in sorted(dropped.items()))
        )
