"""A model with classes of one's own, held to what every other part relies on, and compared with the model of ours.

config, random weights -> causal, cached, packed, trained, saved -> the same weights in our classes
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.checkpoint import huggingface
from smolforge.config import ModelConfig
from smolforge.config.custom_classes import blamed
from smolforge.config.model import PARTS
from smolforge.errors import SettingError
from smolforge.models.attention import Documents
from smolforge.models.decoder import LanguageModel, build
from smolforge.models.stats import parameter_counts
from smolforge.training.loss import loss_sum
from smolforge.verification import checks
from smolforge.verification.report import Check, Report
from smolforge.verification.transformers_reference import tolerance

AGAINST = "built-in"
TOKENS = 256
SPREAD = 0.1
"""Of the random weights: wide enough that attention looks at some tokens more than at others."""


def verify_classes(name: str, config: ModelConfig, equal: bool, tell: Callable[[Check], None]) -> Report:
    """All checks of a shape that names classes of one's own; `tell` hears each as it is done.

    With `equal` the model must say what ours says; else it is told where they part. Raises SettingError where the shape
    names none, or a class cannot be made.
    """
    if not config.own_classes:
        raise SettingError(f"{name} names no class of your own, and a recipe has no weights; verify its run instead")
    config = config.model_copy(update={"initializer_range": SPREAD})
    model, report = build(config), Report(name)
    length, generator = min(TOKENS, config.max_position_embeddings), torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    steps: dict[str, Callable[[], Check]] = {
        "parameters": partial(parameters, model),
        "causal": partial(causal, model, ids),
        "cached": lambda: checks.cached(model, ids[0].tolist()),
        "documents": partial(documents, model, ids),
        "gradients": partial(gradients, model, ids),
        "saved": partial(saved, model, ids),
        AGAINST: partial(built_in, model, ids, equal),
    }
    for each, step in steps.items():
        report.checks.append(tried(each, step))
        tell(report.checks[-1])
    report.cause = next((f"{check.name}: {check.said}" for check in report.checks if not check.holds), None)
    return report


def tried(name: str, step: Callable[[], Check]) -> Check:
    """A check, which does not hold where the class's own code raises something."""
    try:
        return step()
    except Exception as error:
        place = blamed(error)
        if place is None:
            raise
        return Check(name, False, f"{place}: {type(error).__name__}: {error}")


def parameters(model: LanguageModel) -> Check:
    """What there is of each kind, and how much more or less than in ours."""
    counts, ours = parameter_counts(model.config), parameter_counts(plain(model.config))
    total, difference = sum(counts.values()), sum(counts.values()) - sum(ours.values())
    said = f"{total:,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"
    said += f", {difference:+,} against the built-in" if difference else ", as many as the built-in"
    return Check("parameters", True, said, {"total": total, **counts})


@torch.inference_mode()
def causal(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """What comes later changes nothing that is said before."""
    at = ids.shape[1] // 2
    other = ids.clone()
    other[:, at:] = (other[:, at:] + 1) % model.config.vocab_size
    return compared("causal", model(ids)[:, :at], model(other)[:, :at], f"before token {at}, which was changed")


@torch.inference_mode()
def documents(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Two documents in one row are as each alone."""
    at = ids.shape[1] // 3
    packed = Documents((torch.arange(ids.shape[1]) >= at).long()[None])
    together = model.logits(model.hidden(ids, packed.positions, packed)[0])
    alone = torch.cat([model(ids[:, :at])[0], model(ids[:, at:])[0]])
    return compared("documents", together, alone, "packed into one row, and each alone")


def compared(name: str, one: Float[Tensor, "*n v"], other: Float[Tensor, "*n v"], said: str) -> Check:
    worst, allowed = (one - other).abs().max().item(), tolerance(other.abs().max().item())
    return Check(name, worst <= allowed, f"max difference {worst:.1e} (allowed {allowed:.1e}) {said}")


def gradients(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Every parameter learns: its gradient is there, a number, and not all zero."""
    loss, _ = loss_sum(model.hidden(ids)[:, :-1], model.head, ids[:, 1:])
    loss.backward()
    wrong = [name for name, weight in model.named_parameters() if not learns(weight.grad)]
    model.zero_grad(set_to_none=True)
    said = f"{len(wrong)} tensors would not learn, the first {wrong[0]}" if wrong else "every tensor has one"
    return Check("gradients", not wrong, said)


def learns(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


@torch.inference_mode()
def saved(model: LanguageModel, ids: Int[Tensor, "1 t"]) -> Check:
    """Written and read again it is the same model."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        huggingface.save(model, Path(folder))
        again = huggingface.load(Path(folder))
    same = torch.equal(model(ids), again(ids))
    forgets = "a model that was saved and loaded says something else: something it needs is no parameter"
    return Check("saved", same, "saved and loaded, it says the same to the bit" if same else forgets)


@torch.inference_mode()
def built_in(model: LanguageModel, ids: Int[Tensor, "1 t"], equal: bool) -> Check:
    """The same weights in our classes: equal, or from which token on not."""
    ours, theirs = build(plain(model.config)), dict(model.named_parameters())
    unlike = sorted(different(dict(ours.named_parameters()), theirs))
    if unlike:
        return Check(
            AGAINST, not equal, f"nothing to compare: {unlike[0]} is in one of them alone, or of another shape"
        )
    for name, weight in ours.named_parameters():
        weight.copy_(theirs[name])
    apart, allowed = (model(ids) - ours(ids)).abs().amax(-1)[0], tolerance(ours(ids).abs().max().item())
    figures = {"max_abs_diff": apart.max().item(), "allowed": allowed}
    first = next(iter((apart > allowed).nonzero().flatten().tolist()), None)
    if first is None:
        said = f"equal in all {len(apart)} tokens: max difference {apart.max():.1e} (allowed {allowed:.1e})"
        return Check(AGAINST, True, said, figures)
    said = f"equal in the first {first} tokens, not after: max difference {apart.max():.1e} (allowed {allowed:.1e})"
    return Check(AGAINST, not equal, said, figures | {"first": first})


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of tensors that are not in both, or not of the same shape."""
    for name in one.keys() | other.keys():
        if name not in one or name not in other or one[name].shape != other[name].shape:
            yield name


def plain(config: ModelConfig) -> ModelConfig:
    """The same shape of our classes alone."""
    return config.model_copy(update=dict.fromkeys(PARTS))
