"""How fast text becomes tokens, and in how much memory: prepare beside the tokenizer alone and datatrove's own script.

    python benchmarks/preparing.py TOKENIZER [--text FILE...] [--megabytes 40] [--rounds 3]
    python benchmarks/preparing.py TOKENIZER --minhash [the same]
    python benchmarks/preparing.py TOKENIZER --memory 1000 [--minhash]

All read the same .jsonl file and use the same cores. Rounds alternate, since other programs may be busy; what counts
is the ratio within a round. The second form sets prepare beside itself where it leaves out near duplicates. The third
tells the memory that prepare takes for so many megabytes, its workers included.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("tokenizer", type=Path)
    reader.add_argument("--text", type=Path, nargs="*", default=[])
    reader.add_argument("--megabytes", type=int, default=40)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--workers", type=int, default=2)
    reader.add_argument("--memory", type=int, default=0)
    reader.add_argument("--minhash", action="store_true")
    given = reader.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.jsonl"
        size = write(source, paragraphs(given.text), (given.memory or given.megabytes) * 1_000_000)
        if given.memory:
            measure_memory(source, size, given)
        else:
            compare(source, size, given, Path(folder))


def paragraphs(files: list[Path]) -> list[str]:
    """Documents of about 2,000 characters; without files, of Python's documentation."""
    from smolforge.data.prepare.documents import python_docs

    texts = [file.read_text() for file in files] or [document.text for document in python_docs()]
    return [text[start : start + 2000] for text in texts for start in range(0, len(text), 2000)]


def write(path: Path, texts: list[str], size: int) -> int:
    """Documents, each once, until they are so large; returns their bytes."""
    written = number = 0
    with path.open("w") as file:
        while written < size:
            text = f"{number} {texts[number % len(texts)]}"
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
    return written


def compare(source: Path, size: int, given: argparse.Namespace, folder: Path) -> None:
    ways = {
        "smolforge, one process": lambda: ours(source, folder / "one", given, 1),
        f"smolforge, {given.workers} workers": lambda: ours(source, folder / "several", given, given.workers),
    }
    if given.minhash:
        ways |= {
            "one process, minhash": lambda: ours(source, folder / "one", given, 1, "minhash"),
            f"{given.workers} workers, minhash": lambda: ours(
                source, folder / "several", given, given.workers, "minhash"
            ),
            "datatrove signatures, one core": lambda: signatures(source),
        }
    else:
        ways = {
            "tokenizers.encode_batch": lambda: alone(source, given),
            "datatrove DocumentTokenizer": lambda: theirs(source, folder / "theirs", given),
            **ways,
        }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            rates[name].append(size / 1e6 / (time.perf_counter() - begun))
            for each in ("theirs", "one", "several"):
                shutil.rmtree(folder / each, ignore_errors=True)
    first, base = next(iter(rates.items()))
    with source.open() as lines:
        documents = sum(1 for _ in lines)
    print(
        f"{size / 1e6:.0f} MB in {documents:,} documents, median of {given.rounds} rounds; "
        f"the ratio is that of each round to {first}, and its range"
    )
    for name, found in rates.items():
        ratios = sorted(rate / of for rate, of in zip(found, base, strict=True))
        rate = statistics.median(found)
        print(
            f"{name:<32}{rate:>6.2f} MB/s{rate * documents * 1e6 / size:>8,.0f} documents/s"
            f"{statistics.median(ratios):>8.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def alone(source: Path, given: argparse.Namespace) -> None:
    """The tokenizers library on texts that are in memory already, all at once in batches of a thousand."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(given.tokenizer / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in source.open()]
    for start in range(0, len(texts), 1000):
        tokenizer.encode_batch(texts[start : start + 1000])


def theirs(source: Path, out: Path, given: argparse.Namespace) -> None:
    """datatrove's script for a file, split before so that its tasks, which share out files, use all cores."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    parts = out / "parts"
    parts.mkdir(parents=True)
    lines = source.read_text().splitlines(keepends=True)
    for number in range(given.workers):
        (parts / f"{number}.jsonl").write_text("".join(lines[number :: given.workers]))
    LocalPipelineExecutor(
        [
            JsonlReader(str(parts)),
            DocumentTokenizer(
                str(out / "tokens"),
                local_working_dir=None,
                tokenizer_name_or_path=str(given.tokenizer / "tokenizer.json"),
                eos_token="<|endoftext|>",
                batch_size=1000,
                shuffle_documents=False,
            ),
        ],
        tasks=given.workers,
        workers=given.workers,
        logging_dir=str(out / "logs"),
    ).run()


def signatures(source: Path) -> None:
    """datatrove's MinHash alone, with words that need no spaCy, and xxhash called as from its version 4 on."""
    import xxhash
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = word_tokenize

    step = MinhashDedupSignature(".", MinhashConfig(), Words())
    step._hash_func = lambda run: xxhash.xxh64_intdigest(run.encode())
    for line in source.open():
        if len(shingles := step.get_shingles(json.loads(line)["text"])):
            step.get_signature(shingles)


def ours(source: Path, out: Path, given: argparse.Namespace, workers: int, deduplication: str = "exact") -> None:
    from smolforge.config import Data
    from smolforge.data import sources
    from smolforge.data.prepare.build import prepare
    from smolforge.data.sources import jsonl
    from smolforge.tokenizer import Tokenizer

    if workers > 1:  # as if the file were large: in parts, of which there are some for each worker
        sources.MANY_BYTES = jsonl.MANY_BYTES = 0
        jsonl.PART_BYTES = 4 << 20
    data = Data.model_validate({"sources": (str(source),), "deduplication": deduplication})
    prepare(data, out, Tokenizer.load(given.tokenizer), workers=workers)
    sources.MANY_BYTES = jsonl.MANY_BYTES = 256 << 20


def measure_memory(source: Path, size: int, given: argparse.Namespace) -> None:
    from smolforge.config import Data
    from smolforge.data import sources
    from smolforge.data.prepare.build import prepare
    from smolforge.data.sources import jsonl
    from smolforge.tokenizer import Tokenizer

    sources.MANY_BYTES = jsonl.MANY_BYTES = 0  # so that fewer megabytes than a large file's are read as one
    process, stop, most = psutil.Process(), threading.Event(), [0, 0]

    def watch() -> None:
        while not stop.wait(0.2):
            each = [process.memory_info().rss]
            for child in process.children(recursive=True):
                try:
                    each.append(child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            most[:] = max(most[0], sum(each)), max(most[1], *each)

    watching = threading.Thread(target=watch)
    watching.start()
    begun = time.perf_counter()
    out = source.parent / "corpus"
    data = Data(sources=(str(source),), deduplication="minhash" if given.minhash else "exact")
    corpus = prepare(data, out, Tokenizer.load(given.tokenizer), workers=given.workers)
    seconds = time.perf_counter() - begun
    stop.set()
    watching.join()
    tokens = sum(corpus.size(split)["tokens"] for split in ("train", "held_out"))
    print(
        f"{size / 1e6:,.0f} MB, {tokens:,} tokens in {seconds:.0f} s with {given.workers} workers: "
        f"{most[0] / 1e6:,.0f} MB of memory in all processes, {most[1] / 1e6:,.0f} MB in the largest"
    )


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
