"""What is installed and published: the extras, the pinned versions, the addresses, the workflows, the image."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from trove_classifiers import classifiers

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "smolforge"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
NOT_INSTALLED_HERE = {"gradio", "ray"}
"""A Space installs the first for itself; a user of a cluster installs the second."""
EXTRA_NAMES = r"""(?:smolforge|-e ["']\.)\[([a-z, ]+)\]|install_command\('(\w+)'\)"""
PART_OF = {"markupsafe": "jinja2", "pydantic_core": "pydantic", "starlette": "fastapi", "tqdm": "huggingface-hub"}
"""Packages that a dependency requires and is built on."""


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements} - {"smolforge"}


def imported_packages() -> set[str]:
    """The first part of every absolute import below src, also of those inside functions."""
    packages = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import(names=modules):
                    packages |= {each.name.split(".")[0] for each in modules}
                case ast.ImportFrom(module=str(module), level=0):
                    packages.add(module.split(".")[0])
    return packages - sys.stdlib_module_names - {"smolforge"}


@cache
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines[1:])}


def test_extra_all_is_every_extra_but_test():
    (itself,) = EXTRAS["all"]
    assert itself.name == "smolforge"
    assert itself.extras == EXTRAS.keys() - {"all", "test"}


def test_extra_test_contains_the_extra_all():
    assert any(each.name == "smolforge" and each.extras == {"all"} for each in EXTRAS["test"])


def test_every_extra_named_in_code_and_docs_exists():
    pages = [*SOURCE.rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("recipes/*.toml")]
    named = {
        extra.strip()
        for page in pages
        for extras, extra_in_code in re.findall(
            r"(?:smolforge|-e [\"']\.)\[([a-z, ]+)\]|install_command\('(\w+)'\)", page.read_text("utf-8")
        )
        for extra in (extras or extra_in_code).split(",")
    }
    assert {"data", "harness", "server", "verify"} <= named <= EXTRAS.keys()


def test_every_import_is_a_dependency_or_in_an_extra():
    extras = (each for name, extra in EXTRAS.items() if name != "test" for each in extra)
    declared = names([*map(Requirement, PROJECT["dependencies"]), *extras])
    distributions = packages_distributions()
    for package in imported_packages() - NOT_INSTALLED_HERE:
        if package in PART_OF:
            assert PART_OF[package] in declared
            assert canonicalize_name(package) in names([Requirement(line) for line in requires(PART_OF[package]) or []])
        else:
            assert declared & {canonicalize_name(each) for each in distributions.get(package, [package])}, package


def test_every_requirement_is_pinned_within_its_range():
    extras = (each for extra in EXTRAS.values() for each in extra)
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *extras]:
        if requirement.name != "smolforge":
            pin = pins()[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin, prereleases=True), f"{requirement}, but {pin} is pinned"


def test_pins_are_sorted_and_each_is_there_once():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
    assert lines == sorted(lines, key=str.lower)
    assert len(lines) == len(pins())


def test_oldest_constraints_are_the_lower_bounds():
    """And below them what those versions need, each with its reason."""
    extras = (each for extra in EXTRAS.values() for each in extra)
    requirements = [each for each in [*map(Requirement, PROJECT["dependencies"]), *extras] if each.name != "smolforge"]
    bounds = {f"{each.name}{each.specifier}".replace(">=", "==") for each in requirements}
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()[1:]
    assert lines[: len(bounds)] == sorted(bounds, key=str.lower)
    assert all(re.fullmatch(r"[\w-]+==[\w.]+ # .+", line) for line in lines[len(bounds) :])


def test_package_says_that_it_is_typed():
    assert (SOURCE / "py.typed").is_file()


def classified(topic: str) -> list[str]:
    """The last words of the classifiers of a topic."""
    return [each.rpartition(" :: ")[2] for each in PROJECT["classifiers"] if each.startswith(topic)]


def test_classifiers_exist_and_agree_with_the_python_range():
    assert set(PROJECT["classifiers"]) <= classifiers
    versions = classified("Programming Language :: Python")
    assert versions
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in versions)


def test_every_address_of_the_repository_has_the_same_owner():
    pages = [ROOT / "pyproject.toml", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    owners = {
        owner for page in pages for owner in re.findall(r"github\.com/([\w-]+)/smolforge", page.read_text("utf-8"))
    }
    assert len(owners) == 1
    assert all("/smolforge" in address for address in PROJECT["urls"].values())


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))


def test_workflow_of_ci_runs_what_a_person_runs():
    steps = workflow("ci.yml")["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").read_text("utf-8").rstrip().endswith("make test")


def test_workflow_of_ci_has_every_python_system_and_both_ends_of_the_dependencies():
    job = workflow("ci.yml")["jobs"]["everywhere"]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == classified("Programming Language :: Python")
    runners = {"Linux": "ubuntu-latest", "MacOS": "macos-latest", "Windows": "windows-latest"}
    assert matrix["system"] == [runners[name] for name in classified("Operating System")]
    oldest = {"python": matrix["python"][0], "dependencies": "oldest"}
    assert matrix["include"] == [{"system": system} | oldest for system in matrix["system"]]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert "'oldest' && '--constraint constraints-oldest.txt'" in commands[0]
    assert commands[1].startswith('python -m pytest -m "not long" ')


def test_workflow_of_publishing_uploads_only_what_was_tested():
    content = workflow("publish.yml")
    assert content[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` so
    jobs = content["jobs"]
    assert jobs["publish"]["needs"] == ["test", "build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert content["permissions"] == {"contents": "read"}
    assert not any("id-token" in job.get("permissions", {}) for name, job in jobs.items() if name != "publish")
    assert "secrets" not in (ROOT / ".github" / "workflows" / "publish.yml").read_text("utf-8")


def test_image_has_a_fitting_python_and_runs_smolforge_without_rights():
    lines = [line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    python = re.fullmatch(r"FROM python:([\d.]+)-slim", lines[0])
    assert python and SpecifierSet(PROJECT["requires-python"]).contains(python[1])
    assert lines[-1] == 'ENTRYPOINT ["smolforge"]'
    assert "USER smolforge" in lines
    copied = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    needed = {"src", "recipes", "pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert copied == needed
