"""What differs between Linux, macOS and Windows. No other module asks which system this is, or uses a name that only
some systems have.

Each name here works on all three. Where Windows has nothing of the kind, the docstring says what happens instead.
"""

import errno
import faulthandler
import gc
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

IS_WINDOWS = sys.platform == "win32"
SYNC_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer that cannot sync, such as some of FUSE."""
REPLACE_SECONDS = 2.0
"""How long to wait for another program that has a file open, such as a virus scanner."""
POSIX_PATH_LENGTH, WINDOWS_PATH_LENGTH, WINDOWS_LONG_PATH_LENGTH = 4095, 259, 32_766
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)(\..*)?", re.IGNORECASE)
NAME_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f]|[. ]$')

if sys.platform == "win32":
    SCHEDULER_SIGNALS = (signal.SIGBREAK,)
    """What ends a run from outside: Ctrl-Break, and the window that is closed."""
    SYNC_FLAGS = os.O_RDWR
    """How a file is opened to be synced."""
    BROKEN_PIPE_ERRORS = (errno.EPIPE, errno.EINVAL)
    """What a write to a pipe that nobody reads fails with."""
    DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, 112)
    """The last one is ERROR_DISK_FULL, which libraries in Rust name."""
    HAS_RESOURCE_LIMITS = False
    OWN_SESSION: dict[str, Any] = {"creationflags": 0x200}
    """Popen's arguments for a child that does not receive Ctrl-C; the number is CREATE_NEW_PROCESS_GROUP."""
else:
    import resource

    SCHEDULER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
    """What schedulers send before they take the machine away."""
    SYNC_FLAGS = os.O_RDONLY
    BROKEN_PIPE_ERRORS = (errno.EPIPE,)
    DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
    HAS_RESOURCE_LIMITS = True
    OWN_SESSION: dict[str, Any] = {"start_new_session": True}


def fsync_path(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut, where the file system can.

    Windows syncs no folders. Raises OSError.
    """
    is_folder = path.is_dir()
    if is_folder and IS_WINDOWS:
        return
    handle = os.open(path, os.O_RDONLY if is_folder else SYNC_FLAGS)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in SYNC_REFUSED:
            raise
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename a file over another, or a folder to a new name.

    On Windows this fails while any program has the file open, so it is tried for REPLACE_SECONDS.
    """
    deadline = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if not IS_WINDOWS or time.monotonic() > deadline:
                raise
            gc.collect()  # a memory map that nobody needs keeps its file open
            time.sleep(0.02)


def is_broken_pipe(error: Exception) -> bool:
    """Return whether a write failed since nobody reads the other end of a pipe."""
    return isinstance(error, OSError) and error.filename is None and error.errno in BROKEN_PIPE_ERRORS


def max_path_length() -> int:
    """Return how many characters a path may have."""
    if sys.platform != "win32":
        return POSIX_PATH_LENGTH
    else:  # noqa: RET505 (type checkers for another system skip this part)
        import winreg

        with (
            suppress(OSError),
            winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key,
        ):
            if winreg.QueryValueEx(key, "LongPathsEnabled")[0]:
                return WINDOWS_LONG_PATH_LENGTH
        return WINDOWS_PATH_LENGTH


def shell_word(text: str) -> str:
    """Quote a text as one word of a command line: for POSIX' shells, or for Windows' cmd."""
    return subprocess.list2cmdline([text]) if IS_WINDOWS else shlex.quote(text)


def shell_variable(name: str) -> str:
    """Return how a command line names a variable of the environment."""
    return f"%{name}%" if IS_WINDOWS else f"${name}"


def relative_path(path: Path, start: Path) -> str:
    """Return a path relative to a folder, with forward slashes; an absolute one where they are on different drives."""
    path, start = path.resolve(), start.resolve()
    return Path(os.path.relpath(path, start) if path.drive == start.drive else path).as_posix()


def is_portable_name(name: str) -> bool:
    """Return whether all three systems can have a file of this name."""
    return bool(name) and not NAME_FORBIDDEN.search(name) and not WINDOWS_DEVICES.fullmatch(name)


def allowed_cores() -> int:
    """Return the number of processor cores that this process may use."""
    import psutil

    affinity = psutil.Process().cpu_affinity() if sys.platform != "darwin" else None  # macOS has none
    return len(affinity or ()) or os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Return the peak memory of this process so far."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    else:  # noqa: RET505 (type checkers for another system skip this part)
        try:  # getrusage's begins with that of the process which started this one
            with Path("/proc/self/status").open(encoding="utf-8") as lines:
                return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(process: int) -> int:
    """Return the memory of a process; 0 for one that has ended."""
    import psutil

    try:
        return psutil.Process(process).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT: processes started here do not receive Ctrl-C, and this one receives it afterwards.

    On Windows they do receive it until they ignore it themselves.
    """
    received: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = set() if sys.platform == "win32" else signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, lambda *_: received.append(1)) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if received:
            signal.raise_signal(signal.SIGINT)


def call_after_fork(function: Callable[[], object]) -> None:
    """Call a function in each process that is forked from this one. Windows has no forks."""
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=function)


def exit_after(seconds: float) -> None:
    """End this process after so many seconds, whatever it does then; 0 takes an earlier call back."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def limit_resources(memory_bytes: int) -> None:
    """Forbid this process new files and processes, and memory beyond so many more bytes; what is open stays open.

    Windows sets none of these limits (HAS_RESOURCE_LIMITS).
    """
    if sys.platform != "win32":
        status = Path("/proc/self/statm")
        pages = int(status.read_text("ascii").split()[0]) if status.exists() else 0
        limits = {
            resource.RLIMIT_AS: pages * resource.getpagesize() + memory_bytes,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_NOFILE: 0,
        }
        for kind, maximum in limits.items():
            with suppress(ValueError, OSError):  # macOS refuses some
                resource.setrlimit(kind, (maximum, maximum))


def enable_line_editing() -> None:
    """Turn on line editing, history and bracketed paste at prompts, where readline is installed.

    Windows' consoles edit lines themselves.
    """
    if sys.platform != "win32":
        with suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
