"""The model that a run begins from: fresh weights, somebody's, or somebody's that stay while low-rank updates learn."""

import logging
from pathlib import Path
from typing import Any

import torch

from smolforge.checkpoint import loading, nanotron, optimizer_state, peft_adapter
from smolforge.config import Recipe
from smolforge.data.mixture import Prepared
from smolforge.errors import InvalidFile
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel, adapted, allocate, build
from smolforge.training import optim

log = logging.getLogger("smolforge")


def initial_model(recipe: Recipe, text: Prepared, filled_later: bool) -> LanguageModel:
    """Fresh weights, those to start from, or none yet where a checkpoint or rank 0 is about to fill them."""
    dtype = torch.float64 if recipe.train.dtype == "float64" else torch.float32
    low_rank = recipe.lora.rank is not None
    if filled_later and not low_rank:
        model = allocate(recipe.model, dtype)
    elif recipe.init_from is not None:
        model = adapted(begun_from(loading.find(recipe.init_from), recipe.init_moments, dtype), recipe.model)
    else:
        model = build(recipe.model, recipe.seed, dtype)
    if low_rank:
        lora.adapt(model, recipe.lora, recipe.seed)
    model.tokenizer = text.tokenizer()
    return model


def begun_from(folder: Path, with_moments: bool, dtype: torch.dtype) -> LanguageModel:
    """A folder's model; with moments, the weights that these belong to, to all the digits there are."""
    if with_moments and nanotron.is_checkpoint(folder):
        return nanotron.optimizer.load(folder, dtype)
    return loading.load(folder, dtype).train() if peft_adapter.is_adapter(folder) else loading.weights_of(folder, dtype)


def bring_moments(recipe: Recipe, model: LanguageModel, chosen: list[torch.optim.Optimizer]) -> None:
    """Where the recipe asks for them, give AdamW the moments of the model that the run starts from.

    An average of the weights begins with the run.
    """
    if recipe.init_moments and recipe.init_from is not None:
        found = optimizer_state.read(loading.find(recipe.init_from), model.head.dtype)
        optim.load_state_tensors([each for each in chosen if not isinstance(each, optim.Average)], model, found)
        steps = found[f"step.{next(name for name, _ in model.named_parameters())}"]
        log.info("AdamW goes on with the moments of %s after its %d steps", recipe.init_from, steps.item())


def told_of_base(recipe: Recipe, base: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a checkpoint of low-rank updates says of the model they change: for us its fingerprint, and for peft."""
    if recipe.lora.rank is None or recipe.init_from is None:
        return {}, None
    return {"base": base}, peft_adapter.settings_of(recipe.lora, recipe.init_from)


def check_base(recipe: Recipe, base: str | None, checkpoint: Path, facts: dict[str, Any]) -> None:
    """Raises InvalidFile where the model that low-rank updates belong to is another by now."""
    if recipe.lora.rank is not None and base != facts.get("base"):
        raise InvalidFile(f"{checkpoint} changes the model {recipe.init_from}, whose weights are others now")
