"""Errors of calls to the Hub: which may pass, so that the call is tried again, and what they tell the user to do."""

import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from typing import Any
from urllib.error import HTTPError as URLLibHTTPError
from urllib.error import URLError

from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
REPO_PATTERN = rf"{_NAME}/{_NAME}"


def status_code(error: BaseException) -> int:
    """Return the HTTP status that a server answered with; 0 for an error that is no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code
    return error.code if isinstance(error, URLLibHTTPError) else 0


def is_busy(error: BaseException) -> bool:
    """Return whether a server answered with a status that may pass."""
    return status_code(error) >= 500 or status_code(error) in (408, 429)


def is_temporary(error: BaseException) -> bool:
    """Return whether a retry may succeed: an error of the server or the connection, or one caused by that."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled | InvalidURL):
        return False
    if status_code(error):
        return is_busy(error)
    if isinstance(error, HTTPError | HTTPException | URLError | ssl.SSLError | TimeoutError | ConnectionError):
        return True
    return error.__cause__ is not None and is_temporary(error.__cause__)


def with_retries(
    action: Callable[[], Any], pauses: Sequence[float], is_worth_it: Callable[[BaseException], bool] = is_temporary
) -> Any:
    """Call an action again after each of the pauses, in seconds, for errors where that is worth it."""
    for pause in pauses:
        try:
            return action()
        except Exception as error:
            if not is_worth_it(error):
                raise
            time.sleep(pause)
    return action()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def failure_reason(error: BaseException) -> str:
    """Return in a few words why the Hub failed."""
    from huggingface_hub import constants

    if status_code(error):
        return f"{constants.ENDPOINT} answers with status {status_code(error)}"
    return f"{constants.ENDPOINT} cannot be reached ({one_line(error)})" if is_temporary(error) else one_line(error)


@contextmanager
def user_errors(
    repo: str, failure: str, hint: str, *, explain: Callable[[BaseException], Exception | None]
) -> Iterator[None]:
    """Turn any error of calls for a repository (datasets/... for a data set) into one line: `failure: why; hint`.

    Raises MissingResourceError, or what `explain` returns for what only the caller knows.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except (ConfigError, InvalidFileError, MissingResourceError, AssertionError):
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError | OSError) and cause.__cause__ is not None:
            if isinstance(cause, errors.HTTPError | errors.OfflineModeIsEnabled):
                break
            cause = cause.__cause__  # which says more than the file that was concerned
        message = f"{failure}: {failure_reason(cause)}; {hint}"
        if isinstance(cause, errors.GatedRepoError):
            message = (
                f"{repo.removeprefix('datasets/')} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then run "
                "`hf auth login` or set HF_TOKEN"
            )
        elif (special := explain(cause)) is not None:
            raise special from None
        elif status_code(cause) == 401:
            message = f"the Hub refuses the token for {repo}; run `hf auth login` again, or correct HF_TOKEN"
        elif isinstance(cause, errors.OfflineModeIsEnabled):
            message = f"{failure} while HF_HUB_OFFLINE is set; unset that"
        raise MissingResourceError(message) from None
