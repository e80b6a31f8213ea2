"""Verify a model against its oracles: Transformers on the same files, the published references, and itself.

files -> strict load -> counts, finite weights -> logits, greedy text, cache -> golden, identity -> tie
                                  |
                                  if one does not hold: every known mistake is tried (diagnosis.py)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from smolforge.atomic import MANIFEST, file_digest
from smolforge.checkpoint import loading
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.models.decoder import LanguageModel
from smolforge.verification import checks, custom_classes, diagnosis
from smolforge.verification.files import check_files
from smolforge.verification.releases import Release, identify_release, published_releases
from smolforge.verification.report import Check, VerificationReport
from smolforge.verification.transformers_reference import Oracle, require_transformers

ORACLES = ("transformers", "golden")
AGAINST = ("files", *ORACLES)
"""What a model can be verified against; its files are always checked."""
LENGTHS = (1, 16, 128, 1024)
SHORT = 128
PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "Naïve 12345 \u6f22 \U0001f44b\n\n- ")
HARD_TEXTS = (
    *PROMPTS,
    "  leading, trailing  \n\n\t\tand\r\n  inner   white\u00a0space \u2003 ",
    "I've you'll THEY'RE 'd '' x2y3 007 3.14159 \u0663\u2167\u00bd",
    "\u0915\u094d\u0937 \u4f60\u597d\u4e16\u754c \u202eabc\u202c e\u0301\u0301 \U0001f468\u200d\U0001f469",
    "\ufffd\ufeff\x00\x7f",
    "{}[]()<>|\\/`~!@#$%^&*_+-=;:'\",.?" * 3,
)
"""Texts in which tokenizers differ: white space, digits, apostrophes, marks, scripts."""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"name": "Bern", "content": 1}}}
HARD_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    *([{"role": "user", "content": text}] for text in HARD_TEXTS),
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": " a \n"},
        {"role": "assistant", "content": "\n\nb "},
    ],
    [{"role": "user", "name": "Ann", "content": "a"}, {"role": "assistant", "name": "file", "content": "b"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "12 C"},
    ],
)
"""Conversations in which templates differ: white space at the ends, names, calls of tools, content that is null."""


def verify(
    model: str | Path,
    against: Sequence[str] = (),
    max_length: int | None = None,
    *,
    releases: Sequence[Release] | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
) -> VerificationReport:
    """Run all checks of a MODEL, and return the report; `on_check` is called with each check when it is complete.

    `against` names oracles, by default all that apply; for a quantized model also the local MODEL that it was made
    from. `max_length` limits the rows that are compared, by default the model's whole context.
    Raises ConfigError for an unknown name, or an oracle that does not apply to the model, and MissingResourceError
    if Transformers is not installed. A model that cannot be loaded is a check that does not hold.
    """
    unknown = [name for name in against if name not in AGAINST and not Path(name).exists()]
    if unknown:
        choices = f"{', '.join(AGAINST[:-1])} or {AGAINST[-1]}"
        raise ConfigError(
            f"against is {unknown[0]!r}; it should be {choices}, or for a model of integers what it was made from"
        )
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length is {max_length}; it should be at least 1")
    if not against or "transformers" in against:
        require_transformers()
    report = VerificationReport(str(model))

    def record(check: Check) -> Check:
        report.checks.append(check)
        on_check(check)
        return check

    try:
        report.cause = _verify(
            report,
            model,
            against,
            max_length=max_length,
            releases=published_releases() if releases is None else releases,
            record=record,
        )
    except InvalidFileError as error:
        report.cause = record(Check("files", False, str(error))).message
    if not report.holds and report.cause is None:
        report.cause = next(check.message for check in report.checks if not check.holds)
    return report


def _verify(
    report: VerificationReport,
    model: str | Path,
    against: Sequence[str],
    *,
    max_length: int | None,
    releases: Sequence[Release],
    record: Callable[[Check], Check],
) -> str | None:
    """Run the checks; return the most likely cause if one does not hold and has a known cause."""
    file_checks = [record(check) for check in check_files(Path(model))]
    if against and set(against) == {"files"}:
        if not Path(model).exists():
            raise ConfigError(f"there is no folder {str(model)!r}, and --against files looks at nothing else")
        if not file_checks:
            message = f"{model} has neither checkpoints nor a {MANIFEST}: nothing says what it should be"
            record(Check("files", False, message))
        return None
    folder = loading.resolve_model_path(model)
    if loading.needs_conversion(folder):
        raise ConfigError(
            f"{model} is no model folder that Transformers opens; export --to transformers makes one, and proves it"
        )
    loaded = loading.load(folder)
    hashes = {path.name: file_digest(path)["sha256"] for path in loading.weight_files(folder)}
    record(checks.check_parameters(loaded, folder))
    if not record(checks.check_finite(loaded)).holds:
        return None
    cause = None
    oracles, originals = ([name for name in against if (name in AGAINST) == is_oracle] for is_oracle in (True, False))
    if originals and loaded.quantization is None:
        raise ConfigError(f"{model} holds no integers, which alone are held against the model they were made from")
    if loaded.config.custom_classes or loaded.quantization is not None:
        if oracles:
            classes = f"classes of your own ({', '.join(loaded.config.custom_classes.values())}), which"
            kind = (
                classes
                if loaded.quantization is None
                else "integers, which --against MODEL holds to what they were made from;"
            )
            raise ConfigError(
                f"{model} has {kind} {' and '.join(oracles)} cannot know; without --against it is held to itself"
            )
        for original in originals:
            record(checks.check_rounding(loaded, loading.load(original), original))
        return check_consistency(loaded, record)
    selected = against or ORACLES
    if "transformers" in selected:
        limit = loaded.config.max_position_embeddings
        cause = compare_with_transformers(loaded, folder, min(max_length or limit, limit), record=record)
    if "golden" in selected:
        release = identify_release(str(model), folder, hashes, releases=releases)
        if release is not None:
            report.release = release.id
            cause = compare_with_release(loaded, folder, release, hashes=hashes, record=record) or cause
        elif "transformers" not in selected:
            record(Check("golden", False, "no published reference is known for it; --against transformers compares"))
    record(checks.check_tied_head(loaded))
    return cause


def check_consistency(model: LanguageModel, record: Callable[[Check], Check]) -> None:
    """Check a model with custom classes, or a quantized one, for which no other implementation need exist."""
    ids = torch.tensor([text_ids(model, min(SHORT, model.config.max_position_embeddings))])
    record(custom_classes.check_causal(model, ids))
    record(checks.check_cache(model, ids[0].tolist()))
    record(custom_classes.check_documents(model, ids))
    if model.quantization is None:
        record(checks.check_tied_head(model))


def compare_with_transformers(
    model: LanguageModel, folder: Path, limit: int, *, record: Callable[[Check], Check]
) -> str | None:
    """Check the tokenizer, logits, greedy text and KV cache; return the most likely cause if one does not hold."""
    text = sample_rows(model, limit)
    short = [row for row in text if len(row) <= SHORT]
    oracle = Oracle(folder, torch.float32)
    if model.tokenizer is not None and folder.is_dir():
        record(checks.check_tokenizer(model.tokenizer, folder, HARD_TEXTS))
        if model.tokenizer.template is not None:
            record(checks.check_template(model.tokenizer, folder, HARD_CONVERSATIONS))
    same_logits = record(checks.check_logits(model, oracle, text)).holds
    same_text = record(checks.check_greedy(model, oracle, sample_prompt_ids(model))).holds
    cache_holds = record(checks.check_cache(model, short[-1])).holds
    with torch.inference_mode():
        exact = [oracle.logits(oracle.hidden_states(row)) for row in short]
    del oracle
    bfloat16_model = loading.load(folder, torch.bfloat16)
    bfloat16_holds = record(
        checks.check_logits_bfloat16(bfloat16_model, Oracle(folder, torch.bfloat16), short, exact=exact)
    ).holds
    if not same_logits or not same_text:
        with torch.inference_mode():
            our_logits = model(torch.tensor([short[-1]]))[0]
        return diagnosis.diagnose_code(model.state_dict(), model.config, short[-1], our_logits=our_logits)
    if not cache_holds:
        return "the cache: what is kept or looked at is not what the whole row gives"
    return None if bfloat16_holds else "bfloat16: something that should be in fp32 (rotation, norms) is not"


def compare_with_release(
    model: LanguageModel, folder: Path, release: Release, *, hashes: dict[str, str], record: Callable[[Check], Check]
) -> str | None:
    """Check golden texts and identity; return the most likely cause if they do not hold."""
    certain = [entry for entry in release.golden if entry.confidence == "high"]
    golden_holds = bool(certain) and record(checks.check_golden(model, release)).holds
    identity, cause = checks.check_identity(folder, model.config, release, hashes=hashes, golden_holds=golden_holds)
    record(identity)
    if cause is not None or golden_holds or not certain:
        return cause
    return diagnosis.diagnose_files(model.state_dict(), model.config, certain)


def sample_rows(model: LanguageModel, limit: int) -> list[list[int]]:
    """Return text of every length up to the limit, the prompts, and one row of random ids; shortest first."""
    lengths = sorted({length for length in (*LENGTHS, limit) if length <= limit})
    text = text_ids(model, limit)
    texts = [text[:length] for length in lengths if length <= len(text)]
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.randint(model.config.vocab_size, (min(SHORT, limit),), generator=generator).tolist()
    return sorted([*texts, *(ids[:limit] for ids in sample_prompt_ids(model)), random_ids], key=len)


def text_ids(model: LanguageModel, count: int) -> list[int]:
    """Return the documentation of Python's own language as ids; random ids if the model has no tokenizer."""
    if model.tokenizer is not None:
        text = "\n\n".join(topics.values())
        return model.tokenizer.encode_prompt(text[: count * 16])[:count]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def sample_prompt_ids(model: LanguageModel) -> list[list[int]]:
    """Return the ids of a few prompts."""
    if model.tokenizer is not None:
        prompts = [model.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    else:
        prompts = [text_ids(model, 24)[start : start + 8] for start in (0, 8, 16)]
    return [ids[: max(1, model.config.max_position_embeddings // 2)] for ids in prompts]
