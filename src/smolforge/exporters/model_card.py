"""A model card from what a model's folder and its run say of themselves: README.md, and its loss curve beside it.

MODEL  ->  origin (run, base)  ->  scores  ->  head (YAML, as the Hub reads it) and sections (Markdown)

Nothing is in it that the files do not say; the same model makes the same card.

The parts of a model card, each as Markdown from what is known; a part of which nothing is known says so.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from smolforge.checkpoint import loading
from smolforge.config import Source
from smolforge.data.sources.hub import name_of
from smolforge.exporters.provenance import HELD_OUT, ONLY, Origin, Run, Score, origin, scores
from smolforge.models.stats import active_parameters, parameter_counts
from smolforge.training.run_folder import RECIPE

FIGURE = "loss.png"
PLACES = ("tokenizer", "init_from", "sources", "source", "cache", "evaluate_tasks")
"""Settings that may name a file or folder."""
PAPER = "https://arxiv.org/abs/2502.02737"
CITATION = """```bibtex
@article{allal2025smollm2,
  title = {SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small Language Model},
  author = {Loubna {Ben Allal} and others},
  journal = {arXiv preprint arXiv:2502.02737},
  year = {2025}
}
```"""


def what(known: Origin, chats: bool) -> str:
    """One paragraph: what it is, and where it began."""
    total = sum(parameter_counts(known.config).values())
    kind = "chat model" if chats else "language model"
    said = f"A {known.config.model_type}-shaped {kind} with {total:,} parameters"
    if known.run is None:
        whole = f", as in {_linked(known)}" if known.base else ""
        return f"{said}{whole}. How it was trained is not known where this card was written."
    began = f"from the weights of {_linked(known)}" if known.base else "from random weights"
    return f"{said}, trained {began} on {known.run.tokens:,} tokens in {known.run.step:,} steps."


def _linked(known: Origin) -> str:
    repo = known.base_repo
    return f"[{repo}](https://huggingface.co/{repo}) (`{known.base}`)" if repo else f"`{known.base}`"


def use(name: str, chats: bool) -> str:
    """How to run it."""
    if chats:
        asks = 'messages = [{"role": "user", "content": "Hello!"}]\n'
        asks += "ids = tokenizer.apply_chat_template(\n"
        asks += '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
    else:
        asks = 'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
    verb = f"generate {name}" + ("" if chats else ' --prompt "Once upon a time"')
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n{asks}'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0], skip_special_tokens=True))\n```\n\n"
        f"With smolforge: `smolforge {verb}`{' is a chat on a terminal' if chats else ''}, `smolforge serve {name}` "
        "answers OpenAI's clients."
    )


def shape(known: Origin) -> str:
    """The numbers of config.json that make it what it is."""
    config = known.config
    counts = parameter_counts(config)
    rows = {
        "architecture": config.model_type,
        "hidden size": f"{config.hidden_size:,}",
        "layers": config.num_hidden_layers,
        "attention heads, of keys and values": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "feed-forward size": f"{config.intermediate_size:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "head": "tied to the embedding" if config.tie_word_embeddings else "of its own",
        "parameters": f"{sum(counts.values()):,}",
        **{f"of them {part.replace('lm_head', 'head')}": f"{count:,}" for part, count in counts.items()},
    }
    if "experts" in counts:
        rows["met by a token"] = f"{active_parameters(config):,}"
    return "## Shape\n\n" + table(("", ""), list(rows.items()))


def data(run: Run) -> str:
    """What it read, source by source where the corpus counted them."""
    asked = run.recipe.data
    if asked.mixture is not None:
        return mixed(run, asked.mixture)
    facts = run.corpora.get(ONLY, {})
    sources = facts.get("request", {}).get("data", {}).get("sources", asked.sources)
    counted = facts.get("train_tokens_of_sources", {})
    total = facts.get("splits", {}).get("train", {}).get("tokens")
    if not counted and total is not None and len(sources) == 1:
        counted = {sources[0]: total}
    numbers = {source: f"{tokens:,}" for source, tokens in counted.items()}
    rows = [(f"`{run.short(source)}`", numbers.get(source, "not counted alone")) for source in sources]
    said = f"## Data\n\n{table(('source', 'tokens to train on'), rows)}"
    if total is not None:
        held = facts["splits"].get("held_out", {}).get("tokens", 0)
        times = f", {run.tokens / total:.2f} times the corpus" if total and asked.format == "text" else ""
        said += f"\n\n{total:,} tokens to train on and {held:,} held out; {run.tokens:,} were learned from{times}."
    kinds = {
        "chat": "Conversations: what the assistant says is learned.",
        "pairs": "Pairs of answers, for DPO.",
    }
    return said + (f"\n\n{kinds[asked.format]}" if asked.format in kinds else "")


def mixed(run: Run, mixture: Mapping[str, Source]) -> str:
    """What was learned from each source of a mixture."""
    last = run.metrics[-1] if run.metrics else {}
    read = {name: int(last.get(f"tokens_from_{name}", 0)) for name in mixture}
    rows = [
        (name, f"`{run.short(source.source)}`", f"{read[name]:,}", f"{read[name] / max(1, run.tokens):.1%}")
        for name, source in mixture.items()
    ]
    stages = len(run.recipe.data.stages or ())
    said = f"\n\nThe shares changed in {stages} stages; the recipe below has them." if stages else ""
    return f"## Data\n\n{table(('', 'source', 'tokens learned from', 'share'), rows)}{said}"


def training(run: Run, figure: bool) -> str:
    """Machine, time, versions, curve, recipe."""
    said = "## Training\n\n" + table(("", ""), list(_machine(run).items()))
    if figure:
        said += f"\n\n![The loss over tokens]({FIGURE})"
    recipe = _without_places(tomllib.loads((run.path / RECIPE).read_text("utf-8")), run)
    return said + (
        "\n\nThe whole recipe, which `smolforge train` repeats:\n\n<details><summary>recipe.toml</summary>\n\n"
        f"```toml\n{tomli_w.dumps(recipe)}```\n\n</details>"
    )


def _machine(run: Run) -> dict[str, Any]:
    rows: dict[str, Any] = {"time of training": duration(run.seconds)}
    first = run.starts[0] if run.starts else {}
    last = run.starts[-1] if run.starts else {}
    keys = {"device": "name", "kind": "device", "processes": "ranks", "threads": "threads", "commit": "commit"}
    for name, key in keys.items():
        values = list(dict.fromkeys(str(start[key]) for start in run.starts if start.get(key) is not None))
        if values:
            rows[name] = ", ".join(values)
    rows["precision"] = run.recipe.train.dtype
    if first.get("time"):
        rows["begun"] = first["time"]
    if len(run.starts) > 1:
        rows["starts"] = len(run.starts)
    packages = last.get("packages")
    if isinstance(packages, dict):
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    return rows


def results(found: Sequence[Score]) -> str:
    """Scores, each with its standard error where it has one."""
    if not found:
        return "## Evaluation\n\nNot evaluated."
    rows = [(each.task, each.metric, _value(each), f"{each.n:,}" if each.n else "", each.how) for each in found]
    said = f"## Evaluation\n\n{table(('on', 'metric', 'value', 'n', 'measured'), rows)}"
    note = "± is one standard error of the items. acc_norm is by bytes, acc_chars by characters of an answer."
    return said + (f"\n\n{note}" if any(each.stderr is not None for each in found) else "")


def _value(score: Score) -> str:
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def license_section(known: Origin, name: str) -> str:
    """Licence, and whom to cite."""
    said = f"## Licence and citation\n\n{name}."
    if known.from_smollm:
        said += f" {known.base_repo} is Hugging Face's, under Apache 2.0 ([SmolLM2]({PAPER})):\n\n{CITATION}"
    return said


def duration(seconds: float) -> str:
    """In the units a person would say."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _without_places(value: Any, run: Run, place: bool = False) -> Any:
    """A recipe in which what names a file or folder says no more than its name."""
    match value:
        case dict():
            return {key: _without_places(each, run, key in PLACES) for key, each in value.items()}
        case list():
            return [_without_places(each, run, place) for each in value]
        case str() if place:
            return run.short(value)
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as Markdown; what people named stays within its cell."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


README = "README.md"
Draw = Callable[[Path, Path, str], None]
"""Draws the loss curve of a run's folder into a file, under a title."""
LICENSE = "apache-2.0"


def write(
    folder: Path,
    model: str | Path,
    name: str,
    draw: Draw,
    licence: str = LICENSE,
    told: Path | None = None,
) -> None:
    """Put the card of a MODEL into a folder; `name` is what it will be loaded by, `told` a file of scores."""
    known = origin(model)
    found = scores(known, told)
    drawn = known.run is not None and any("loss" in record for record in known.run.metrics)
    if known.run is not None and drawn:
        draw(known.run.path, folder / FIGURE, name)
    (folder / README).write_text(card(known, found, name, licence, drawn), "utf-8")


def card(known: Origin, found: Sequence[Score], name: str, licence: str, figure: bool) -> str:
    """The whole README.md."""
    chats = _chats(known.folder)
    parts = [f"# {name.rpartition('/')[2]}", what(known, chats), use(name, chats)]
    parts += [results(found), shape(known)]
    if known.run is not None:
        parts += [data(known.run), training(known.run, figure)]
    return (
        f"---\n{head(known, found, name, licence, chats)}\n---\n\n"
        + "\n\n".join([*parts, license_section(known, licence)])
        + "\n"
    )


def head(known: Origin, found: Sequence[Score], name: str, licence: str, chats: bool) -> str:
    """The YAML, made by the Hub's own classes.

    Scores are a model-index: the newer `.eval_results/` takes only data sets that are registered as benchmarks.
    """
    from huggingface_hub import ModelCardData

    results = [_result(score) for score in found]
    return ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["smolforge", *(["conversational"] if chats else [])],
        base_model=known.base_repo,
        datasets=_datasets(known) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _result(score: Score) -> Any:
    from huggingface_hub import EvalResult

    error = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
    count = f", n {score.n:,}" if score.n else ""
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.dataset or ("held-out" if score.task == HELD_OUT else score.task),
        dataset_name=score.task,
        metric_type=score.metric,
        metric_name=f"{score.metric}{error}{count} ({score.how})",
        metric_value=round(score.value, 6),
    )


def _datasets(known: Origin) -> list[str]:
    """Those of the Hub that were read: the corpus has the commit of each."""
    stamps = known.run.stamps if known.run else {}
    names = [name_of(source) for source, stamp in stamps.items() if len(stamp) == 1]
    return list(dict.fromkeys(name.repo for name in names if name is not None))


def _chats(folder: Path) -> bool:
    tokenizer = loading.tokenizer_of(loading.with_tokenizer(folder))
    return tokenizer is not None and tokenizer.template is not None
