"""This model against its oracles: Transformers on the same files, the published references, and itself.

files -> strict load -> counts, finite weights -> logits, greedy text, cache -> golden, identity -> tie
                                  |
                                  where one does not hold: every known mistake is tried (causes.py)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch

from smolforge.atomic import MANIFEST
from smolforge.checkpoint import huggingface, loading
from smolforge.errors import InvalidFile, SettingError
from smolforge.models.decoder import LanguageModel
from smolforge.verification import checks, custom_classes, diagnosis
from smolforge.verification.files import files
from smolforge.verification.releases import Release, identify, published, sha256
from smolforge.verification.report import Check, Report
from smolforge.verification.transformers_reference import Oracle, require

ORACLES = ("transformers", "golden")
AGAINST = ("files", *ORACLES)
"""What a model is held to; its files are, whatever else is."""
LENGTHS = (1, 16, 128, 1024)
SHORT = 128
PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "Naïve 12345 \u6f22 \U0001f44b\n\n- ")


def verify(
    model: str | Path,
    against: Sequence[str] = (),
    max_length: int | None = None,
    releases: Sequence[Release] | None = None,
    tell: Callable[[Check], None] = lambda check: None,
) -> Report:
    """All checks of a MODEL; `tell` hears each as it is done.

    It is held `against` all that may know it, unless some are named; a model of integers against the MODEL, here, that
    it was made from, where that is named. `max_length` limits the rows that are compared,
    by default the model's whole context. Raises SettingError for a name that is nothing, or an oracle that cannot know
    the model, and MissingResource where Transformers is not installed; a model that cannot be loaded is a check that
    does not hold.
    """
    unknown = [name for name in against if name not in AGAINST and not Path(name).exists()]
    if unknown:
        known = f"{', '.join(AGAINST[:-1])} or {AGAINST[-1]}"
        raise SettingError(
            f"against is {unknown[0]!r}; it should be {known}, or for a model of integers what it was made from"
        )
    if max_length is not None and max_length < 1:
        raise SettingError(f"max_length is {max_length}; it should be at least 1")
    if not against or "transformers" in against:
        require()
    report = Report(str(model))

    def done(check: Check) -> Check:
        report.checks.append(check)
        tell(check)
        return check

    try:
        report.cause = _verify(report, model, against, max_length, published() if releases is None else releases, done)
    except InvalidFile as error:
        report.cause = done(Check("files", False, str(error))).said
    if not report.holds and report.cause is None:
        report.cause = next(check.said for check in report.checks if not check.holds)
    return report


def _verify(
    report: Report,
    model: str | Path,
    against: Sequence[str],
    max_length: int | None,
    releases: Sequence[Release],
    done: Callable[[Check], Check],
) -> str | None:
    """Go through the checks; returns the likeliest cause where one does not hold and has a name."""
    found = [done(check) for check in files(Path(model))]
    if against and set(against) == {"files"}:
        if not Path(model).exists():
            raise SettingError(f"there is no folder {str(model)!r}, and --against files looks at nothing else")
        if not found:
            said = f"{model} has neither checkpoints nor a {MANIFEST}: nothing says what it should be"
            done(Check("files", False, said))
        return None
    folder = loading.find(model)
    if loading.is_derived(folder):
        raise SettingError(
            f"{model} is no model folder that Transformers opens; export --to transformers makes one, and proves it"
        )
    loaded = loading.load(folder)
    hashes = {path.name: sha256(path) for path in huggingface.files(folder)}
    done(checks.parameters(loaded, folder))
    if not done(checks.finite(loaded)).holds:
        return None
    cause = None
    oracles, originals = ([name for name in against if (name in AGAINST) == known] for known in (True, False))
    if originals and loaded.scheme is None:
        raise SettingError(f"{model} holds no integers, which alone are held against the model they were made from")
    if loaded.config.own_classes or loaded.scheme is not None:
        if oracles:
            classes = f"classes of your own ({', '.join(loaded.config.own_classes.values())}), which"
            what = (
                classes
                if loaded.scheme is None
                else "integers, which --against MODEL holds to what they were made from;"
            )
            raise SettingError(
                f"{model} has {what} {' and '.join(oracles)} cannot know; without --against it is held to itself"
            )
        for original in originals:
            done(checks.rounded(loaded, loading.load(original), original))
        return of_itself(loaded, done)
    wanted = against or ORACLES
    if "transformers" in wanted:
        limit = loaded.config.max_position_embeddings
        cause = against_transformers(loaded, folder, min(max_length or limit, limit), done)
    if "golden" in wanted:
        release = identify(str(model), folder, hashes, releases)
        if release is not None:
            report.release = release.id
            cause = against_release(loaded, folder, release, hashes, done) or cause
        elif "transformers" not in wanted:
            done(Check("golden", False, "no published reference is known for it; --against transformers compares"))
    done(checks.tied(loaded))
    return cause


def of_itself(model: LanguageModel, done: Callable[[Check], Check]) -> None:
    """A model with classes of a person's own, or of integers, which no other implementation need have."""
    ids = torch.tensor([text_ids(model, min(SHORT, model.config.max_position_embeddings))])
    done(custom_classes.causal(model, ids))
    done(checks.cached(model, ids[0].tolist()))
    done(custom_classes.documents(model, ids))
    if model.scheme is None:
        done(checks.tied(model))


def against_transformers(model: LanguageModel, folder: Path, limit: int, done: Callable[[Check], Check]) -> str | None:
    """Logits, greedy text and cache; returns the likeliest cause where one does not hold."""
    text = rows(model, limit)
    short = [row for row in text if len(row) <= SHORT]
    oracle = Oracle(folder, torch.float32)
    same = done(checks.logits(model, oracle, text)).holds
    said = done(checks.greedy(model, oracle, prompts(model))).holds
    kept = done(checks.cached(model, short[-1])).holds
    with torch.inference_mode():
        exact = [oracle.logits(oracle.hidden(row)) for row in short]
    del oracle
    narrow = loading.load(folder, torch.bfloat16)
    half = done(checks.logits_bfloat16(narrow, Oracle(folder, torch.bfloat16), short, exact)).holds
    if not same or not said:
        with torch.inference_mode():
            ours = model(torch.tensor([short[-1]]))[0]
        return diagnosis.of_code(model.state_dict(), model.config, short[-1], ours)
    if not kept:
        return "the cache: what is kept or looked at is not what the whole row gives"
    return None if half else "bfloat16: something that should be in fp32 (rotation, norms) is not"


def against_release(
    model: LanguageModel, folder: Path, release: Release, hashes: dict[str, str], done: Callable[[Check], Check]
) -> str | None:
    """Golden texts and identity; returns the likeliest cause where they do not hold."""
    certain = [entry for entry in release.golden if entry.confidence == "high"]
    said_right = bool(certain) and done(checks.golden(model, release)).holds
    same, cause = checks.identity(folder, model.config, release, hashes, said_right)
    done(same)
    if cause is not None or said_right or not certain:
        return cause
    return diagnosis.of_files(model.state_dict(), model.config, certain)


def rows(model: LanguageModel, limit: int) -> list[list[int]]:
    """Text of every length up to the limit, the prompts, and one row of any ids at all; shortest first."""
    lengths = sorted({length for length in (*LENGTHS, limit) if length <= limit})
    text = text_ids(model, limit)
    found = [text[:length] for length in lengths if length <= len(text)]
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(model.config.vocab_size, (min(SHORT, limit),), generator=generator).tolist()
    return sorted([*found, *(ids[:limit] for ids in prompts(model)), anything], key=len)


def text_ids(model: LanguageModel, count: int) -> list[int]:
    """The documentation of Python's own language as ids; any ids, where the model has no tokenizer."""
    if model.tokenizer is not None:
        text = "\n\n".join(topics.values())
        return model.tokenizer.encode(text[: count * 16])[:count]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def prompts(model: LanguageModel) -> list[list[int]]:
    """A few beginnings of text."""
    if model.tokenizer is not None:
        found = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    else:
        found = [text_ids(model, 24)[start : start + 8] for start in (0, 8, 16)]
    return [ids[: max(1, model.config.max_position_embeddings // 2)] for ids in found]
