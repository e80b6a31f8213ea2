"""What is installed: the extras, the pinned versions, and that the code imports nothing else."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "smolforge"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
NOT_INSTALLED_HERE = {"gradio", "ray"}
"""A Space installs the first for itself; a user of a cluster installs the second."""
PART_OF = {"markupsafe": "jinja2", "starlette": "fastapi", "tqdm": "huggingface-hub"}
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
        for extras in re.findall(r"(?:smolforge|-e '\.)\[([a-z, ]+)\]", page.read_text("utf-8"))
        for extra in extras.split(",")
    }
    assert {"data", "harness", "server", "verify"} <= named <= EXTRAS.keys()


def test_every_import_is_a_dependency_or_in_an_extra():
    extras = (each for name, extra in EXTRAS.items() if name != "test" for each in extra)
    declared = names([*map(Requirement, PROJECT["dependencies"]), *extras])
    distributions = packages_distributions()
    for package in imported_packages() - NOT_INSTALLED_HERE:
        if package in PART_OF:
            assert PART_OF[package] in declared
            assert package in names([Requirement(line) for line in requires(PART_OF[package]) or []])
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


def test_package_says_that_it_is_typed():
    assert (SOURCE / "py.typed").is_file()
