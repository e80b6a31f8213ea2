"""One module knows what differs between systems; the rest runs where Windows' Python lacks the POSIX names.

No Windows is needed: windows/sitecustomize.py takes away what it lacks, and says what that does not show.
"""

import ast
import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import NANO
from test_code_rules import trees

from smolforge import atomic, operating_system
from smolforge.checkpoint import training_state
from smolforge.comparison.study.spec import read_study
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.runs import train
from smolforge.testing import sentences, tiny_tokenizer
from smolforge.tokenizer.chat import process
from smolforge.training.run_folder import RunFolder

TESTS = Path(__file__).parent
NAMES = json.loads((TESTS / "fixtures" / "windows-names.json").read_text("utf-8"))
ELSEWHERE = pytest.mark.skipif(sys.platform == "win32", reason="of systems that are not Windows")
HASHED = ("model.safetensors", "training/optimizer.safetensors")


def foreign_names(tree: ast.AST):
    """Yield what a module uses that is not on every system, or asks which system this is."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.partition(".")[0] in NAMES["missing"])
            case ast.ImportFrom(module=str(module), names=names, level=0):
                if module.partition(".")[0] in NAMES["missing"]:
                    yield module
                yield from (f"{module}.{name.name}" for name in names if is_foreign(module, name.name))
            case ast.Attribute(value=ast.Name(id=module), attr=name) if is_foreign(module, name):
                yield f"{module}.{name}"


def is_foreign(module: str, name: str) -> bool:
    asks = f"{module}.{name}" in ("sys.platform", "os.name", "platform.system", "platform.platform", "os.uname")
    return asks or (module in NAMES and name not in NAMES[module] and not name.startswith("_"))


DESCRIBES = {("__init__.py", "platform.system")}
"""What environment.json records."""


def test_names_of_some_systems_are_in_one_module():
    found = {
        (path.name, name)
        for path, tree in trees()
        if path.name != "operating_system.py"
        for name in foreign_names(tree)
    }
    assert found == DESCRIBES
    (home,) = (tree for path, tree in trees() if path.name == "operating_system.py")
    assert {"resource", "sys.platform", "os.register_at_fork", "signal.setitimer"} <= set(foreign_names(home))


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from resource import getrusage",
        "import curses.ascii",
        "x = signal.SIGUSR1",
        "from signal import SIGKILL as number",
        "os.fork()",
        "os.sched_getaffinity(0)",
        "f(os.O_NONBLOCK)",
        "if sys.platform == 'linux': pass",
        "def f(): return os.name",
        "select.poll()",
    ],
)
def test_a_name_that_is_put_back_is_noticed(line):
    assert list(foreign_names(ast.parse(line)))


def as_on_windows(*arguments: object, cwd: Path, **more: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment | {"PYTHONPATH": f"{TESTS / 'windows'}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"} | more,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def output_of(*arguments: object, cwd: Path, code: int = 0, text: str = "", **more: str) -> bytes:
    child = as_on_windows(*arguments, cwd=cwd, **more)
    out, err = child.communicate(text.encode())
    assert child.returncode == code, err.decode()
    assert b"Traceback" not in err
    return out


LIFE = """
import sys
from smolforge import cli, operating_system
assert operating_system.IS_WINDOWS and operating_system.SCHEDULER_SIGNALS
cli.prepare_streams()
recipe, run = sys.argv[1:]
assert cli.run(["train", recipe, "--run", run]) == 0
assert cli.run(["generate", run, "--prompt", "the model", "--max-new-tokens", "8"]) == 0
assert cli.run(["inspect", run]) == 0
"""
IMPORTS = """
import importlib, pkgutil
import smolforge
scripts = ("smolforge.exporters.space.", "smolforge.tokenizer.chat.worker", "smolforge.__main__")
for module in pkgutil.walk_packages(smolforge.__path__, "smolforge."):
    if not module.name.startswith(scripts):
        importlib.import_module(module.name)
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(sentences(300))
    tiny_tokenizer().save(tmp_path / "tokenizer")
    data = {"sources": [str(tmp_path / "text.txt")]}
    content = NANO | {"data": data, "tokenizer": str(tmp_path / "tokenizer")}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(content | {"train": NANO["train"] | {"checkpoint_every": 2}}))
    return path


def hashes_of(run: Path) -> list[dict[str, object]]:
    files = atomic.check_manifest(training_state.list_checkpoints(run)[-1])["files"]
    return [files[name] for name in HASHED]


@ELSEWHERE
@pytest.mark.parametrize("killed_at", [None, pytest.param(5, marks=pytest.mark.long)])
def test_training_as_on_windows_has_the_same_bits(tmp_path, recipe, killed_at):
    if killed_at:
        begin = f"from pathlib import Path; import children, sys; a, b = map(Path, sys.argv[1:]); t = {killed_at}; "
        killed = as_on_windows("-c", begin + "children.train_until(t, a, b, {})", recipe, "run", cwd=tmp_path)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert (tmp_path / "run" / ".lock-holder").exists()
    text = output_of("-c", LIFE, recipe, "run", cwd=tmp_path)
    assert b"step-00000008" in text or b"8 of 8" in text
    train(recipe, tmp_path / "here")
    assert hashes_of(tmp_path / "run") == hashes_of(tmp_path / "here")
    assert not (tmp_path / "run" / ".lock-holder").exists()


@ELSEWHERE
@pytest.mark.long
def test_whole_life_works_as_on_windows(tmp_path):
    smolforge = ("-m", "smolforge")
    output_of("-c", IMPORTS, cwd=tmp_path)
    assert b"quickstart" in output_of(*smolforge, "--help", cwd=tmp_path)
    summary = json.loads(output_of(*smolforge, "quickstart", "--seconds", "20", "--json", cwd=tmp_path))
    assert summary["resume"]["equal"]
    model = tmp_path / "quickstart"
    for text in tmp_path.rglob("*.json"):
        assert b"\r" not in text.read_bytes()
    output_of(*smolforge, "verify", model, cwd=tmp_path)
    output_of(*smolforge, "export", model, "--to", "gguf", "--out", "m.gguf", cwd=tmp_path)
    (tmp_path / "a.txt").write_text(sentences(300), newline="\r\n")
    (tmp_path / "b.txt").write_text(sentences(300, 300))
    prepare = ("prepare", "a.txt", "b.txt", "--out", "corpus", "--tokenizer", model, "--workers", "2")
    output_of(*smolforge, *prepare, cwd=tmp_path)
    output_of(*smolforge, "chat", model, cwd=tmp_path, text="hello é\n/exit\n")
    child = as_on_windows(*smolforge, "serve", model, "--port", "0", cwd=tmp_path)
    assert child.stdout is not None
    words = next(line for line in child.stdout if b"http://" in line).decode().split()
    url = next(word for word in words if word.startswith("http://")).rstrip(",")
    body = json.dumps({"prompt": "def ", "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    child.send_signal(signal.SIGTERM)
    child.communicate()
    assert child.returncode == 0


PRINT = "from smolforge.cli import prepare_streams; prepare_streams(); print('é\u2500\u4e2d')"


@ELSEWHERE
@pytest.mark.parametrize(
    ("encoding", "right"), [({}, "é─中\n".encode()), ({"PYTHONIOENCODING": "cp1252"}, b"\xe9\\u2500\\u4e2d\n")]
)
def test_pipes_have_utf8_unless_another_encoding_is_named(tmp_path, encoding, right):
    assert output_of("-c", PRINT, cwd=tmp_path, **encoding) == right


@ELSEWHERE
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_without_a_file_system_that_locks_is_a_file(tmp_path, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    path = tmp_path / ".lock"
    path.touch()
    with atomic.lock_file(path):
        assert "without locks" in caplog.text
        assert (tmp_path / ".lock-file").exists()
        assert atomic.lock_holder(path) == f"{os.getpid()} on {socket.gethostname()}"
        refusal, words = "process {} has it".format, f"process {os.getpid()} on"
        with pytest.raises(ConfigError, match=words), atomic.lock_file(path, refusal):
            pass
    assert atomic.lock_holder(path) is None
    with atomic.lock_file(path, str) as left:
        assert left == ""


@ELSEWHERE
def test_lock_call_that_fails_otherwise_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), atomic.lock_file(tmp_path / ".lock", str):
        pass


def test_replace_waits_for_a_program_that_has_the_file_open(tmp_path, monkeypatch):
    source, target, calls, real = tmp_path / "a", tmp_path / "b", [], Path.replace
    source.write_text("new")

    def refuse(path: Path, to: Path) -> Path:
        calls.append(path)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, "in use", str(path))
        return real(path, to)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(operating_system, "IS_WINDOWS", False)
    with pytest.raises(PermissionError):
        operating_system.replace(source, target)
    calls.clear()
    monkeypatch.setattr(operating_system, "IS_WINDOWS", True)
    operating_system.replace(source, target)
    assert (target.read_text(), len(calls)) == ("new", 3)
    monkeypatch.setattr(operating_system, "REPLACE_SECONDS", 0.0)
    calls.clear()
    with pytest.raises(PermissionError):
        operating_system.replace(target, source)


@ELSEWHERE
@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_file_system_that_cannot_sync_is_left_so(tmp_path, monkeypatch, number, raises):
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("a")
    monkeypatch.setattr(os, "fsync", refuse)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match=os.strerror(number)) if raises else nullcontext():
            operating_system.fsync_path(path)


@pytest.mark.parametrize("name", ["con", "NUL.txt", "com1", "a.", "a ", "a:b", "a\\b", "a\n", "", "a/b"])
def test_names_that_a_system_refuses_are_not_portable(name):
    assert not operating_system.is_portable_name(name)


@pytest.mark.parametrize("name", ["console", "a.b", "nul-1", "step-00000500", ".lock", "é中"])
def test_names_that_all_systems_take_are_portable(name):
    assert operating_system.is_portable_name(name)


@pytest.mark.parametrize(
    ("names", "words"), [(("small", "Small"), "one folder on Windows and macOS"), (("base", "aux"), "CON, NUL")]
)
def test_study_refuses_variants_that_are_one_folder_elsewhere(tmp_path, names, words):
    head = f'recipe = "nano"\n[study]\nbaseline = "{names[0]}"\nbudget = {{ tokens = 100000 }}\n'
    tables = "".join(f"[variants.{name}]\ntrain.seed = 1\n" for name in names)
    path = tmp_path / "study.toml"
    path.write_text(head + tables)
    with pytest.raises(ConfigError, match=words):
        read_study(path)


def test_run_folder_too_long_for_its_files_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("smolforge.training.run_folder.max_path_length", lambda: len(str(tmp_path)) + 60)
    words = "too long: a file of this run would have a path of"
    with pytest.raises(ConfigError, match=words), RunFolder.open(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_manifest_names_files_with_forward_slashes(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "training").mkdir()
        (folder / "training" / "state.json").write_text("{}\n")

    manifest = atomic.write_dir_atomic(tmp_path / "a", fill, {})
    assert list(manifest["files"]) == ["training/state.json"]


@ELSEWHERE
def test_printed_commands_are_of_the_shell_at_hand(monkeypatch):
    body = '{"prompt": "it\'s"}'
    assert shlex.split(operating_system.shell_word(body)) == [body]
    monkeypatch.setattr(operating_system, "IS_WINDOWS", True)
    assert operating_system.shell_word(body) == '"{\\"prompt\\": \\"it\'s\\"}"'
    assert operating_system.shell_variable("KEY") == "%KEY%"


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set ns = namespace(x='a' * 1000) %}{% for i in range(99999) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(("template", "words"), [(ENDLESS, "took more than"), (HUGE, "needs more memory")])
def test_chat_template_is_watched_where_it_cannot_be_limited(monkeypatch, template, words):
    worker = process.Worker()
    monkeypatch.setattr(operating_system, "HAS_RESOURCE_LIMITS", False)
    monkeypatch.setattr(process, "MEMORY_BYTES", 8 << 30)  # of the limits that the child sets: not they
    monkeypatch.setattr(process, "START_BYTES", -(8 << 30) + (256 << 20))
    with pytest.raises(InvalidFileError, match=words):
        worker.render(template, {}, seconds=2.0)
    worker.close()
    assert worker.render("a", {}) == "a"
    worker.close()


@ELSEWHERE
def test_sigint_waits_while_it_is_blocked():
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with operating_system.sigint_blocked():
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.02)
            assert heard == []
        deadline = time.monotonic() + 5
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(heard) == {signal.SIGINT}
