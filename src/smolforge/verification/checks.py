"""The checks of a model, each a function from what is at hand to a `Check`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smolforge.checkpoint import families, gguf, huggingface, quantization
from smolforge.checkpoint.gguf import llama
from smolforge.config import Generation, ModelConfig
from smolforge.errors import SettingError
from smolforge.generation.samplers import sampling
from smolforge.generation.stream import tokens
from smolforge.models import quantized
from smolforge.models.attention import Cache
from smolforge.models.decoder import LanguageModel
from smolforge.models.stats import parameter_counts
from smolforge.verification.diagnosis import agrees
from smolforge.verification.releases import Release, differences
from smolforge.verification.report import Check
from smolforge.verification.transformers_reference import Difference, Oracle, compared, difference, tolerance

GREEDY_TOKENS = 64
GREEDY = sampling(Generation(temperature=0))
BY_NAME = {
    "rope_theta": "wrong theta",
    "rms_norm_eps": "wrong eps",
    "norm_epsilon": "wrong eps",
    "tie_word_embeddings": "untied head",
    "num_key_value_heads": "wrong head grouping",
    "num_attention_heads": "wrong head grouping",
    "head_dim": "wrong head grouping",
}


def parameters(model: LanguageModel, folder: Path) -> Check:
    """Every number in the files is a parameter, counted once."""
    counts = parameter_counts(model.config)
    total = sum(counts.values())
    sizes = {name: math.prod(shape) for name, shape in shapes_of(folder).items()}
    for name, layer in quantized.layers(model).items():
        for part in quantization.DTYPES:
            sizes.pop(f"{name}.{part}")
        sizes[f"{name}.weight"] = layer.out_features * layer.in_features
    repeated = sizes.pop(huggingface.HEAD, 0) if model.config.tie_word_embeddings else 0
    said = f"{total:,} in {len(sizes)} tensors ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"
    if repeated:
        said += "; the file repeats the tied head"
    return Check("parameters", sum(sizes.values()) == total, said, {"total": total, **counts})


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in the files."""
    if llama.is_file(folder):
        return {name: stored.shape for name, stored in gguf.File(folder).tensors.items()}
    with huggingface.Tensors(folder) as found:
        return found.shapes()


def finite(model: LanguageModel) -> Check:
    """Every weight is a number."""
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    said = f"{len(wrong)} tensors hold NaN or infinity, the first {wrong[0]}" if wrong else "every weight is a number"
    return Check("finite", not wrong, said)


@torch.no_grad()
def rounded(model: LanguageModel, original: LanguageModel, name: str) -> Check:
    """Its integers and scales are what rounding the original gives, to the bit, and all else is its bfloat16."""
    assert model.scheme is not None
    if original.scheme is not None:
        raise SettingError(f"{name} is of integers itself; --against names the model it was made from")
    if model.config != original.config:
        return Check("rounded", False, f"{name} has another shape")
    exact = {layer: original.get_parameter(f"{layer}.weight") for layer in quantized.layers(model)}
    apart = sum((each.weight - exact[layer]).square().sum().item() for layer, each in quantized.layers(model).items())
    error = math.sqrt(apart / sum(weight.square().sum().item() for weight in exact.values()))
    quantized.quantize(original, model.scheme)
    unlike = quantized.unlike(original, model)
    if unlike:
        said = f"{len(unlike)} tensors are not what rounding {name} gives, the first {unlike[0]}"
    else:
        said = f"what rounding {name} gives, to the bit; its matrices moved by {error:.2%} of their size"
    return Check("rounded", not unlike, said, {"relative_error": error})


def tied(model: LanguageModel) -> Check:
    """The head and the embedding are one storage, as loaded, cast and compiled; or not, where they should not be.

    Leaves the model in bfloat16.
    """
    if not model.config.tie_word_embeddings:
        apart = model.head.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        return Check("tied head", apart, "config.json says untied, and the head has a storage of its own")
    shared = {"loaded": _shared(model), "cast to bfloat16": _shared(model.to(torch.bfloat16))}
    shared["compiled"] = _shared_when_compiled(model)
    lost = [stage for stage, holds in shared.items() if not holds]
    said = f"not shared once {lost[0]}" if lost else f"one storage: {', '.join(shared)}"
    return Check("tied head", not lost, said)


def _shared(model: LanguageModel) -> bool:
    names = [name for name, _ in model.named_parameters() if "lm_head" in name]
    return not names and model.head.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@torch.no_grad()
def _shared_when_compiled(model: LanguageModel) -> bool:
    """A row of the embedding is changed: the compiled model's logit of that token, which it never read, must follow."""
    compiled = torch.compile(model, backend="eager", dynamic=False)
    ids, row = torch.tensor([[1, 2, 3]]), model.model.embed_tokens.weight[0]
    before, kept = compiled(ids)[..., 0], row.clone()
    row.zero_()
    after = compiled(ids)[..., 0]
    row.copy_(kept)
    return bool(after.eq(0).all()) and bool(compiled(ids)[..., 0].equal(before))


def logits(model: LanguageModel, oracle: Oracle, rows: Sequence[Sequence[int]]) -> Check:
    """Our logits are Transformers', in fp32, at every length."""
    found = [difference(model, oracle, row) for row in rows]
    worst = max(found, key=lambda each: (not each.finite, each.max_abs_diff / each.allowed))
    figures = _figures(found) | {"allowed": worst.allowed}
    return Check("logits float32", all(each.holds for each in found), _said(found, worst), figures)


def _figures(found: Sequence[Difference]) -> dict[str, Any]:
    return {
        "max_abs_diff": max(each.max_abs_diff for each in found),
        "kl": max(each.kl for each in found),
        "top1_agreement": min(each.top1_agreement for each in found),
        "rows": [each.__dict__ for each in found],
    }


def _said(found: Sequence[Difference], worst: Difference) -> str:
    lengths = ", ".join(f"{length:,}" for length in sorted({each.tokens for each in found}))
    if not worst.finite:
        return f"logits that are no numbers, in a row of {worst.tokens:,} tokens"
    return (
        f"max difference {worst.max_abs_diff:.1e} (allowed {worst.allowed:.1e}), "
        f"KL {max(each.kl for each in found):.1e}, same likeliest token "
        f"{min(each.top1_agreement for each in found):.2%}; rows of {lengths} tokens"
    )


@torch.inference_mode()
def logits_bfloat16(
    model: LanguageModel, oracle: Oracle, rows: Sequence[Sequence[int]], exact: Sequence[torch.Tensor]
) -> Check:
    """In bfloat16 ours is as near to the fp32 logits (`exact`, one a row) as Transformers' bfloat16 is."""
    found, ours, theirs = [], 0.0, 0.0
    for row, truth in zip(rows, exact, strict=True):
        mine, yours = model.hidden(torch.tensor([list(row)]))[0], oracle.hidden(row)
        found.append(compared(mine, model.logits, yours, oracle.logits))
        ours = max(ours, compared(mine, model.logits, truth, torch.Tensor.float).kl)
        theirs = max(theirs, compared(yours, oracle.logits, truth, torch.Tensor.float).kl)
    figures = _figures(found) | {"kl_to_float32": ours, "their_kl_to_float32": theirs}
    said = (
        f"KL to the fp32 logits {ours:.1e}, Transformers' own {theirs:.1e}; between the two: max difference "
        f"{figures['max_abs_diff']:.1e}, KL {figures['kl']:.1e}, same likeliest token {figures['top1_agreement']:.2%}"
    )
    return Check("logits bfloat16", ours <= 2 * theirs + 1e-6, said, figures)


def greedy(model: LanguageModel, oracle: Oracle, prompts: Sequence[Sequence[int]]) -> Check:
    """The same text, token by token; where the two likeliest are as good as equal, either is right."""
    ties, wrong, count = 0, 0, 0
    for prompt in prompts:
        wanted = oracle.greedy(prompt, min(GREEDY_TOKENS, model.config.max_position_embeddings - len(prompt)))
        count, done = count + len(wanted), 0
        while done < len(wanted):
            rest = wanted[done:]
            found = [token.id for token in tokens(model, [[*prompt, *wanted[:done]]], GREEDY, len(rest))]
            same = next((i for i, pair in enumerate(zip(found, rest, strict=True)) if pair[0] != pair[1]), len(rest))
            if same < len(rest):
                near = _nearly_tied(oracle, [*prompt, *wanted[: done + same]], found[same], rest[same])
                ties, wrong = ties + near, wrong + (not near)
                if not near:
                    break
            done += same + 1
    said = f"{wrong} of {len(prompts)} texts differ" if wrong else f"{count} tokens after {len(prompts)} prompts equal"
    said += f", {ties} near ties" if ties else ""
    return Check("greedy", not wrong, said, {"match": not wrong, "tokens": count, "near_ties": ties})


@torch.inference_mode()
def _nearly_tied(oracle: Oracle, ids: Sequence[int], one: int, other: int) -> bool:
    """Whether their logits of two tokens are nearer than twice what two implementations may differ by."""
    last = oracle.logits(oracle.hidden(ids)[-1:])[0]
    return (last[one] - last[other]).abs().item() <= 2 * tolerance(last.abs().max().item())


@torch.inference_mode()
def cached(model: LanguageModel, row: Sequence[int]) -> Check:
    """Token by token and in pieces, through a cache, gives what the whole row gives."""
    ids = torch.tensor([list(row)])
    whole = model(ids)[0]
    cache, start, parts = Cache(model.config, 1, len(row), model.head), 0, []
    for size in _pieces(len(row)):
        positions = torch.arange(start, start + size)[None]
        parts.append(model.logits(model.hidden(ids[:, start : start + size], positions, cache.at(positions)))[0])
        start += size
    worst = (torch.cat(parts) - whole).abs().max().item()
    allowed = tolerance(whole.abs().max().item())
    said = f"max difference {worst:.1e} (allowed {allowed:.1e}) over {len(row)} tokens, one at a time and in pieces"
    return Check("cached", worst <= allowed, said, {"max_abs_diff": worst, "allowed": allowed})


def _pieces(length: int) -> list[int]:
    """A first piece, single tokens, and the rest."""
    sizes = [max(1, length // 3), *[1] * (length // 3)]
    return [*sizes, length - sum(sizes)] if length > sum(sizes) else sizes[:length]


def identity(
    folder: Path, found: ModelConfig, release: Release, hashes: Mapping[str, str], said_right: bool
) -> tuple[Check, str | None]:
    """Settings, count and hashes are the published ones; and the mistake's name where a telling setting is not.

    Files of another dtype or in other shards have another hash; that alone is no failure where the model
    says (`said_right`) what the release says.
    """
    total = sum(parameter_counts(found).values())
    wrong = [
        f"{BY_NAME.get(name, 'another shape')}: {name} is {here!r}, the release has {there!r}"
        for name, (here, there) in differences(found, release).items()
    ]
    content = {} if llama.is_file(folder) else families.read_json(folder / huggingface.CONFIG)
    for name in ("bos_token_id", "eos_token_id"):
        wanted = release.__dict__[name]
        if wanted is not None and content.get(name, wanted) != wanted:
            wrong.append(f"{name} is {content[name]!r}, the release has {wanted!r}")
    if total != release.parameters:
        wrong.append(f"{total:,} parameters, the release has {release.parameters:,}")
    other = [name for name, wanted in release.sha256.items() if hashes.get(name) != wanted]
    cause = next((each for each in wrong if each.startswith(tuple(BY_NAME.values()))), None)
    if not said_right:
        wrong += [f"{name} is not the published file (its sha256 differs)" for name in other]
    known = "settings and parameters are" if other or not release.sha256 else "settings, parameters and sha256 are"
    said = f"{release.id}: " + ("; ".join(wrong) or f"{known} the published ones")
    if other and said_right:
        said += "; the files are not, byte for byte"
    return Check("identity", not wrong, said, {"release": release.id, "sha256": dict(hashes)}), cause


@torch.inference_mode()
def golden(model: LanguageModel, release: Release) -> Check:
    """The model says what the release is known to say."""
    results = [(agrees(lambda ids: model(ids[None])[0], entry), entry) for entry in release.golden]
    wrong = [entry for holds, entry in results if not holds and entry.confidence == "high"]
    unsure = sum(not holds for holds, entry in results if entry.confidence != "high")
    sure = sum(entry.confidence == "high" for entry in release.golden)
    said = f"{sure - len(wrong)} of {sure} published texts and logits reproduced"
    if wrong:
        said += f"; not {wrong[0].prompt or list(wrong[0].prompt_ids)!r} -> {wrong[0].greedy_text!r}"
    said += f"; {unsure} of {len(results) - sure} less certain ones differ" if unsure else ""
    return Check("golden", not wrong, said, {"known": len(results), "wrong": len(wrong), "unsure": unsure})
