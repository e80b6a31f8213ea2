"""How the next token is chosen: a row of small frozen values, each a function from logits to logits.

    RepetitionPenalty(1.1), Temperature(0.7), TopK(50), TopP(0.95), MinP(0.05)

Their order and meaning are Transformers' (its logits processors and warpers of the same names). No
sampler at all, or a temperature of 0, is greedy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.config import Generation
from smolforge.errors import InvalidFileError

Logits = Float[Tensor, " v"]
EXCLUDED = float("-inf")
GREEDY_BELOW = 1e-5
"""Below this temperature the likeliest token has all the probability that fp32 can express."""


@runtime_checkable
class Sampler(Protocol):
    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits: ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens already seen, prompt included, become less likely. Keskar et al. 2019, https://arxiv.org/abs/1909.05858."""

    penalty: float

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        score = logits[token_ids]
        return logits.scatter(0, token_ids, torch.where(score < 0, score * self.penalty, score / self.penalty))


@dataclass(frozen=True)
class PresencePenalty:
    """`frequency` is taken off a token's logit for each time it came up behind the prompt, `presence` once.

    As OpenAI defines them: https://platform.openai.com/docs/api-reference/completions.
    """

    presence: float
    frequency: float
    prompt_tokens: int

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        times = token_ids[self.prompt_tokens :].bincount(minlength=len(logits))
        return logits - self.frequency * times - self.presence * (times > 0)


@dataclass(frozen=True)
class LogitBias:
    """What is added to the logits of some tokens, as (id, bias)."""

    biases: tuple[tuple[int, float], ...]

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        ids, values = zip(*self.biases, strict=True)
        return logits.index_add(0, torch.tensor(ids, device=logits.device), logits.new_tensor(values))


@dataclass(frozen=True)
class Temperature:
    """Below 1 sharpens, above 1 flattens."""

    temperature: float

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        return logits / self.temperature


@dataclass(frozen=True)
class TopK:
    """Only the k likeliest tokens remain (and those exactly as likely as the k-th)."""

    k: int

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        lowest = logits.topk(min(self.k, len(logits))).values[-1]
        return logits.masked_fill(logits < lowest, EXCLUDED)


@dataclass(frozen=True)
class TopP:
    """The likeliest tokens that together hold probability p remain. Holtzman et al. 2019, https://arxiv.org/abs/1904.09751."""

    p: float

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        ordered, order = logits.sort(descending=False)
        excluded = ordered.softmax(-1).cumsum(-1) <= 1 - self.p
        excluded[-1] = False
        return logits.masked_fill(excluded.scatter(0, order, excluded), EXCLUDED)


@dataclass(frozen=True)
class MinP:
    """Tokens at least p times as likely as the likeliest remain. Nguyen et al. 2024, https://arxiv.org/abs/2407.01082."""

    p: float

    def __call__(self, logits: Logits, token_ids: Int[Tensor, " s"]) -> Logits:
        probability = logits.softmax(-1)
        return logits.masked_fill(probability < self.p * probability.max(), EXCLUDED)


@dataclass(frozen=True)
class SamplerChain:
    """A chain of samplers and the draw at its end, or, greedy, no draw but the likeliest token."""

    samplers: tuple[Sampler, ...]
    greedy: bool

    def __call__(self, logits: Logits, token_ids: Sequence[int], generator: torch.Generator) -> int:
        scores = logits.float()
        if not bool(scores.isfinite().all()):
            raise InvalidFileError("the model gives logits that are no numbers; its weights are damaged")
        if self.samplers:
            history = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
            for sampler in self.samplers:
                scores = sampler(scores, history)
        if self.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator))


def make_sampler(options: Generation, *before: Sampler) -> SamplerChain:
    """Make the chain for Transformers' generation settings, after the samplers of `before`."""
    chain: list[Sampler] = [*before]
    if options.repetition_penalty != 1:
        chain.append(RepetitionPenalty(options.repetition_penalty))
    if options.temperature < GREEDY_BELOW:
        return SamplerChain(tuple(chain), greedy=True)
    if options.temperature != 1:
        chain.append(Temperature(options.temperature))
    if options.top_k is not None:
        chain.append(TopK(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        chain.append(TopP(options.top_p))
    if options.min_p:
        chain.append(MinP(options.min_p))
    return SamplerChain(tuple(chain), greedy=False)
