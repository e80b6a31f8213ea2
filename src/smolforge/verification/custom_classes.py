"""Verify a model with custom classes: the properties that all other code relies on, and the built-in model.

config, random weights -> causal, cached, packed, trained, saved -> the same weights in the built-in classes
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from smolforge.checkpoint import huggingface
from smolforge.config import ModelConfig
from smolforge.config.custom_classes import error_location
from smolforge.config.model import PARTS
from smolforge.errors import ConfigError
from smolforge.models.attention import DocumentAttention
from smolforge.models.decoder import LanguageModel, build
from smolforge.models.stats import parameter_counts
from smolforge.training.loss import loss_sum
from smolforge.verification import checks
from smolforge.verification.report import Check, VerificationReport
from smolforge.verification.transformers_reference import tolerance

AGAINST = "built-in"
TOKENS = 256
SPREAD = 0.1
"""Standard deviation of the random weights: large enough that attention is not uniform."""


def verify_classes(
    name: str, config: ModelConfig, equal: bool, *, on_check: Callable[[Check], None]
) -> VerificationReport:
    """Run all checks of a config with custom classes; `on_check` is called with each check when it is complete.

    With `equal` the model must give the built-in model's logits; else the check reports where they differ.
    Raises ConfigError if the config has no custom class, or a class cannot be instantiated.
    """
    if not config.custom_classes:
        raise ConfigError(f"{name} names no class of your own, and a recipe has no weights; verify its run instead")
    config = config.model_copy(update={"initializer_range": SPREAD})
    model, report = build(config), VerificationReport(name)
    length, generator = min(TOKENS, config.max_position_embeddings), torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    steps: dict[str, Callable[[], Check]] = {
        "parameters": partial(compare_parameter_counts, model),
        "causal": partial(check_causal, model, ids),
        "cached": lambda: checks.check_cache(model, ids[0].tolist()),
        "documents": partial(check_documents, model, ids),
        "gradients": partial(check_gradients, model, ids),
        "saved": partial(check_saved, model, ids),
        AGAINST: partial(compare_built_in, model, ids, equal),
    }
    for check_name, step in steps.items():
        report.checks.append(run_check(check_name, step))
        on_check(report.checks[-1])
    report.cause = next((f"{check.name}: {check.message}" for check in report.checks if not check.holds), None)
    return report


def run_check(name: str, step: Callable[[], Check]) -> Check:
    """Run a check, which does not hold if the custom class raises an exception."""
    try:
        return step()
    except Exception as error:
        location = error_location(error)
        if location is None:
            raise
        return Check(name, False, f"{location}: {type(error).__name__}: {error}")


def compare_parameter_counts(model: LanguageModel) -> Check:
    """Report the parameters by component, and the difference from the built-in model."""
    counts, built_in_counts = parameter_counts(model.config), parameter_counts(without_custom_classes(model.config))
    total, difference = sum(counts.values()), sum(counts.values()) - sum(built_in_counts.values())
    message = f"{total:,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"
    message += f", {difference:+,} against the built-in" if difference else ", as many as the built-in"
    return Check("parameters", True, message, {"total": total, **counts})


@torch.inference_mode()
def check_causal(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Check that later tokens do not change earlier logits."""
    position = ids.shape[1] // 2
    changed_ids = ids.clone()
    changed_ids[:, position:] = (changed_ids[:, position:] + 1) % model.config.vocab_size
    note = f"before token {position}, which was changed"
    return checks.check_close("causal", model(ids)[:, :position], model(changed_ids)[:, :position], note=note)


@torch.inference_mode()
def check_documents(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Check that two packed documents have the logits of each alone."""
    boundary = ids.shape[1] // 3
    packed = DocumentAttention((torch.arange(ids.shape[1]) >= boundary).long()[None])
    packed_logits = model.logits(model.hidden_states(ids, packed.positions, packed)[0])
    separate_logits = torch.cat([model(ids[:, :boundary])[0], model(ids[:, boundary:])[0]])
    return checks.check_close("documents", packed_logits, separate_logits, note="packed into one row, and each alone")


def check_gradients(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Check that every parameter has a gradient that is finite and not all zero."""
    loss, _ = loss_sum(model.hidden_states(ids)[:, :-1], model.lm_head_weight, ids[:, 1:])
    loss.backward()
    wrong = [name for name, weight in model.named_parameters() if not has_gradient(weight.grad)]
    model.zero_grad(set_to_none=True)
    message = f"{len(wrong)} tensors would not learn, the first {wrong[0]}" if wrong else "every tensor has one"
    return Check("gradients", not wrong, message)


def has_gradient(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


@torch.inference_mode()
def check_saved(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Check that the model is bitwise identical after saving and loading."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        huggingface.save(model, Path(folder))
        reloaded = huggingface.load(Path(folder))
    same = torch.equal(model(ids), reloaded(ids))
    failure = "a model that was saved and loaded says something else: something it needs is no parameter"
    return Check("saved", same, "saved and loaded, it says the same to the bit" if same else failure)


@torch.inference_mode()
def compare_built_in(model: LanguageModel, ids: Int[Tensor, "1 t"], equal: bool) -> Check:
    """Compare with the same weights in the built-in classes: equal, or the first token that differs."""
    built_in_model, weights = build(without_custom_classes(model.config)), dict(model.named_parameters())
    built_in_weights = dict(built_in_model.named_parameters())
    shapes, built_in_shapes = (
        {(name, weight.shape) for name, weight in named.items()} for named in (weights, built_in_weights)
    )
    if mismatched := sorted(shapes ^ built_in_shapes):
        message = f"nothing to compare: {mismatched[0][0]} is in one of them alone, or of another shape"
        return Check(AGAINST, not equal, message)
    for name, weight in built_in_weights.items():
        weight.copy_(weights[name])
    logits = built_in_model(ids)
    diff, allowed = (model(ids) - logits).abs().amax(-1)[0], tolerance(logits.abs().max().item())
    figures = {"max_abs_diff": diff.max().item(), "allowed": allowed}
    different = (diff > allowed).nonzero().flatten().tolist()
    extent = f"equal in the first {different[0]} tokens, not after" if different else f"equal in all {len(diff)} tokens"
    message = f"{extent}: max difference {diff.max():.1e} (allowed {allowed:.1e})"
    return Check(AGAINST, not (equal and different), message, figures | ({"first": different[0]} if different else {}))


def without_custom_classes(config: ModelConfig) -> ModelConfig:
    """Return the config with the built-in classes."""
    return config.model_copy(update=dict.fromkeys(PARTS))
