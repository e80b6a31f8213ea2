"""The model a run starts from: new weights, a base model's, or a base model's that LoRA leaves as they are."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smolforge.checkpoint import loading, nanotron, optimizer_state, peft_adapter
from smolforge.config import Recipe
from smolforge.data.mixture import PreparedData
from smolforge.errors import InvalidFileError
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel, adapt_to_config, build, empty_model
from smolforge.training import optim

log = logging.getLogger("smolforge")


def initial_model(recipe: Recipe, text: PreparedData, filled_later: bool) -> LanguageModel:
    """Return a model with new weights, those to start from, or empty ones that a checkpoint or rank 0 will fill."""
    dtype = torch.float64 if recipe.train.dtype == "float64" else torch.float32
    with_lora = recipe.lora.rank is not None
    if filled_later and not with_lora:
        model = empty_model(recipe.model, dtype)
    elif recipe.init_from is not None:
        model = adapt_to_config(
            load_base_model(loading.resolve_model_path(recipe.init_from), recipe.init_moments, dtype), recipe.model
        )
    else:
        model = build(recipe.model, recipe.seed, dtype)
    if with_lora:
        lora.add_lora(model, recipe.lora, recipe.seed)
    model.tokenizer = text.tokenizer()
    if recipe.init_from is not None and not filled_later:  # a checkpoint says it itself
        model.tokenizer = model.tokenizer.with_eos_ids(base_eos_ids(loading.resolve_model_path(recipe.init_from)))
    return model


def base_eos_ids(folder: Path) -> Sequence[int]:
    """Return the ids that end an answer of a folder's model."""
    tokenizer = loading.tokenizer_of(loading.tokenizer_folder(folder))
    return () if tokenizer is None else tokenizer.eos_ids


def load_base_model(folder: Path, with_moments: bool, dtype: torch.dtype) -> LanguageModel:
    """Load a folder's model; with moments, in the precision of the fp32 weights that belong to them."""
    if with_moments and nanotron.is_checkpoint(folder):
        return nanotron.optimizer.load_master_weights(folder, dtype)
    return (
        loading.load(folder, dtype).train() if peft_adapter.is_adapter(folder) else loading.load_weights(folder, dtype)
    )


def load_initial_moments(recipe: Recipe, model: LanguageModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load AdamW's moments of the base model, where the recipe asks for them. The EMA starts with the run."""
    if recipe.init_moments and recipe.init_from is not None:
        tensors = optimizer_state.read_moments(loading.resolve_model_path(recipe.init_from), model.lm_head_weight.dtype)
        optim.load_state_tensors(
            [optimizer for optimizer in optimizers if not isinstance(optimizer, optim.EMA)], model, tensors
        )
        steps = tensors[f"step.{next(name for name, _ in model.named_parameters())}"]
        log.info("AdamW goes on with the moments of %s after its %d steps", recipe.init_from, steps.item())


def base_model_metadata(recipe: Recipe, base: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return what a LoRA checkpoint says of its base model: our fingerprint of it, and peft's settings."""
    if recipe.lora.rank is None or recipe.init_from is None:
        return {}, None
    return {"base": base}, peft_adapter.adapter_config(recipe.lora, recipe.init_from)


def check_base(recipe: Recipe, base: str | None, checkpoint: Path, *, metadata: dict[str, Any]) -> None:
    """Raise InvalidFileError where the base model of a LoRA run has changed since."""
    if recipe.lora.rank is not None and base != metadata.get("base"):
        raise InvalidFileError(f"{checkpoint} changes the model {recipe.init_from}, whose weights are others now")
