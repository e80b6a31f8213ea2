"""The checks of a model, each a function that returns a `Check`."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.checkpoint import families, gguf, huggingface, quantization
from smolforge.checkpoint.gguf import llama
from smolforge.config import Generation, ModelConfig
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.generation.engine import common_prefix_length
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models import quantized
from smolforge.models.attention import KVCache
from smolforge.models.decoder import LanguageModel
from smolforge.models.stats import parameter_counts
from smolforge.tokenizer import Tokenizer
from smolforge.verification.diagnosis import matches_golden
from smolforge.verification.releases import Release, config_differences
from smolforge.verification.report import Check
from smolforge.verification.transformers_reference import (
    LogitDifference,
    Oracle,
    compare_logits,
    compare_models,
    require_transformers,
    tolerance,
    transformers_errors,
)

GREEDY_TOKENS = 64
GREEDY_SAMPLER = make_sampler(Generation(temperature=0))
MAX_CALIBRATED_ERROR = 0.3
"""Relative to a matrix, of integers that a text chose. 4 bits by 32 to 128 move it by 0.09 to 0.15, another by 1.4."""
MISTAKE_BY_SETTING = {
    "rope_theta": "wrong theta",
    "rms_norm_eps": "wrong eps",
    "norm_epsilon": "wrong eps",
    "tie_word_embeddings": "untied head",
    "num_key_value_heads": "wrong head grouping",
    "num_attention_heads": "wrong head grouping",
    "head_dim": "wrong head grouping",
}


def check_parameters(model: LanguageModel, folder: Path) -> Check:
    """Check that every number in the files is a parameter, counted once."""
    counts = parameter_counts(model.config)
    total = sum(counts.values())
    sizes = {name: math.prod(shape) for name, shape in shapes_of(folder).items()}
    for name, layer in quantized.quantized_layers(model).items():
        for part in quantization.DTYPES:
            sizes.pop(f"{name}.{part}", None)
        sizes[f"{name}.weight"] = layer.out_features * layer.in_features
    repeated = sizes.pop(huggingface.HEAD, 0) if model.config.tie_word_embeddings else 0
    message = f"{total:,} in {len(sizes)} tensors ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"
    if repeated:
        message += "; the file repeats the tied head"
    return Check("parameters", sum(sizes.values()) == total, message, {"total": total, **counts})


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor in the files."""
    if llama.is_gguf_file(folder):
        return {name: stored.shape for name, stored in gguf.GGUFReader(folder).tensors.items()}
    with huggingface.SafetensorsReader(folder) as tensors:
        return tensors.shapes()


def check_tokenizer(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> Check:
    """Check that Transformers gives the same ids for texts, BOS included; say where AutoTokenizer gives others."""
    transformers = require_transformers()
    with transformers_errors():
        plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        wrong, auto_wrong = (
            [text for text in texts if theirs.encode(text) != tokenizer.encode_prompt(text)] for theirs in (plain, auto)
        )
    message = f"the same ids for {len(texts) - len(wrong)} of {len(texts)} texts"
    if wrong:
        message += f"; not for {wrong[0]!r}"
    elif auto_wrong:
        message += (
            f"; but AutoTokenizer takes {type(auto).__name__}, with other rules for splitting text and other ids "
            f"for {len(auto_wrong)} of them, such as {auto_wrong[0]!r}: use PreTrainedTokenizerFast there"
        )
    return Check("tokenizer", not wrong, message, {"auto_tokenizer_differs": len(auto_wrong)})


def check_template(tokenizer: Tokenizer, folder: Path, conversations: Sequence[list[dict[str, Any]]]) -> Check:
    """Check that Transformers renders conversations to the same ids, and refuses what the template refuses here.

    They should have no special token in a message: here that is plain text on purpose, there the token.
    """
    transformers = require_transformers()
    with transformers_errors():
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    pairs = [(rendered_ids(tokenizer.chat, talk), rendered_ids(theirs_chat(theirs), talk)) for talk in conversations]
    wrong = [talk for talk, (ours, expected) in zip(conversations, pairs, strict=True) if ours != expected]
    refused = sum(ours is None for ours, _ in pairs)
    message = f"the same ids for {len(pairs) - len(wrong)} of {len(pairs)} conversations"
    message += f", of which the template refuses {refused}" if refused else ""
    return Check("template", not wrong, f"{message}; not for {wrong[0]!r}" if wrong else message)


def theirs_chat(tokenizer: Any) -> Callable[[list[dict[str, Any]]], list[int]]:
    """Return Transformers' rendering of a conversation up to the answer."""
    return lambda talk: tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)


def rendered_ids(
    render: Callable[[list[dict[str, Any]]], list[int]], conversation: list[dict[str, Any]]
) -> list[int] | None:
    """Return the ids of a conversation, or None where the template refuses it."""
    try:
        with transformers_errors():
            return render(conversation)
    except InvalidFileError:
        return None


def check_finite(model: LanguageModel) -> Check:
    """Check that every weight is finite."""
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    message = (
        f"{len(wrong)} tensors hold NaN or infinity, the first {wrong[0]}" if wrong else "every weight is a number"
    )
    return Check("finite", not wrong, message)


@torch.no_grad()
def check_rounding(model: LanguageModel, original: LanguageModel, name: str) -> Check:
    """Check that integers and scales are bit-for-bit the original's, quantized, and all else is its bfloat16.

    Of integers that a text chose, which is not in the files, only that they are near the original's weights.
    """
    scheme = model.quantization
    assert scheme is not None
    if original.quantization is not None:
        raise ConfigError(f"{name} is of integers itself; --against names the model it was made from")
    if model.config != original.config:
        return Check("rounded", False, f"{name} has another shape")
    exact = {layer: original.get_parameter(f"{layer}.weight") for layer in quantized.quantized_layers(model)}
    errors = {
        layer: ((module.weight - exact[layer]).norm() / exact[layer].norm().clamp(min=1e-30)).item()
        for layer, module in quantized.quantized_layers(model).items()
    }
    squares = {layer: weight.square().sum().item() for layer, weight in exact.items()}
    error = math.sqrt(sum(errors[layer] ** 2 * squares[layer] for layer in errors) / sum(squares.values()))
    quantized.quantize(original, scheme)
    chosen = {layer for layer, module in quantized.quantized_layers(model).items() if module.scheme.calibrated}
    changed = [
        parameter
        for parameter in quantized.changed_parameters(original, model)
        if parameter.rpartition(".")[0] not in chosen or parameter.endswith(".bias")
    ]
    far = [layer for layer in sorted(chosen) if not errors[layer] <= MAX_CALIBRATED_ERROR]
    if changed or far:
        message = f"{len(changed + far)} tensors are not what rounding {name} gives, the first {(changed + far)[0]}"
    elif chosen:
        message = f"near {name}, its integers chosen by a text; its matrices moved by {error:.2%} of their size"
    else:
        message = f"what rounding {name} gives, to the bit; its matrices moved by {error:.2%} of their size"
    return Check("rounded", not (changed or far), message, {"relative_error": error})


def check_tied_head(model: LanguageModel) -> Check:
    """Check that head and embedding share storage, as loaded, cast and compiled; or do not, if they are untied.

    Leaves the model in bfloat16.
    """
    if not model.config.tie_word_embeddings:
        is_untied = model.lm_head_weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        return Check("tied head", is_untied, "config.json says untied, and the head has a storage of its own")
    shared = {"loaded": _is_tied(model), "cast to bfloat16": _is_tied(model.to(torch.bfloat16))}
    shared["compiled"] = _is_tied_compiled(model)
    failed = [stage for stage, holds in shared.items() if not holds]
    message = f"not shared once {failed[0]}" if failed else f"one storage: {', '.join(shared)}"
    return Check("tied head", not failed, message)


def _is_tied(model: LanguageModel) -> bool:
    names = [name for name, _ in model.named_parameters() if "lm_head" in name]
    return not names and model.lm_head_weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@torch.no_grad()
def _is_tied_compiled(model: LanguageModel) -> bool:
    """Change a row of the embedding: the compiled model's logit of that token, not in the input, must follow."""
    compiled = torch.compile(model, backend="eager", dynamic=False)
    ids, row = torch.tensor([[1, 2, 3]]), model.model.embed_tokens.weight[0]
    before, saved_row = compiled(ids)[..., 0], row.clone()
    row.zero_()
    after = compiled(ids)[..., 0]
    row.copy_(saved_row)
    return bool(after.eq(0).all()) and bool(compiled(ids)[..., 0].equal(before))


def check_logits(model: LanguageModel, oracle: Oracle, rows: Sequence[Sequence[int]]) -> Check:
    """Check that our logits are Transformers', in fp32, at every length."""
    results = [compare_models(model, oracle, row) for row in rows]
    worst = max(results, key=lambda result: (not result.finite, result.max_abs_diff / result.allowed))
    figures = _figures(results) | {"allowed": worst.allowed}
    return Check("logits float32", all(result.holds for result in results), _describe(results, worst), figures)


def _figures(results: Sequence[LogitDifference]) -> dict[str, Any]:
    return {
        "max_abs_diff": max(result.max_abs_diff for result in results),
        "kl": max(result.kl for result in results),
        "top1_agreement": min(result.top1_agreement for result in results),
        "rows": [result.__dict__ for result in results],
    }


def _describe(results: Sequence[LogitDifference], worst: LogitDifference) -> str:
    lengths = ", ".join(f"{length:,}" for length in sorted({result.tokens for result in results}))
    if not worst.finite:
        return f"logits that are no numbers, in a row of {worst.tokens:,} tokens"
    return (
        f"max difference {worst.max_abs_diff:.1e} (allowed {worst.allowed:.1e}), "
        f"KL {max(result.kl for result in results):.1e}, same likeliest token "
        f"{min(result.top1_agreement for result in results):.2%}; rows of {lengths} tokens"
    )


@torch.inference_mode()
def check_logits_bfloat16(
    model: LanguageModel, oracle: Oracle, rows: Sequence[Sequence[int]], *, exact: Sequence[torch.Tensor]
) -> Check:
    """Check that our bfloat16 is as near to the fp32 logits (`exact`, one per row) as Transformers' bfloat16 is."""
    results, our_kl, their_kl = [], 0.0, 0.0
    for row, reference in zip(rows, exact, strict=True):
        our_hidden, their_hidden = model.hidden_states(torch.tensor([list(row)]))[0], oracle.hidden_states(row)
        results.append(compare_logits(our_hidden, model.logits, their_hidden, their_head=oracle.logits))
        our_kl = max(our_kl, compare_logits(our_hidden, model.logits, reference, their_head=torch.Tensor.float).kl)
        their_kl = max(
            their_kl, compare_logits(their_hidden, oracle.logits, reference, their_head=torch.Tensor.float).kl
        )
    figures = _figures(results) | {"kl_to_float32": our_kl, "their_kl_to_float32": their_kl}
    message = (
        f"KL to the fp32 logits {our_kl:.1e}, Transformers' own {their_kl:.1e}; between the two: max difference "
        f"{figures['max_abs_diff']:.1e}, KL {figures['kl']:.1e}, same likeliest token {figures['top1_agreement']:.2%}"
    )
    return Check("logits bfloat16", our_kl <= 2 * their_kl + 1e-6, message, figures)


def check_greedy(model: LanguageModel, oracle: Oracle, prompts: Sequence[Sequence[int]]) -> Check:
    """Check that greedy text is the same, token by token; at a near tie of the top two, either is right."""
    ties, wrong, count = 0, 0, 0
    for prompt in prompts:
        expected = oracle.greedy(prompt, min(GREEDY_TOKENS, model.config.max_position_embeddings - len(prompt)))
        count, num_matched = count + len(expected), 0
        while num_matched < len(expected):
            remaining = expected[num_matched:]
            ids = [*prompt, *expected[:num_matched]]
            tokens = generate_tokens(model, [ids], GREEDY_SAMPLER, max_new_tokens=len(remaining))
            generated = [token.id for token in tokens]
            length = common_prefix_length(generated, remaining)
            if length < len(remaining):
                is_tie = _nearly_tied(oracle, ids + remaining[:length], generated[length], other=remaining[length])
                ties, wrong = ties + is_tie, wrong + (not is_tie)
                if not is_tie:
                    break
            num_matched += length + 1
    message = (
        f"{wrong} of {len(prompts)} texts differ" if wrong else f"{count} tokens after {len(prompts)} prompts equal"
    )
    message += f", {ties} near ties" if ties else ""
    return Check("greedy", not wrong, message, {"match": not wrong, "tokens": count, "near_ties": ties})


@torch.inference_mode()
def _nearly_tied(oracle: Oracle, ids: Sequence[int], one: int, *, other: int) -> bool:
    """Return whether the oracle's logits of two tokens are nearer than twice the tolerance."""
    last = oracle.logits(oracle.hidden_states(ids)[-1:])[0]
    return (last[one] - last[other]).abs().item() <= 2 * tolerance(last.abs().max().item())


@torch.inference_mode()
def check_cache(model: LanguageModel, row: Sequence[int]) -> Check:
    """Check that decoding through a KV cache, by token and in pieces, gives the logits of the whole row."""
    ids = torch.tensor([list(row)])
    expected = model(ids)[0]
    cache, start, parts = KVCache(model.config, 1, len(row), like=model.lm_head_weight), 0, []
    for size in _piece_sizes(len(row)):
        positions = torch.arange(start, start + size)[None]
        parts.append(
            model.logits(model.hidden_states(ids[:, start : start + size], positions, cache.view(positions)))[0]
        )
        start += size
    note = f"over {len(row)} tokens, one at a time and in pieces"
    return check_close("cached", torch.cat(parts), expected, note=note)


def check_close(name: str, one: Float[Tensor, "*n v"], other: Float[Tensor, "*n v"], *, note: str) -> Check:
    """Check that logits are equal to rounding."""
    worst, allowed = (one - other).abs().max().item(), tolerance(other.abs().max().item())
    message = f"max difference {worst:.1e} (allowed {allowed:.1e}) {note}"
    return Check(name, worst <= allowed, message, {"max_abs_diff": worst, "allowed": allowed})


def _piece_sizes(length: int) -> list[int]:
    """Return the sizes of a first piece, single tokens, and the rest."""
    sizes = [max(1, length // 3), *[1] * (length // 3)]
    return [*sizes, length - sum(sizes)] if length > sum(sizes) else sizes[:length]


def check_identity(
    folder: Path, config: ModelConfig, release: Release, *, hashes: Mapping[str, str], golden_holds: bool
) -> tuple[Check, str | None]:
    """Check that settings, count and hashes are the published ones; return also the mistake's name if it has one.

    Files of another dtype or in other shards have another hash; that alone is no failure if the model reproduces the
    release's text (`golden_holds`).
    """
    total = sum(parameter_counts(config).values())
    wrong = [
        f"{MISTAKE_BY_SETTING.get(name, 'another shape')}: {name} is {value!r}, the release has {published_value!r}"
        for name, (value, published_value) in config_differences(config, release).items()
    ]
    content = {} if llama.is_gguf_file(folder) else families.read_json(folder / huggingface.CONFIG)
    for name in ("bos_token_id", "eos_token_id"):
        expected = release.__dict__[name]
        if expected is not None and content.get(name, expected) != expected:
            wrong.append(f"{name} is {content[name]!r}, the release has {expected!r}")
    if total != release.parameters:
        wrong.append(f"{total:,} parameters, the release has {release.parameters:,}")
    changed_files = [name for name, expected in release.sha256.items() if hashes.get(name) != expected]
    cause = next((reason for reason in wrong if reason.startswith(tuple(MISTAKE_BY_SETTING.values()))), None)
    if not golden_holds:
        wrong += [f"{name} is not the published file (its sha256 differs)" for name in changed_files]
    matching = (
        "settings and parameters are" if changed_files or not release.sha256 else "settings, parameters and sha256 are"
    )
    message = f"{release.id}: " + ("; ".join(wrong) or f"{matching} the published ones")
    if changed_files and golden_holds:
        message += "; the files are not, byte for byte"
    return Check("identity", not wrong, message, {"release": release.id, "sha256": dict(hashes)}), cause


@torch.inference_mode()
def check_golden(model: LanguageModel, release: Release) -> Check:
    """Check that the model reproduces the texts and logits of the release."""
    results = [(matches_golden(lambda ids: model(ids[None])[0], entry), entry) for entry in release.golden]
    wrong = [entry for holds, entry in results if not holds and entry.confidence == "high"]
    unsure = sum(not holds for holds, entry in results if entry.confidence != "high")
    sure = sum(entry.confidence == "high" for entry in release.golden)
    message = f"{sure - len(wrong)} of {sure} published texts and logits reproduced"
    if wrong:
        message += f"; not {wrong[0].prompt or list(wrong[0].prompt_ids)!r} -> {wrong[0].greedy_text!r}"
    message += f"; {unsure} of {len(results) - sure} less certain ones differ" if unsure else ""
    return Check("golden", not wrong, message, {"known": len(results), "wrong": len(wrong), "unsure": unsure})
