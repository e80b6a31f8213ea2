"""What is published: the sdist has all that git tracks, and the wheel alone is a whole smolforge."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ["--constraint", ROOT / "constraints.txt"]
PIP = ["-m", "pip", "--disable-pip-version-check"]


def run(*words, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this environment that could lead it back to this checkout."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=outside, text=True, capture_output=True, **options)


def tracked(*folders: str) -> set[str]:
    """Return the files below folders that git tracks, or would with `git add`."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("this is no clone: git does not say which files belong to it")
    return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel made of it."""
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_sdist_contains_every_tracked_file(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked() - packed == set()


def test_wheel_contains_the_package_and_the_recipes(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name.removeprefix("src/") for name in tracked("src")}
    assert {
        "smolforge/py.typed",
        "smolforge/server/web/index.html",
        "smolforge/config/presets/smollm2-135m.toml",
    } < package
    assert packed == package | {f"smolforge/{name}" for name in tracked("recipes")}


@pytest.mark.long
def test_wheel_runs_quickstart_in_an_empty_environment(built, tmp_path):
    """Installed by pip with what it declares, and nothing else, in a folder without a clone."""
    wheel, home = next(built.glob("*.whl")), tmp_path / "home"
    home.mkdir()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    reached = run(python, *PIP, "download", "--no-deps", "--dest", tmp_path, *CONSTRAINTS, "tomli-w", cwd=home)
    if reached.returncode != 0:
        pytest.skip("pip reaches no package index")
    run(python, *PIP, "install", "--quiet", *CONSTRAINTS, wheel, cwd=home, check=True)
    where = run(python, "-c", "import smolforge; print(smolforge.__file__)", cwd=home, check=True).stdout
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    done = run(tmp_path / "venv" / "bin" / "smolforge", "quickstart", "--seconds", "1", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits_per_byte"] > 0
    assert {path.name for path in home.iterdir()} == {"quickstart"}
    assert (home / "quickstart" / "loss.png").is_file()
