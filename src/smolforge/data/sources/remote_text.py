"""Texts that stand elsewhere: of python-edu and stack-edu rows say only which object of Software Heritage's store.

    the address, made of columns  ->  the cache, or GET, several times if need be  ->  unpacked  ->  decoded

Many are asked for at a time, and come in the order of the rows. The store is public, so plain HTTP serves.
"""

import codecs
import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Literal

from smolforge.config import Data
from smolforge.data.sources.columns import column, filled
from smolforge.data.sources.types import Row
from smolforge.errors import InvalidFile, MissingResource

AT_ONCE = 32
AHEAD = 4 * AT_ONCE
SECONDS = 30
PAUSES = (0.5, 2.0, 8.0, 30.0)
"""Seconds between asking again."""
GONE = (403, 404, 410)
"""Answers that say that there is no such object; a bucket that may not be listed says 403."""
MOST_BYTES = 128 << 20
_GZIP = b"\x1f\x8b"


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolforge" / "fetched"


def texts(
    rows: Iterable[Row], wanted: Callable[[Row], bool], data: Data
) -> Iterator[tuple[Row, str | Literal[False] | None]]:
    """Each row with its text; none for what the store does not have, false where it is not wanted.

    Raises MissingResource where the store does not answer, InvalidFile where an object is damaged.
    """
    waiting: deque[tuple[Row, Future[str | None] | None]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for row in rows:
                waiting.append((row, pool.submit(text_of, *address(row, data)) if wanted(row) else None))
                while len(waiting) >= AHEAD:
                    yield arrived(*waiting.popleft())
            while waiting:
                yield arrived(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def address(row: Row, data: Data) -> tuple[str, str]:
    """Where a row's text is, and its encoding."""
    assert data.text_url is not None
    encoding = str(column(row, data.encoding_key, "encoding_key")) if data.encoding_key else "utf-8"
    return filled(data.text_url, row, "text_url"), encoding


def arrived(row: Row, text: Future[str | None] | None) -> tuple[Row, str | Literal[False] | None]:
    return row, False if text is None else text.result()


def text_of(url: str, encoding: str) -> str | None:
    """The text at an address; none where there is nothing. Raises as `texts`."""
    path = cached(url)
    content = content_of(url, path)
    if content is None:
        return None
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        known = "utf-8"
    try:
        return unpacked(content, url).decode(known, "ignore")
    except InvalidFile:
        path.unlink(missing_ok=True)  # so that the same command asks again
        raise


def unpacked(content: bytes, url: str) -> bytes:
    """Raises InvalidFile for a broken gzip, and one that would fill the memory."""
    if not content.startswith(_GZIP):
        return content
    unpacking = zlib.decompressobj(wbits=31)
    try:
        found = unpacking.decompress(content, MOST_BYTES)
    except zlib.error as error:
        raise InvalidFile(f"{url} is broken: {error}") from None
    if not unpacking.eof:
        raise InvalidFile(f"{url} is broken: it is cut short, or of more than {MOST_BYTES >> 20} MiB")
    return found


def cached(url: str) -> Path:
    """Where in the cache its content is, or will be."""
    name = hashlib.sha256(url.encode()).hexdigest()
    return cache_folder() / name[:2] / name


def content_of(url: str, path: Path) -> bytes | None:
    """As it is stored, from the cache if it is there; none where there is no such object."""
    with suppress(OSError):
        if content := path.read_bytes():  # a power cut leaves empty files
            return content
    content = got(url)
    with suppress(OSError):  # a cache that cannot be written is none
        if content:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            temporary.write_bytes(content)
            temporary.replace(path)
    return content


def got(url: str) -> bytes | None:
    """Ask as often as it takes."""
    if not url.startswith(("http://", "https://")):
        raise InvalidFile(f"{url!r} (data.text_url) is no address: it should begin with https://")
    for pause in (*PAUSES, None):
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code in GONE:
                return None
            said = f"it answers with status {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                pause = None
        except (ValueError, InvalidURL) as error:
            raise InvalidFile(f"{url!r} (data.text_url) is no address: {error}") from None
        except (OSError, HTTPException) as error:
            said = str(error) or type(error).__name__
        if pause is None:
            break
        time.sleep(pause)
    raise MissingResource(f"{url} cannot be fetched: {said}; the same command goes on from where it was")
