"""Transformers' own implementation on the same files: its logits, its greedy text, and how far ours is from them.

Axes: t tokens, c hidden, v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smolforge.errors import InvalidFile, MissingResource
from smolforge.models.decoder import LanguageModel

CHUNK = 512
"""Tokens whose logits exist at the same time."""
States = Float[Tensor, "t _"]
LogitsOf = Callable[[States], Float[Tensor, "t v"]]


@dataclass(frozen=True)
class Difference:
    """How far one model's predictions are from another's, over the tokens of one row."""

    tokens: int
    max_abs_logit: float
    max_abs_diff: float
    kl: float
    """Mean over tokens of KL(theirs || ours), in nats."""
    top1_agreement: float
    unexplained: int
    """Tokens where the likeliest differ though the top two of theirs are apart by more than twice the difference."""
    finite: bool
    """Whether every logit of both is a number; the figures are of the tokens before the first that is not."""

    @property
    def allowed(self) -> float:
        return tolerance(self.max_abs_logit)

    @property
    def holds(self) -> bool:
        return self.finite and self.max_abs_diff <= self.allowed and not self.unexplained


def tolerance(max_abs_logit: float) -> float:
    """How far fp32 logits may be apart: 1e-4, and more only where logits are large."""
    return 1e-4 * max(1.0, max_abs_logit / 4)


class Oracle:
    """Transformers' model of a folder or a .gguf. Raises MissingResource where Transformers is not installed."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        transformers = require()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        where = {"gguf_file": folder.name} if folder.is_file() else {}
        if where and find_spec("gguf") is None:
            raise MissingResource("Transformers reads a .gguf with the gguf package; pip install 'smolforge[verify]'")
        with refusals():
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                folder.parent if where else folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **where,
            )
        if where and told["missing_keys"]:  # it would make them up
            raise InvalidFile(f"Transformers does not read all of {folder}: it misses {min(told['missing_keys'])}")
        self.model: Any = model.eval()
        # What a file says of sampling is no part of what the model computes.
        self.model.generation_config = transformers.GenerationConfig()

    def hidden(self, ids: Sequence[int]) -> Float[Tensor, "t c"]:
        with refusals():
            return self.model.model(torch.tensor([list(ids)]), use_cache=False, return_dict=True).last_hidden_state[0]

    def logits(self, hidden: Float[Tensor, "t c"]) -> Float[Tensor, "t v"]:
        return self.model.lm_head(hidden)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, end-of-text tokens taken like any other."""
        ids = torch.tensor([list(prompt)])
        with refusals():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()


def require() -> Any:
    """Transformers, or MissingResource with the way to it."""
    try:
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401
    except Exception as error:  # it may be there and broken
        raise MissingResource(
            f"this compares with Transformers, which cannot be imported ({' '.join(str(error).split())[:200]}); "
            "pip install 'smolforge[verify]'"
        ) from None
    return transformers


@contextmanager
def refusals() -> Iterator[None]:
    """Turn whatever Transformers raises into one sentence: a model it does not take does not hold."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        raise InvalidFile(f"Transformers does not take this model: {type(error).__name__}: {said[:300]}") from error


@torch.inference_mode()
def difference(ours: LanguageModel, theirs: Oracle, ids: Sequence[int]) -> Difference:
    """Our logits beside theirs for one row, in chunks, so that long rows need no more memory than short ones."""
    mine = ours.hidden(torch.tensor([list(ids)]))[0]
    return compared(mine, ours.logits, theirs.hidden(ids), theirs.logits)


def compared(mine: States, my_logits: LogitsOf, yours: States, your_logits: LogitsOf) -> Difference:
    """The difference of two heads over two states of the same tokens; `yours` is the reference."""
    largest = worst = kl = 0.0
    agreed = unexplained = 0
    finite = True
    for a, b in chunks(my_logits, mine, your_logits, yours):
        finite = bool(a.isfinite().all() and b.isfinite().all())
        if not finite:
            break
        apart = (a - b).abs().amax(-1)
        largest, worst = max(largest, b.abs().max().item()), max(worst, apart.max().item())
        kl += F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum").item()
        same = a.argmax(-1) == b.argmax(-1)
        first, second = b.topk(min(2, b.shape[-1])).values.unbind(-1)
        agreed += int(same.sum())
        unexplained += int((~same & (first - second > 2 * apart.clamp(max=1e-3))).sum())
    count = len(mine)
    return Difference(count, largest, worst, kl / count, agreed / count, unexplained, finite)


def chunks(
    my_logits: LogitsOf, mine: Float[Tensor, "t c"], your_logits: LogitsOf, yours: Float[Tensor, "t c"]
) -> Iterator[tuple[Float[Tensor, "t v"], Float[Tensor, "t v"]]]:
    """Logits of both, in fp32, a few tokens at a time."""
    for a, b in zip(mine.split(CHUNK), yours.split(CHUNK), strict=True):
        yield my_logits(a).float(), your_logits(b).float()
