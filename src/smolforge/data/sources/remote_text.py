"""Texts that stand elsewhere: of python-edu and stack-edu rows say only which object of Software Heritage's store.

    the address, made of columns  ->  the cache, or GET, several times if need be  ->  unpacked  ->  decoded

Many are asked for at a time, and come in the order of the rows. The store is public, so plain HTTP serves.
"""

import codecs
import hashlib
import os
import threading
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
from smolforge.data.sources.columns import column, fill_template
from smolforge.data.sources.types import SourceRow
from smolforge.errors import InvalidFileError, MissingResourceError
from smolforge.errors.hub import with_retries

MAX_CONNECTIONS = 32
ROWS_AHEAD = 4 * MAX_CONNECTIONS
TIMEOUT_SECONDS = 30
RETRY_SECONDS = (0.5, 2.0, 8.0, 30.0)
"""Seconds between asking again."""
NOT_FOUND_STATUSES = (403, 404, 410)
"""Answers that say that there is no such object; a bucket that may not be listed says 403."""
MAX_TEXT_BYTES = 128 << 20
_GZIP = b"\x1f\x8b"


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolforge" / "fetched"


def texts(
    rows: Iterable[SourceRow], is_wanted: Callable[[SourceRow], bool], data: Data
) -> Iterator[tuple[SourceRow, str | Literal[False] | None]]:
    """Each row with its text; none for what the store does not have, false where it is not wanted.

    Raises MissingResourceError where the store does not answer, InvalidFileError where an object is damaged.
    """
    pending: deque[tuple[SourceRow, Future[str | None] | None]] = deque()
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        try:
            for row in rows:
                pending.append((row, pool.submit(fetch_text, *url_and_encoding(row, data)) if is_wanted(row) else None))
                while len(pending) >= ROWS_AHEAD:
                    yield wait_for_text(*pending.popleft())
            while pending:
                yield wait_for_text(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def url_and_encoding(row: SourceRow, data: Data) -> tuple[str, str]:
    """Return the URL of a row's text, and its encoding."""
    assert data.text_url is not None
    encoding = str(column(row, data.encoding_key, "encoding_key")) if data.encoding_key else "utf-8"
    return fill_template(data.text_url, row, "text_url"), encoding


def wait_for_text(row: SourceRow, text: Future[str | None] | None) -> tuple[SourceRow, str | Literal[False] | None]:
    return row, False if text is None else text.result()


def fetch_text(url: str, encoding: str) -> str | None:
    """Return the text at a URL, or None where there is nothing. Raises as `texts`."""
    path = cache_path(url)
    content = fetch_content(url, path)
    if content is None:
        return None
    try:
        codec = codecs.lookup(encoding).name
    except LookupError:
        codec = "utf-8"
    try:
        return gunzip(content, url).decode(codec, "ignore")
    except InvalidFileError:
        path.unlink(missing_ok=True)  # so that the same command asks again
        raise


def gunzip(content: bytes, url: str) -> bytes:
    """Decompress content that is gzip. Raises InvalidFileError where it is broken or too large."""
    if not content.startswith(_GZIP):
        return content
    unpacking = zlib.decompressobj(wbits=31)
    try:
        decompressed = unpacking.decompress(content, MAX_TEXT_BYTES)
    except zlib.error as error:
        raise InvalidFileError(f"{url} is broken: {error}") from None
    if not unpacking.eof:
        raise InvalidFileError(f"{url} is broken: it is cut short, or of more than {MAX_TEXT_BYTES >> 20} MiB")
    return decompressed


def cache_path(url: str) -> Path:
    """Return where in the cache the content of a URL is, or will be."""
    name = hashlib.sha256(url.encode()).hexdigest()
    return cache_folder() / name[:2] / name


def fetch_content(url: str, path: Path) -> bytes | None:
    """Return the stored bytes, from the cache if possible; None where there is no such object."""
    with suppress(OSError):
        if content := path.read_bytes():  # a power cut leaves empty files
            return content
    content = download(url)
    with suppress(OSError):  # a cache that cannot be written is none
        if content:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            temporary.write_bytes(content)
            temporary.replace(path)
    return content


def download(url: str) -> bytes | None:
    """Download a URL, with retries; return None where there is no such object."""
    if not url.startswith(("http://", "https://")):
        raise InvalidFileError(f"{url!r} (data.text_url) is no address: it should begin with https://")

    def request() -> bytes:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            error.close()  # it is the answer too, and holds the connection
            raise

    try:
        return with_retries(request, RETRY_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in NOT_FOUND_STATUSES:
            return None
        problem = f"it answers with status {error.code}"
    except (ValueError, InvalidURL) as error:
        raise InvalidFileError(f"{url!r} (data.text_url) is no address: {error}") from None
    except (OSError, HTTPException) as error:
        problem = str(error) or type(error).__name__
    raise MissingResourceError(f"{url} cannot be fetched: {problem}; the same command goes on from where it was")
