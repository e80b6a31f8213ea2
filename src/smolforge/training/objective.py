"""What a micro-batch loses, as one function of its ids and labels: the model, what it attends to, and its loss.

    ids -> [ body: embedding, layers, norm ] -> states -> loss in chunks
             compiled, if at all                          never compiled: it does not gain by it

Whatever goes around a forward pass goes around this one: precision, compilation, recomputation, several ranks.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smolforge.config import Recipe
from smolforge.data.batches import IGNORED
from smolforge.device import autocast
from smolforge.models.activation_checkpointing import Checkpointing, checkpointing
from smolforge.models.attention import packing
from smolforge.models.decoder import LanguageModel
from smolforge.training.dpo import Preference
from smolforge.training.loss import loss_sum

log = logging.getLogger("smolforge")


class Objective(nn.Module):
    """Called with a micro-batch, it gives sums over its labels by name; `objective` is to be minimised.

    With a `preference` they are sums over its pairs. Positions that begin anew keep documents apart, and so does a
    `separator` that ends each of them; `checkpoint` says how little layers keep for their backward.
    """

    def __init__(
        self,
        model: LanguageModel,
        dtype: str = "float32",
        separator: int | None = None,
        z_loss: float = 0.0,
        checkpoint: Checkpointing = None,
        compiled: bool = False,
        preference: Preference | None = None,
    ) -> None:
        super().__init__()
        self.model, self.dtype, self.separator, self.z_loss = model, dtype, separator, z_loss
        self.preference = preference
        config = model.config
        known = config.model_type != "mixtral" and config.feed_forward is None
        self.through = checkpointing(checkpoint, config.intermediate_size if known else None)
        self.body = compiled_or_not(model.hidden_and_balance) if compiled else model.hidden_and_balance

    @classmethod
    def of(cls, model: LanguageModel, recipe: Recipe) -> "Objective":
        """As a recipe trains it."""
        separator = model.tokenizer.eos_id if recipe.data.intra_document_masking else None
        settings = recipe.train
        return cls(
            model,
            settings.dtype,
            separator,
            settings.z_loss,
            settings.recomputed,
            settings.compile is True,
            Preference(recipe.dpo.beta) if recipe.data.format == "pairs" else None,
        )

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        reference: Float[Tensor, "b t"] | None = None,
    ) -> dict[str, Tensor]:
        with autocast(self.dtype, ids.device):
            hidden, balance = self.body(ids, *packing(ids, self.separator, positions), self.through)
            if self.preference is None:
                sums, count = self.predicted(hidden, labels)
            else:
                assert positions is not None and reference is not None, "rows of pairs"
                sums, count = self.preference(hidden, self.model.head, labels, positions, reference)
        if isinstance(balance, Tensor):
            sums["balance_loss"] = balance * count
            sums["objective"] = sums["objective"] + self.model.config.router_aux_loss_coef * sums["balance_loss"]
        return sums

    def predicted(self, hidden: Float[Tensor, "b t c"], labels: Int[Tensor, "b t"]) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over labels by name, and how many labels there are."""
        total, z = loss_sum(hidden, self.model.head, labels, self.z_loss)
        sums = {"objective": total, "loss": total.detach() - z} | ({"z_loss": z} if self.z_loss else {})
        return sums, (labels != IGNORED).sum()


def compiled_or_not(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile for the shapes it meets, or itself where no compiler works."""
    chosen: Callable[..., Any] | None = None
    attempt = torch.compile(function, dynamic=False)

    def call(*given: Any) -> Any:
        nonlocal chosen
        if chosen is not None:
            return chosen(*given)
        try:
            result, chosen = attempt(*given), attempt
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            log.warning("torch.compile does not work here, so training goes on without it: %s", reason)
            result, chosen = function(*given), function
        return result

    return call
