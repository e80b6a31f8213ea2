"""A model -> a folder with a Gradio app that runs the same here and as a Space.

app.py             chat where there is a template, completion where there is none; Transformers loads the model
requirements.txt   the versions it was written for
README.md          what the Hub reads of a Space
model/             the model as Transformers reads it; not there where the app loads a Hub id, at one commit
"""

import re
from importlib import metadata
from pathlib import Path

import yaml

from smolforge import atomic
from smolforge.checkpoint import loading, nanotron, peft_adapter
from smolforge.checkpoint.hub import split_hub_id
from smolforge.errors import ConfigError, MissingResourceError, install_command
from smolforge.exporters.transformers import new_folder, to_transformers

GRADIO = "6.31.0"
"""What the apps were tried with."""
FOLDER = "model"
CONSTANTS_LINE = 'MODEL, REVISION, TITLE = "model", "main", "A model"'
"""The line of an app that says what it shows."""


def to_space(
    model: str | Path, out: Path, dtype: str | None = None, *, license_id: str = "apache-2.0"
) -> dict[str, int]:
    """Write `out`, whole or not at all; returns its files' sizes.

    Raises ConfigError where `out` has something in it, the model has no tokenizer, or a dtype is asked of one that the
    app loads from the Hub, and what to_transformers raises.
    """
    out = new_folder(out)
    source = loading.resolve_model_path(model)
    tokenizer = loading.tokenizer_of(loading.tokenizer_folder(source))
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so nobody could write to it")
    chats = tokenizer.template is not None
    repo, revision = _hub_source(model, source) or (FOLDER, "main")
    if dtype is not None and repo != FOLDER:
        raise ConfigError(f"dtype is {dtype!r}, but the app loads {model} from the Hub, as it is there; leave it out")
    title = repo.rpartition("/")[2] if repo != FOLDER else out.name

    def fill(folder: Path) -> None:
        if repo == FOLDER:
            to_transformers(model, folder / FOLDER, dtype)
        (folder / "app.py").write_text(app_code(chats, repo, revision, title=title), "utf-8", newline="\n")
        (folder / "requirements.txt").write_text(requirements(), "utf-8", newline="\n")
        (folder / "README.md").write_text(
            space_readme(title, chats, repo, license_id=license_id), "utf-8", newline="\n"
        )

    atomic.write_dir_atomic(out, fill)
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def _hub_source(model: str | Path, source: Path) -> tuple[str, str] | None:
    """The repository and the commit that Transformers loads a MODEL from by itself."""
    if Path(model).exists() or peft_adapter.is_adapter(source) or nanotron.is_checkpoint(source):
        return None
    return split_hub_id(str(model))[0], source.name


def app_code(chats: bool, model: str, revision: str, *, title: str) -> str:
    """The page's code."""
    code = Path(__file__).with_name("chat.py" if chats else "completion.py").read_text("utf-8")
    assert code.count(CONSTANTS_LINE) == 1
    quoted = (f'"{model}"', f'"{revision}"', '"' + re.sub(r"[^\w .+-]", "-", title) + '"')
    return code.replace(CONSTANTS_LINE, f"MODEL, REVISION, TITLE = {', '.join(quoted)}")


def requirements() -> str:
    """Return exact versions; of torch, its CPU build.

    Raises MissingResourceError where Transformers is not installed.
    """
    try:
        pins = {"gradio": GRADIO} | {
            name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")
        }
    except metadata.PackageNotFoundError:
        raise MissingResourceError(
            f"a Space runs with the version of Transformers that is here, and none is; {install_command('verify')}"
        ) from None
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    return "".join(f"{line}\n" for line in (index, *(f"{name}=={version}" for name, version in pins.items())))


def space_readme(title: str, chats: bool, model: str, *, license_id: str) -> str:
    """README.md, whose head tells the Hub how to run it: https://huggingface.co/docs/hub/spaces-config-reference."""
    head = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "license": license_id,
        **({"models": [model]} if model != FOLDER else {}),
    }
    verb = "Chat with" if chats else "Continue a text with"
    model_link = f"[{model}](https://huggingface.co/{model})" if model != FOLDER else f"the model in `{FOLDER}/`"
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}\n\n{verb} {model_link}. Here as on the Hub:\n\n"
        "```\npip install -r requirements.txt\npython app.py\n```\n"
    )
