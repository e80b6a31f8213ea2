"""Compare with Transformers' own implementation on the same files: its logits and its greedy text.

Axes: t tokens, c hidden, v vocabulary.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smolforge.checkpoint.loading import read_config
from smolforge.config.model import RopeScaling
from smolforge.errors import InvalidFileError, MissingResourceError, install_command
from smolforge.models.decoder import LanguageModel

CHUNK_TOKENS = 512
"""Tokens whose logits exist at the same time."""
States = Float[Tensor, "t _"]
LogitsOf = Callable[[States], Float[Tensor, "t v"]]


@dataclass(frozen=True)
class LogitDifference:
    """How far one model's predictions are from another's, over the tokens of one row."""

    tokens: int
    max_abs_logit: float
    max_abs_diff: float
    kl: float
    """Mean over tokens of KL(theirs || ours), in nats."""
    top1_agreement: float
    unexplained: int
    """Tokens where the argmax differs though the top two of theirs are apart by more than twice the difference."""
    finite: bool
    """Whether every logit of both is finite; the figures are of the tokens before the first that is not."""

    @property
    def allowed(self) -> float:
        return tolerance(self.max_abs_logit)

    @property
    def holds(self) -> bool:
        return self.finite and self.max_abs_diff <= self.allowed and not self.unexplained


def tolerance(max_abs_logit: float) -> float:
    """Return how far fp32 logits may be apart: 1e-4, and more only if logits are large."""
    return 1e-4 * max(1.0, max_abs_logit / 4)


class Oracle:
    """Transformers' model of a folder or a .gguf. Raises MissingResourceError if Transformers is not installed."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        transformers = require_transformers()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        gguf_kwargs = {"gguf_file": folder.name} if folder.is_file() else {}
        if gguf_kwargs and find_spec("accelerate") is None:
            raise MissingResourceError(f"Transformers reads a .gguf with accelerate; {install_command('verify')}")
        with transformers_errors(), redirect_stderr(io.StringIO()):  # bars of a .gguf that no setting turns off
            model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
                folder.parent if gguf_kwargs else folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **gguf_kwargs,
            )
        unread = sorted(loading_info["missing_keys"])  # it would initialize them
        if gguf_kwargs and read_config(folder).rope_scaling != RopeScaling():
            unread.append("the rotary scaling")
        if unread:
            raise InvalidFileError(
                f"Transformers does not read all of {folder}: it misses {unread[0]}; "
                "export --to transformers makes a folder that it reads"
            )
        self.model: Any = model.eval()
        # What a file says of sampling is no part of what the model computes.
        self.model.generation_config = transformers.GenerationConfig()

    def hidden_states(self, ids: Sequence[int]) -> Float[Tensor, "t c"]:
        with transformers_errors():
            return self.model.model(torch.tensor([list(ids)]), use_cache=False, return_dict=True).last_hidden_state[0]

    def logits(self, hidden: Float[Tensor, "t c"]) -> Float[Tensor, "t v"]:
        return self.model.lm_head(hidden)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the greedy continuation, with end-of-text tokens like any other."""
        ids = torch.tensor([list(prompt)])
        with transformers_errors():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()


def require_transformers() -> Any:
    """Return Transformers. Raises MissingResourceError, with a hint, if it cannot be imported."""
    try:
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401
    except Exception as error:  # it may be there and broken
        raise MissingResourceError(
            f"this compares with Transformers, which cannot be imported ({' '.join(str(error).split())[:200]}); "
            f"{install_command('verify')}"
        ) from None
    return transformers


@contextmanager
def transformers_errors() -> Iterator[None]:
    """Turn any exception of Transformers into an InvalidFileError of one sentence."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        raise InvalidFileError(
            f"Transformers does not take this model: {type(error).__name__}: {message[:300]}"
        ) from error


@torch.inference_mode()
def compare_models(model: LanguageModel, oracle: Oracle, ids: Sequence[int]) -> LogitDifference:
    """Compare our logits with the oracle's for one row, in chunks, so that long rows need no more memory."""
    our_hidden = model.hidden_states(torch.tensor([list(ids)]))[0]
    return compare_logits(our_hidden, model.logits, oracle.hidden_states(ids), their_head=oracle.logits)


def compare_logits(
    our_hidden: States, our_head: LogitsOf, their_hidden: States, *, their_head: LogitsOf
) -> LogitDifference:
    """Return the difference of two heads over two states of the same tokens; `their_hidden` is the reference."""
    largest = worst = kl = 0.0
    agreed = unexplained = 0
    finite = True
    for a, b in logit_chunks(our_head, our_hidden, their_head, their_hidden=their_hidden):
        finite = bool(a.isfinite().all() and b.isfinite().all())
        if not finite:
            break
        diff = (a - b).abs().amax(-1)
        largest, worst = max(largest, b.abs().max().item()), max(worst, diff.max().item())
        kl += F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum").item()
        same = a.argmax(-1) == b.argmax(-1)
        first, second = b.topk(min(2, b.shape[-1])).values.unbind(-1)
        agreed += int(same.sum())
        unexplained += int((~same & (first - second > 2 * diff.clamp(max=1e-3))).sum())
    count = len(our_hidden)
    return LogitDifference(count, largest, worst, kl / count, agreed / count, unexplained, finite)


def logit_chunks(
    our_head: LogitsOf, our_hidden: States, their_head: LogitsOf, *, their_hidden: States
) -> Iterator[tuple[Float[Tensor, "t v"], Float[Tensor, "t v"]]]:
    """Yield the logits of both, in fp32, a chunk of tokens at a time."""
    for a, b in zip(our_hidden.split(CHUNK_TOKENS), their_hidden.split(CHUNK_TOKENS), strict=True):
        yield our_head(a).float(), their_head(b).float()
