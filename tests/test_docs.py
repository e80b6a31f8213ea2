"""Pages do what they say: what is generated is current, blocks run, commands parse, links and files are there."""

import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, Block, anchors, blocks, commands_in_prose, is_as_shown
from test_sft import Typed, chats

from smolforge import __version__, cli
from smolforge.checkpoint import huggingface
from smolforge.cli.overrides import parse_overrides
from smolforge.comparison.study.spec import read_study
from smolforge.config.load import read_recipe, to_recipe
from smolforge.testing import sentences, tiny_model

DOCS = ROOT / "docs"
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = ("bash", "python")
ELSEWHERE = {
    "README.md": "test_readme.py",
    "docs/corpora.md": "test_minhash.py",
    "docs/tuning.md": "test_sft.py",
    "docs/own-classes.md": "test_custom_classes.py",
    "docs/howto/add-a-model.md": "test_howto.py",
    "docs/howto/add-an-optimizer.md": "test_howto.py",
    "docs/howto/add-a-tracker.md": "test_howto.py",
    "docs/howto/add-a-task.md": "test_howto.py",
}
"""Pages whose blocks another test runs."""
APART = ("smolforge quickstart", "smolforge serve")
"""What takes minutes or never ends: test_readme.py and test_server.py."""
BEFORE = {"docs/howto/evaluate.md": "smolforge train nano --run runs/mine --data.sources my.txt --budget 5m"}
"""What a page takes for granted."""
LONG = ("docs/howto", "docs/commands.md")
NOT_RUN = {
    "docs/machines.md smolforge inspect machine": "half a minute; tests/test_machine_report.py runs it",
    "README.md make quickstart": "sets up an environment and runs all tests; tests/test_readme.py has the quickstart",
    "docs/clusters.md torchrun --standalone": "needs GPUs; tests/test_distributed.py starts ranks on a processor",
    "docs/clusters.md torchrun --nnodes": "needs machines",
    "docs/clusters.md #!/bin/bash": "needs Slurm",
    "docs/decay.md smolforge train": "needs the Hub; tests/test_decay_recipe.py",
    "docs/decay.md hf download": "needs the Hub; tests/test_nanotron.py",
    "docs/gguf.md smolforge export": "tests/test_gguf.py",
    "docs/howto/add-a-model.md python": "tests of the repository",
    "docs/howto/add-a-task.md smolforge evaluate": "downloads a benchmark; tests/test_evaluate.py",
    "docs/howto/compare-two-ideas.md smolforge compare": "tests/test_comparison.py",
    "docs/howto/evaluate.md smolforge evaluate": "downloads benchmarks; tests/test_evaluate.py, tests/test_harness.py",
    "docs/howto/read-the-code.md python": "tests of the repository",
    "docs/howto/resume-and-extend.md smolforge train wikitext": "two days; benchmarks/proof_run.py does it",
    "docs/own-classes.md smolforge verify": "tests/test_custom_classes.py",
    "docs/own-classes.md smolforge train": "hours; tests/test_custom_classes.py has it small",
    "docs/quantization.md smolforge export": "tests/test_quantize.py",
    "docs/quantization.md smolforge verify": "tests/test_quantize.py",
    "docs/quantization.md make .released": "half an hour; tests/test_gptq.py holds its best figures in the long tests",
    "docs/quantization.md smolforge train": "a quarter of an hour; tests/test_released_lifecycle.py has a few steps",
    "docs/performance.md make .released": "builds llama.cpp; tests/test_benchmarks.py runs the benchmark",
    "README.md pip install": "needs the repository; tests/test_wheel.py installs the wheel",
    "docs/releasing.md git tag": "publishes",
    "docs/reliability.md smolforge train": "needs a mounted disk; tests/test_mirror.py, tests/test_examples.py",
    "docs/serving.md docker build": "needs Docker",
    "docs/serving.md pip install": "never ends; tests/test_server.py",
    "docs/serving.md export SMOLFORGE_API_KEY": "never ends; tests/test_server.py",
    "docs/sharing.md smolforge export runs/mine --to hub": "needs the Hub; tests/test_export_hub.py",
    "docs/sharing.md smolforge export runs/mine --to space": "installs Gradio; tests/test_export_hub.py",
    "docs/talking.md smolforge chat": "tests/test_chat_session.py",
    "docs/tuning.md smolforge train smollm2-135m-instruct": "tests/test_lora.py",
    "docs/tuning.md smolforge train smollm2-135m-dpo": "tests/test_dpo.py",
    "docs/watching.md smolforge train": "tells trackers of others; tests/test_tracking.py",
}
"""Blocks of commands that no test runs as they stand, by page and how they begin, and why."""


def test_generated_pages_are_current():
    generator = runpy.run_path(str(DOCS / "generate.py"))
    for name, make in generator["PAGES"].items():
        assert (DOCS / name).read_text("utf-8") == make(), "run: python docs/generate.py"


def test_results_pages_equal_the_studies():
    """Pages, and the figures in them; nothing in them says where they were made."""
    generator = runpy.run_path(str(DOCS / "results.py"))
    for page, text in generator["pages"]().items():
        assert page.read_text("utf-8") == text, "run: python docs/results.py"
        for figure in re.findall(r"\]\((\S+\.svg)\)", text):
            assert (page.parent / figure).is_file()
    for numbers in (DOCS / "results").glob("*/study.json"):
        assert not re.search(r"/(tmp|home|root|work|Users)/", numbers.read_text("utf-8"))


@pytest.mark.skipif(
    f"\nmatplotlib=={version('matplotlib')}\n" not in (ROOT / "constraints.txt").read_text("utf-8"),
    reason="each version of matplotlib draws other bytes",
)
def test_results_figures_are_drawn_from_their_numbers(tmp_path):
    generator = runpy.run_path(str(DOCS / "results.py"))
    kept = DOCS / "results" / "gqa-against-mha"
    shutil.copy(kept / "study.json", tmp_path)
    generator["figures"](tmp_path)
    for file in tmp_path.glob("*.svg"):
        assert file.read_bytes() == (kept / file.name).read_bytes(), "run: python docs/results.py"


@pytest.fixture
def home(tmp_path, monkeypatch, hub):
    """A reader's folder: recipes and examples, texts of their own, a Hub where the name stands for a small model."""
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.txt").write_text(sentences(1500))
    (tmp_path / "notes.txt").write_text(sentences(40, 5000))
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in chats(40)))
    items = [{"query": "the model", "choices": [" reads", " xyz"], "gold": number % 2} for number in range(6)]
    (tmp_path / "my_items.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in items))
    model = tiny_model(max_position_embeddings=2048)
    huggingface.save(model, tmp_path / "small", model.tokenizer)
    hub.add("HuggingFaceTB/SmolLM2-135M", tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = {
    "--budget [0-9]+[mh]": "--budget 8K-tokens",
    r"steps 100\b": "steps 4",
    r"steps 500\b": "steps 6",
    r"steps 550\b": "steps 8",
    r"tokens = 131_072": "tokens = 2_048",
    r"\[settings\]": "[settings]\nmodel.num_hidden_layers = 1\nmodel.vocab_size = 400\ntrain.evaluate_tokens = 512",
}
"""Of what stands on a page, what a test has no time for; and a nano model is made smaller in `words_of`."""


def shortened(content: str) -> str:
    for long, short in SHORT.items():
        content = re.sub(long, short, content)
    return content


def words_of(command: str) -> list[str]:
    program, *words = shlex.split(shortened(command))
    assert program == "smolforge", command
    small = ["--model.num-hidden-layers", "1", "--model.vocab-size", "400", "--train.batch-tokens", "512"]
    return [*words, *(small if words[:2] == ["train", "nano"] and "--init-from" not in words else [])]


def pages_to_run():
    runs = {block.page for block in BLOCKS if block.language in RUN} - ELSEWHERE.keys()
    return [pytest.param(page, marks=pytest.mark.long if page.startswith(LONG) else ()) for page in sorted(runs)]


@pytest.mark.parametrize("page", pages_to_run())
@pytest.mark.usefixtures("compiling")
def test_page_code_blocks_run(page, home, capsys, monkeypatch):
    """Its Python and its commands, in their order; what they print is what the page shows."""
    monkeypatch.setattr("sys.stdin", Typed(["Hello!"]))
    session: dict[str, object] = {"__name__": page}
    if page in BEFORE:
        assert cli.run(words_of(BEFORE[page])) == 0
    for block in (each for each in BLOCKS if each.page == page):
        if block.file:
            (home / block.file).write_text(shortened(block.content))
        if block.language == "python":
            exec(compile(block.content, str(block), "exec"), session)
        for command in block.commands if block.language == "bash" else ():
            if command.startswith(APART):
                continue
            assert cli.run(words_of(command)) == 0, f"{block}: {command}\n{capsys.readouterr().err}"
        printed = capsys.readouterr().out
        if block.printed is not None and block.language in RUN:
            assert is_as_shown(block.printed, printed), f"{block} prints\n{printed}"


def test_pages_run_by_other_tests_are_named_there():
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / "tests" / test).read_text()


def test_code_blocks_not_run_have_a_reason():
    shown = [f"{block.page} {block.content.strip()}" for block in BLOCKS if block.language == "sh"]
    for block in shown:
        assert any(block.startswith(begin) for begin in NOT_RUN), block.splitlines()[0]
    for begin, reason in NOT_RUN.items():
        assert any(block.startswith(begin) for block in shown), f"no such block: {begin}"
        for name in re.findall(r"tests/test_\w+\.py", reason):
            assert (ROOT / name).is_file()


def test_commands_in_docs_exist(monkeypatch):
    """Every line of a shell, and every `command` within a sentence: verbs, flags, values, recipes, targets, extras."""
    monkeypatch.chdir(ROOT)
    plain = [
        block for block in BLOCKS if ELSEWHERE.get(block.page) != "test_howto.py"
    ]  # those change the package first
    commands = [(str(block), line) for block in plain if block.language in ("sh", "bash") for line in block.commands]
    commands += [found for page in PAGES for found in commands_in_prose(page)]
    assert len(commands) > 80
    wrong = [f"{where}: {line}: {error}" for where, line in commands if (error := fault(line))]
    assert not wrong, "\n".join(wrong)


def fault(line: str) -> str | None:
    """What is wrong with a line of a shell."""
    try:
        check_command(line)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


REQUIRED = {"train": ("--run",), "prepare": ("--out",), "export": ("--to", "--out")}
"""Flags that a sentence may leave unsaid."""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = " ".join(re.findall(r"^([\w.%/ -]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)).split()


def check_command(line: str) -> None:
    """One line of a shell, each part of it."""
    for part in re.split(r"&&|\|\||;", line.partition(" > ")[0]):
        words = shlex.split(part.replace("...", " "), comments=True)
        for program in ("smolforge", "make", "pip", "python"):
            if program in words and "[" not in words:
                CHECKS[program](words[words.index(program) + 1 :])
                break


def check_smolforge(words: list[str]) -> None:
    if not words or words[0].isupper():
        return
    while "--own" in words:
        del words[words.index("--own") : words.index("--own") + 2]
    if words[0].startswith("--"):
        return
    given = [*words, *(word for flag in REQUIRED.get(words[0], ()) if flag not in words for word in (flag, "gguf"))]
    if len(words) == 1 or words[1].startswith("--"):
        given.insert(1, "nano") if words[0] not in ("prepare", "quickstart", "compare") else None
    function, bound, _ = cli.build_cli().parse_args(given, exit_on_error=False, print_error=False)
    assert function.__name__ == words[0]
    overrides = parse_overrides(bound.arguments.get("settings", ()))
    recipe = bound.arguments.get("recipe", "")
    if recipe and not recipe.isupper() and (Path(recipe).is_file() or not recipe.endswith(".toml")):
        read_recipe(recipe, overrides)


def check_make(words: list[str]) -> None:
    for target in (word for word in words if "=" not in word):
        assert any(re.fullmatch(known.replace("%", ".+"), target) for known in TARGETS), f"no target {target}"


def check_pip(words: list[str]) -> None:
    for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(names.split(",")) <= EXTRAS.keys(), names


def check_python(words: list[str]) -> None:
    files = [word for word in words if word.endswith(".py") and "/" in word]
    assert all((ROOT / file).is_file() for file in files), files


CHECKS = {"smolforge": check_smolforge, "make": check_make, "pip": check_pip, "python": check_python}


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language == "python"], ids=str)
def test_python_blocks_compile_and_import(block: Block):
    for node in ast.walk(ast.parse(block.content, str(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language in ("toml", "json", "jsonl")], ids=str)
def test_shown_recipes_and_studies_are_valid(block: Block, tmp_path):
    """Recipes and studies whole, with every setting known."""
    if block.language != "toml":
        assert all(json.loads(line) for line in block.content.splitlines())
        return
    tree = tomllib.loads(block.content)
    if "study" in tree:
        (tmp_path / "study.toml").write_text(block.content)
        assert len(read_study(tmp_path / "study.toml").recipes) > 1
    else:
        nano = tomllib.loads((ROOT / "recipes" / "nano.toml").read_text())
        to_recipe(nano | tree)


FILE = re.compile(r"\b(?:tests|benchmarks|examples|recipes|docs|src/smolforge)/[\w/-]+\.(?:py|toml|md|ipynb|sh)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_exist(page):
    content = page.read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)", content):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
    added = {block.file for block in blocks(page)}
    for name in set(FILE.findall(content)) - added:
        assert (ROOT / name).exists(), name
    for address in re.findall(r"https?://[^\s)>\"'`]*", content):
        assert re.match(r"https?://([\w-]+\.)+\w+|https?://(127\.0\.0\.1|localhost|\[)", address), address


def test_names_after_a_source_link_are_in_that_file():
    """In a table of the code, `Names` follow the link to the file that has them."""
    page = DOCS / "howto" / "read-the-code.md"
    found = re.findall(r"\]\((\S+\.py)\)((?:,? ?`\w+`)+)", page.read_text("utf-8"))
    assert len(found) > 10
    for target, names in found:
        source = (page.parent / target).read_text("utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^\s*(?:class|def) {name}\b", source, re.MULTILINE), f"{target}: {name}"


def test_docs_index_lists_every_page():
    index = (DOCS / "README.md").read_text("utf-8")
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", index)}
    pages = {page for page in PAGES if page.is_relative_to(DOCS) and page.parent.parent != DOCS / "results"}
    assert pages - linked == {DOCS / "README.md"}


def test_citation_file_has_the_required_fields():
    """https://github.com/citation-file-format/citation-file-format, 1.2.0."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] in ("software", "dataset")
    assert str(cited["version"]) == __version__
    assert all(author.get("name") or author.get("family-names") for author in cited["authors"])
    for other in cited["references"]:
        assert {"type", "title", "authors"} <= other.keys()


def test_changelog_follows_keep_a_changelog():
    """Keep a Changelog: versions, newest first, under them what was added, changed, fixed; what is named is there."""
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)
    assert versions[0] == "Unreleased" or versions[0] == __version__
    kinds = re.findall(r"^### (\w+)", changes, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    recipes = changes.partition("- Recipes: ")[2].partition("`init_moments`")[0]
    named = set(re.findall(r"`([\w-]+)`", recipes)) - {"-instruct", "-dpo"} | {
        "smollm2-135m-instruct",
        "smollm2-135m-dpo",
    }
    assert named == {file.stem for file in (ROOT / "recipes").glob("*.toml")}
