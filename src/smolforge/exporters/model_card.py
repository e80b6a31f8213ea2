"""Write a model card from what a model's folder and its run record: README.md, with the loss curve beside it.

MODEL  ->  origin (run, base)  ->  scores  ->  card_metadata (YAML for the Hub) and sections (Markdown)

The card holds nothing that the files do not say, and a section with nothing known says so. The same model makes the
same card.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from smolforge.checkpoint import loading
from smolforge.config import Source
from smolforge.data.sources.hub import parse_name
from smolforge.exporters.provenance import (
    SINGLE_CORPUS,
    VALIDATION_TASK,
    Origin,
    RecordedScore,
    RunProvenance,
    read_origin,
    read_scores,
)
from smolforge.formatting import format_duration
from smolforge.models.stats import active_parameters, parameter_counts
from smolforge.training.run_folder import RECIPE

FIGURE = "loss.png"
PATH_SETTINGS = ("tokenizer", "init_from", "sources", "source", "cache", "evaluate_tasks")
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
README = "README.md"
DrawLoss = Callable[[Path, Path, str], None]
"""Draws the loss curve of a run's folder into a file, under a title."""
LICENSE = "apache-2.0"


def describe_model(origin: Origin, chats: bool) -> str:
    """One paragraph: what it is, and where it began."""
    total = sum(parameter_counts(origin.config).values())
    kind = "chat model" if chats else "language model"
    text = f"A {origin.config.model_type}-shaped {kind} with {total:,} parameters"
    if origin.run is None:
        base_note = f", as in {_base_link(origin)}" if origin.base else ""
        return f"{text}{base_note}. How it was trained is not known where this card was written."
    start = f"from the weights of {_base_link(origin)}" if origin.base else "from random weights"
    return f"{text}, trained {start} on {origin.run.tokens:,} tokens in {origin.run.step:,} steps."


def _base_link(origin: Origin) -> str:
    repo = origin.base_repo
    return f"[{repo}](https://huggingface.co/{repo}) (`{origin.base}`)" if repo else f"`{origin.base}`"


def usage_section(name: str, chats: bool) -> str:
    """How to run it."""
    if chats:
        prompt_code = 'messages = [{"role": "user", "content": "Hello!"}]\n'
        prompt_code += "ids = tokenizer.apply_chat_template(\n"
        prompt_code += '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
    else:
        prompt_code = 'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
    verb = f"generate {name}" + ("" if chats else ' --prompt "Once upon a time"')
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n{prompt_code}'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0], skip_special_tokens=True))\n```\n\n"
        f"With smolforge: `smolforge {verb}`{' is a chat on a terminal' if chats else ''}, `smolforge serve {name}` "
        "answers OpenAI's clients."
    )


def shape_section(origin: Origin) -> str:
    """The numbers of config.json that make it what it is."""
    config = origin.config
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
    return "## Shape\n\n" + markdown_table(("", ""), list(rows.items()))


def data_section(run: RunProvenance) -> str:
    """What it read, source by source where the corpus counted them."""
    settings = run.recipe.data
    if settings.mixture is not None:
        return mixture_section(run, settings.mixture)
    metadata = run.corpora.get(SINGLE_CORPUS, {})
    sources = metadata.get("request", {}).get("data", {}).get("sources", settings.sources)
    tokens_by_source = metadata.get("train_tokens_of_sources", {})
    total = metadata.get("splits", {}).get("train", {}).get("tokens")
    if not tokens_by_source and total is not None and len(sources) == 1:
        tokens_by_source = {sources[0]: total}
    numbers = {source: f"{tokens:,}" for source, tokens in tokens_by_source.items()}
    rows = [(f"`{run.portable_name(source)}`", numbers.get(source, "not counted alone")) for source in sources]
    text = f"## Data\n\n{markdown_table(('source', 'tokens to train on'), rows)}"
    if total is not None:
        validation_tokens = metadata["splits"].get("held_out", {}).get("tokens", 0)
        epochs_note = f", {run.tokens / total:.2f} times the corpus" if total and settings.format == "text" else ""
        text += f"\n\n{total:,} tokens to train on and {validation_tokens:,} held out; "
        text += f"{run.tokens:,} were learned from{epochs_note}."
    kinds = {"chat": "Conversations: what the assistant says is learned.", "pairs": "Pairs of answers, for DPO."}
    return text + (f"\n\n{kinds[settings.format]}" if settings.format in kinds else "")


def mixture_section(run: RunProvenance, mixture: Mapping[str, Source]) -> str:
    """What was learned from each source of a mixture."""
    last = run.metrics[-1] if run.metrics else {}
    tokens_by_source = {name: int(last.get(f"tokens_from_{name}", 0)) for name in mixture}
    rows = [
        (
            name,
            f"`{run.portable_name(source.source)}`",
            f"{tokens_by_source[name]:,}",
            f"{tokens_by_source[name] / max(1, run.tokens):.1%}",
        )
        for name, source in mixture.items()
    ]
    stages = len(run.recipe.data.stages or ())
    stages_note = f"\n\nThe shares changed in {stages} stages; the recipe below has them." if stages else ""
    return f"## Data\n\n{markdown_table(('', 'source', 'tokens learned from', 'share'), rows)}{stages_note}"


def training_section(run: RunProvenance, figure: bool) -> str:
    """Machine, time, versions, curve, recipe."""
    text = "## Training\n\n" + markdown_table(("", ""), list(_training_rows(run).items()))
    if figure:
        text += f"\n\n![The loss over tokens]({FIGURE})"
    recipe = _without_paths(tomllib.loads((run.path / RECIPE).read_text("utf-8")), run)
    return text + (
        "\n\nThe whole recipe, which `smolforge train` repeats:\n\n<details><summary>recipe.toml</summary>\n\n"
        f"```toml\n{tomli_w.dumps(recipe)}```\n\n</details>"
    )


def _training_rows(run: RunProvenance) -> dict[str, Any]:
    rows: dict[str, Any] = {"time of training": format_duration(run.seconds)}
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


def evaluation_section(scores: Sequence[RecordedScore]) -> str:
    """Scores, each with its standard error where it has one."""
    if not scores:
        return "## Evaluation\n\nNot evaluated."
    rows = [
        (score.task, score.metric, _format_score(score), f"{score.n:,}" if score.n else "", score.source)
        for score in scores
    ]
    text = f"## Evaluation\n\n{markdown_table(('on', 'metric', 'value', 'n', 'measured'), rows)}"
    note = "± is one standard error of the items. acc_norm is by bytes, acc_chars by characters of an answer."
    return text + (f"\n\n{note}" if any(score.stderr is not None for score in scores) else "")


def _format_score(score: RecordedScore) -> str:
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def license_section(origin: Origin, license_id: str) -> str:
    """Licence, and whom to cite."""
    text = f"## Licence and citation\n\n{license_id}."
    if origin.from_smollm:
        text += f" {origin.base_repo} is Hugging Face's, under Apache 2.0 ([SmolLM2]({PAPER})):\n\n{CITATION}"
    return text


def _without_paths(value: Any, run: RunProvenance, is_path: bool = False) -> Any:
    """A recipe in which what names a file or folder says no more than its name."""
    match value:
        case dict():
            return {key: _without_paths(item, run, key in PATH_SETTINGS) for key, item in value.items()}
        case list():
            return [_without_paths(item, run, is_path) for item in value]
        case str() if is_path:
            return run.portable_name(value)
    return value


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as Markdown; what people named stays within its cell."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def write_model_card(
    folder: Path,
    model: str | Path,
    name: str,
    *,
    draw: DrawLoss,
    license_id: str = LICENSE,
    scores_path: Path | None = None,
) -> None:
    """Put the card of a MODEL into a folder; `name` is what it will be loaded by, `scores_path` a file of scores."""
    origin = read_origin(model)
    scores = read_scores(origin, scores_path)
    has_loss = origin.run is not None and any("loss" in record for record in origin.run.metrics)
    if origin.run is not None and has_loss:
        draw(origin.run.path, folder / FIGURE, name)
    (folder / README).write_text(
        render_card(origin, scores, name, license_id=license_id, figure=has_loss), "utf-8", newline="\n"
    )


def render_card(origin: Origin, scores: Sequence[RecordedScore], name: str, *, license_id: str, figure: bool) -> str:
    """The whole README.md."""
    chats = _is_chat_model(origin.folder)
    sections = [f"# {name.rpartition('/')[2]}", describe_model(origin, chats), usage_section(name, chats)]
    sections += [evaluation_section(scores), shape_section(origin)]
    if origin.run is not None:
        sections += [data_section(origin.run), training_section(origin.run, figure)]
    return (
        f"---\n{card_metadata(origin, scores, name, license_id=license_id, chats=chats)}\n---\n\n"
        + "\n\n".join([*sections, license_section(origin, license_id)])
        + "\n"
    )


def card_metadata(origin: Origin, scores: Sequence[RecordedScore], name: str, *, license_id: str, chats: bool) -> str:
    """The YAML, made by the Hub's own classes.

    Scores are a model-index: the newer `.eval_results/` takes only data sets that are registered as benchmarks.
    """
    from huggingface_hub import ModelCardData

    results = [_eval_result(score) for score in scores]
    return ModelCardData(
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["smolforge", *(["conversational"] if chats else [])],
        base_model=origin.base_repo,
        datasets=_hub_datasets(origin) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _eval_result(score: RecordedScore) -> Any:
    from huggingface_hub import EvalResult

    error = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
    count = f", n {score.n:,}" if score.n else ""
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.dataset or ("held-out" if score.task == VALIDATION_TASK else score.task),
        dataset_name=score.task,
        metric_type=score.metric,
        metric_name=f"{score.metric}{error}{count} ({score.source})",
        metric_value=round(score.value, 6),
    )


def _hub_datasets(origin: Origin) -> list[str]:
    """Those of the Hub that were read: the corpus has the commit of each."""
    stamps = origin.run.source_stamps if origin.run else {}
    names = [parse_name(source) for source, stamp in stamps.items() if len(stamp) == 1]
    return list(dict.fromkeys(name.repo for name in names if name is not None))


def _is_chat_model(folder: Path) -> bool:
    tokenizer = loading.tokenizer_of(loading.tokenizer_folder(folder))
    return tokenizer is not None and tokenizer.template is not None
