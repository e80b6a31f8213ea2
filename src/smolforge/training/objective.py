"""The training objective as one function of a micro-batch: the model, its attention context, and the loss.

    ids -> [ body: embedding, layers, norm ] -> states -> loss in chunks
             compiled, if at all                          never compiled: it would not be faster

Precision, compilation, activation checkpointing and DistributedDataParallel wrap this one function.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smolforge.config import Recipe
from smolforge.data.batches import IGNORE_INDEX
from smolforge.device import autocast
from smolforge.models.activation_checkpointing import Checkpointing, checkpoint_wrapper
from smolforge.models.attention import packed_attention
from smolforge.models.decoder import LanguageModel
from smolforge.training.dpo import DPOLoss
from smolforge.training.loss import loss_sum

log = logging.getLogger("smolforge")


class Objective(nn.Module):
    """Return sums over a micro-batch's labels by name; `objective` is the one to minimize.

    With a `preference` (DPO) they are sums over its pairs. Positions that restart at 0 keep documents apart, and so
    does a `separator` that ends each of them; `checkpoint` is the kind of activation checkpointing.
    """

    def __init__(
        self,
        model: LanguageModel,
        dtype: str = "float32",
        separator: int | None = None,
        *,
        z_loss: float = 0.0,
        checkpoint: Checkpointing = None,
        compiled: bool = False,
        preference: DPOLoss | None = None,
    ) -> None:
        super().__init__()
        self.model, self.dtype, self.separator, self.z_loss = model, dtype, separator, z_loss
        self.preference = preference
        config = model.config
        gated_mlp = not config.has_experts and config.feed_forward is None
        self.layer_call = checkpoint_wrapper(checkpoint, config.intermediate_size if gated_mlp else None)
        self.body = compile_or_eager(model.hidden_states_and_aux_loss) if compiled else model.hidden_states_and_aux_loss

    @classmethod
    def from_recipe(cls, model: LanguageModel, recipe: Recipe) -> "Objective":
        """Return the objective of a recipe."""
        separator = model.tokenizer.eos_id if recipe.data.intra_document_masking else None
        settings = recipe.train
        return cls(
            model,
            settings.dtype,
            separator,
            z_loss=settings.z_loss,
            checkpoint=settings.recompute_mode,
            compiled=settings.compile is True,
            preference=DPOLoss(recipe.dpo.beta) if recipe.data.format == "pairs" else None,
        )

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        reference: Float[Tensor, "b t"] | None = None,
    ) -> dict[str, Tensor]:
        with autocast(self.dtype, ids.device):
            hidden, balance = self.body(ids, *packed_attention(ids, self.separator, positions), call=self.layer_call)
            if self.preference is None:
                sums, count = self.cross_entropy(hidden, labels)
            else:
                assert positions is not None and reference is not None, "rows of pairs"
                sums, count = self.preference(hidden, self.model.lm_head_weight, labels, positions, reference)
        if isinstance(balance, Tensor):
            sums["balance_loss"] = balance * count
            sums["objective"] = sums["objective"] + self.model.config.router_aux_loss_coef * sums["balance_loss"]
        return sums

    def cross_entropy(
        self, hidden: Float[Tensor, "b t c"], labels: Int[Tensor, "b t"]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return sums over labels by name, and the number of labels."""
        total, z = loss_sum(hidden, self.model.lm_head_weight, labels, z_loss=self.z_loss)
        sums = {"objective": total, "loss": total.detach() - z} | ({"z_loss": z} if self.z_loss else {})
        return sums, (labels != IGNORE_INDEX).sum()


def compile_or_eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled for the shapes it meets, or in eager mode where no compiler works."""
    selected: Callable[..., Any] | None = None
    compiled = torch.compile(function, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal selected
        if selected is not None:
            return selected(*args, **kwargs)
        try:
            result, selected = compiled(*args, **kwargs), compiled
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            log.warning("torch.compile does not work here, so training goes on without it: %s", reason)
            result, selected = function(*args, **kwargs), function
        return result

    return call
