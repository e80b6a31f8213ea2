"""`smolforge prepare`."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from smolforge.cli.flags import check_at_least
from smolforge.cli.table import print_result
from smolforge.config import Data
from smolforge.config.base import validate_settings
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.formatting import format_duration

REPORT_SECONDS = 2.0
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


@Parameter(name="*")
@dataclass(frozen=True)
class PrepareFlags:
    """Flags for the text and how it is read; those that `Data` has too are its settings."""

    tokenizer: str | None = None
    """A folder with a tokenizer.json, or a Hub id; by default one is trained on these sources."""
    vocab_size: int = 4096
    """Size of the tokenizer that is trained."""
    tokens: str | None = None
    """Stop after this many, as 50000, 10M or 2B."""
    format: Literal["text", "chat", "pairs"] = "text"
    """chat reads conversations, messages or a prompt and a completion a .jsonl line, and marks what is to be learned;
    pairs reads a prompt with a chosen and a rejected answer a line."""
    text_key: str = "text"
    """Key of the text in a .jsonl line, or its column."""
    text_template: str | None = None
    """Text made of several columns, as "{title}: {text}"."""
    text_url: str | None = None
    """Where the text of a row is to be had, as https://softwareheritage.s3.amazonaws.com/content/{blob_id}."""
    encoding_key: str | None = None
    """Column with the encoding of what text_url names."""
    split: str = "train"
    """Which split of a data set on the Hub."""
    filters: Annotated[tuple[str, ...], Parameter(name="--filter", show_default=False)] = ()
    """Only rows that meet this, as "int_score >= 3"; may be given several times."""
    min_characters: int = 0
    """Leave out shorter documents."""
    max_characters: int | None = None
    """Leave out longer ones."""
    deduplication: Literal["exact", "minhash"] = "exact"
    """minhash leaves out near duplicates of documents as well, by datatrove's MinHash; exact the same ones alone."""
    group_key: str | None = None
    """Key in a .jsonl line, or column, that names documents to be held out together."""
    held_out: float = 0.05
    """Share of the text kept back to measure on."""
    workers: int | None = None
    """Processes that work at a time, by default one for each core; the corpus is the same for any number."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where they work: on this machine, or as jobs on a cluster through datatrove's executors."""
    partition: str | None = None
    """The partition of a Slurm cluster."""
    hours: int = 24
    """The time limit of a Slurm job."""

    def check(self) -> None:
        """Raise ConfigError for wrong flags of the workers."""
        if self.workers is not None and self.workers < 1:
            raise ConfigError(
                f"--workers is {self.workers}; it should be at least 1, or left out for one for each core"
            )
        check_at_least(1, hours=self.hours)
        if self.partition is not None and self.executor != "slurm":
            reason = f"--partition is one of Slurm's, and --executor is {self.executor}"
            raise ConfigError(f"{reason}; --executor slurm takes it")


@contextmanager
def name_flags_in_errors() -> Iterator[None]:
    """Replace the names of recipe settings in errors by this command's flags."""
    names = "|".join(Data.model_fields).replace("_", "[_-]")

    def flag(match: re.Match[str]) -> str:
        name = f"--{match[1]}".replace("_", "-")
        return RENAMED_FLAGS.get(name, name)

    try:
        yield
    except (ConfigError, InvalidFileError, MissingResourceError) as error:
        raise type(error)(re.sub(rf"(?:--)?\bdata\.({names})\b", flag, str(error))) from error


@name_flags_in_errors()
def prepare(*sources: str, out: Path, flags: PrepareFlags | None = None, json_: bool = False) -> None:
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
    json_
        Print documents, tokens, bytes and tokens_per_second as one JSON object.
    """
    from smolforge.checkpoint import loading
    from smolforge.data.prepare import build
    from smolforge.device import usable_cores
    from smolforge.runs.estimate import parse_count

    flags = flags or PrepareFlags()
    settings = {name: value for name, value in flags.__dict__.items() if name in Data.model_fields}
    data = validate_settings(Data, settings | ({"sources": sources} if sources else {}))
    flags.check()
    tokenizer = loading.load_tokenizer(flags.tokenizer) if flags.tokenizer else None
    max_tokens = None if flags.tokens is None else parse_count(flags.tokens, "--tokens")
    if flags.executor != "local":
        from smolforge.data.prepare.cluster import Cluster, submit_jobs

        cluster = Cluster(flags.executor, flags.workers or -1, flags.partition, flags.hours)
        count = submit_jobs(data, out, tokenizer, vocab_size=flags.vocab_size, limit=max_tokens, cluster=cluster)
        handed = f"{count:,} tasks were handed to {flags.executor}"
        print(f"{handed}; once they end, {out} is there, or the same command goes on")
        return
    if not json_:
        _print_source_sizes(data)
    start, progress = time.perf_counter(), PreparationProgress()
    corpus = build.prepare(
        data,
        out,
        tokenizer,
        vocab_size=flags.vocab_size,
        max_tokens=max_tokens,
        report=lambda counts: None if json_ else progress.report(counts),
        workers=flags.workers or max(1, round(usable_cores())),
    )
    _print_corpus(corpus, out, time.perf_counter() - start, as_json=json_)


def _print_source_sizes(data: Data) -> None:
    """Print the size of each streamed source before it is read."""
    from smolforge.data import sources

    for source in data.sources:
        if sources.is_on_hub(source):
            print(f"{source}: {sources.size(source, data)}", flush=True)


class PreparationProgress:
    """Print a line now and then: how much, how fast, and the time left."""

    def __init__(self) -> None:
        self.start = self.last_report = time.perf_counter()
        self.first_counts: dict[str, int] = {}

    def report(self, counts: dict[str, int]) -> None:
        """Print the first counts, and from then on those of every few seconds."""
        from smolforge.cli.run_display import corpus_line

        now = time.perf_counter()
        if not self.first_counts:
            self.first_counts, self.start = counts, now
            print(corpus_line(counts), flush=True)
        elif now - self.last_report >= REPORT_SECONDS:
            self.last_report = now
            print(f"{corpus_line(counts)}{self.rate(counts, now - self.start)}", flush=True)

    def rate(self, counts: dict[str, int], seconds: float) -> str:
        """Return the speed since the first counts, and the time left by whichever limit is reached first."""
        rates = {key: (counts[key] - self.first_counts[key]) / seconds for key in ("tokens", "bytes")}
        limits = {key: counts[f"of_{key}"] for key, rate in rates.items() if rate and f"of_{key}" in counts}
        seconds_left = [max(0, limit - counts[key]) / rates[key] for key, limit in limits.items()]
        eta = f", about {format_duration(min(seconds_left))} left" if seconds_left else ""
        return f", {rates['bytes'] / 1e6:.1f} MB/s{eta}"


def _print_corpus(corpus: Any, out: Path, seconds: float, *, as_json: bool) -> None:
    """Print the sizes of a prepared corpus and what was dropped."""
    from smolforge.data.corpus import SPLITS

    train, held_out = sizes = [corpus.size(split) for split in SPLITS]
    total = {key: sum(size[key] for size in sizes) for key in ("documents", "tokens", "bytes")}
    dropped = {reason: count for reason, count in corpus.metadata["dropped"].items() if count}
    lines = [f"{out}: {train['tokens']:,} tokens to train on, {held_out['tokens']:,} held out"]
    if corpus.format != "text":
        count, learned = train["documents"], train.get("learned_tokens", 0) / max(1, train["tokens"])
        rows = f"{count:,} conversations" if corpus.format == "chat" else f"{count // 2:,} pairs"
        lines.append(f"{rows}, of whose tokens {learned:.0%} are learned")
    if dropped:
        reasons = (f"{count:,} {DROP_REASONS[reason]}" for reason, count in sorted(dropped.items()))
        lines.append(f"left out: {', '.join(reasons)}")
    print_result(total | {"tokens_per_second": total["tokens"] / seconds, "dropped": dropped}, lines, as_json=as_json)
