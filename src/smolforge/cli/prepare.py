"""`smolforge prepare`."""

import json
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smolforge.config import Data
from smolforge.settings import validated


def prepare(
    *sources: str,
    out: Path,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    tokens: str | None = None,
    format_: Annotated[Literal["text", "chat", "pairs"], Parameter(name="--format")] = "text",
    text_key: str = "text",
    group_key: str | None = None,
    held_out: float = 0.05,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Text to token shards that train reads with --data.sources OUT.

    Parameters
    ----------
    sources
        Text files, .jsonl files, directories or globs; none is the documentation that Python carries.
    out
        Folder of the corpus. It appears whole or not at all; the same command again finds it done.
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
        Key of the text in a .jsonl line.
    group_key
        Key in a .jsonl line that names documents to be held out together.
    held_out
        Share of the text kept back to measure on.
    json_
        Print documents, tokens, bytes and tokens_per_second as one JSON object.
    """
    from smolforge.checkpoint import resolve
    from smolforge.cli.terminal import corpus_line
    from smolforge.data import corpus, shards
    from smolforge.recipe.plan import parse_count

    chosen = {"sources": sources} if sources else {}
    given = {"format": format_, "text_key": text_key, "group_key": group_key, "held_out": held_out}
    data = validated(Data, chosen | given)
    begun = time.perf_counter()
    made = shards.prepare(
        data,
        out,
        resolve.tokenizer(tokenizer) if tokenizer else None,
        vocab_size,
        parse_count(tokens) if tokens else None,
        report=lambda counts: None if json_ else print(corpus_line(counts), flush=True),
    )
    sizes = [made.size(split) for split in corpus.SPLITS]
    total = {key: sum(size[key] for size in sizes) for key in ("documents", "tokens", "bytes")}
    if json_:
        print(json.dumps(total | {"tokens_per_second": total["tokens"] / (time.perf_counter() - begun)}))
        return
    train, held = sizes
    print(f"{out}: {train['tokens']:,} tokens to train on, {held['tokens']:,} held out")
    if made.format != "text":
        learned, dropped = train.get("learned_tokens", 0), made.facts["dropped"]
        found = f"{train['documents']:,} conversations"
        found = found if made.format == "chat" else f"{train['documents'] // 2:,} pairs"
        print(f"{found}, of whose tokens {learned / max(1, train['tokens']):.0%} are learned")
        if any(dropped.values()):
            unanswered = dropped.get("unanswered", 0)
            print(f"left out: {dropped['repeated']:,} repeated, {unanswered:,} without an answer to learn")
