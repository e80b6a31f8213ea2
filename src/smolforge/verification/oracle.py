"""Transformers' own implementation on the same files: its logits, its greedy text, and how far ours is from them.

Axes: t tokens, c hidden, v vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smolforge.errors import MissingResource
from smolforge.model import LanguageModel

CHUNK = 512
"""Tokens whose logits exist at the same time."""
LogitsOf = Callable[[Float[Tensor, "t c"]], Float[Tensor, "t v"]]


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

    @property
    def allowed(self) -> float:
        """Bound of the difference in fp32: 1e-4, and more only where logits are large."""
        return 1e-4 * max(1.0, self.max_abs_logit / 4)

    @property
    def holds(self) -> bool:
        return self.max_abs_diff <= self.allowed and not self.unexplained


class Oracle:
    """Transformers' model of a folder. Raises MissingResource where Transformers is not installed."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingResource(
                "verify compares with Transformers, which is not installed; pip install 'smolforge[verify]', "
                "or --against golden for the published references alone"
            ) from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        ).eval()

    def hidden(self, ids: Sequence[int]) -> Float[Tensor, "t c"]:
        return self.model.model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]

    def logits(self, hidden: Float[Tensor, "t c"]) -> Float[Tensor, "t v"]:
        return self.model.lm_head(hidden)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, end-of-text tokens taken like any other."""
        ids = torch.tensor([list(prompt)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
        return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def difference(ours: LanguageModel, theirs: Oracle, ids: Sequence[int]) -> Difference:
    """Our logits beside theirs for one row, in chunks, so that long rows need no more memory than short ones."""
    mine = ours.hidden(torch.tensor([list(ids)]))[0]
    return compared(mine, ours.logits, theirs.hidden(ids), theirs.logits)


def compared(
    mine: Float[Tensor, "t c"], my_logits: LogitsOf, yours: Float[Tensor, "t c"], your_logits: LogitsOf
) -> Difference:
    """The difference of two heads over two hidden states of the same tokens; `yours` is the reference."""
    largest = worst = kl = 0.0
    agreed = unexplained = 0
    for a, b in chunks(my_logits, mine, your_logits, yours):
        apart = (a - b).abs().amax(-1)
        largest, worst = max(largest, b.abs().max().item()), max(worst, apart.max().item())
        kl += F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum").item()
        same = a.argmax(-1) == b.argmax(-1)
        first, second = b.topk(min(2, b.shape[-1])).values.unbind(-1)
        agreed += int(same.sum())
        unexplained += int((~same & (first - second > 2 * apart.clamp(max=1e-3))).sum())
        if not math.isfinite(worst):
            break
    count = len(mine)
    return Difference(count, largest, worst, kl / count, agreed / count, unexplained)


def chunks(
    my_logits: LogitsOf, mine: Float[Tensor, "t c"], your_logits: LogitsOf, yours: Float[Tensor, "t c"]
) -> Iterator[tuple[Float[Tensor, "t v"], Float[Tensor, "t v"]]]:
    """Logits of both, in fp32, a few tokens at a time."""
    for a, b in zip(mine.split(CHUNK), yours.split(CHUNK), strict=True):
        yield my_logits(a).float(), your_logits(b).float()
