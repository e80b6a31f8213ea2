"""One training step, ours and our peers': the same weights, batch, loss and optimizer, each in its own best loop.

Weights come from a Hugging Face model folder, so that each reads them in its own way. A step is forward, backward,
clipping and AdamW over one micro-batch; ours is the loop of `smolforge train` itself, guard included. Under bfloat16
all keep fp32 weights and autocast. Nobody reads a loss before its turn is over.

Each imports its own package when it is made: another may not be there, or not beside it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from job import SEPARATOR, Job, Taken, attending, autocast, batch, moved, now, prepare, turn
from torch import Tensor, nn


class Smolforge:
    """Ours."""

    def __init__(self, **given: Any) -> None:
        from smolforge.checkpoint import huggingface
        from smolforge.data.batches import Batch
        from smolforge.training import guard
        from smolforge.training.loop import TrainState
        from smolforge.training.objective import Objective
        from smolforge.training.optim import build_optimizers

        self.job = Job(**given)
        prepare(self.job)
        model = huggingface.load(self.job.folder).to(self.job.device)
        if self.job.compiled == "layers":
            for layer in model.model.layers:
                layer.self_attn.layer = 0  # whole rows ask no layer's number, and one number makes one graph
                layer.compile(dynamic=False)
        separator = SEPARATOR if self.job.attention == "documents" else None
        whole = self.job.compiled not in ("no", "layers")
        self.objective = Objective(model, self.job.dtype, separator, checkpoint=self.job.checkpoint, compiled=whole)
        self.batch = Batch(*batch(self.job, model.config.vocab_size))
        self.recipe = recipe(self.job, model.config)
        self.judge = guard.LossGuard(
            self.recipe.guard, guard.fold_incidents([]), 0, recent=[], record=lambda incident: None
        )
        self.optimizers, self.state = build_optimizers(model, self.recipe.optim), TrainState()

    def turn(self, steps: int, warm: int = 0) -> dict[str, Any]:
        return turn(self.job, self.take, steps, warm)

    def take(
        self,
        count: int,
        after: Callable[..., None] = lambda *_: None,
        batches: Iterable[Any] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Taken:
        """So many steps of the loop, timed from the moment it asks for the first batch. `after` is called each step."""
        from smolforge.config.base import replace_settings
        from smolforge.training.loop import Callback, Hooks, train
        from smolforge.training.step_timer import StepCost, StepTimer, clock

        begun: list[float] = []
        heard: list[float] = []

        def timed() -> Iterator[Any]:
            begun.append(now(self.job))
            yield from batches or itertools.repeat(self.batch)

        callbacks = [
            Callback(1, lambda _, metrics: heard.append(metrics["loss"]), metrics_only=True),
            Callback(1, after, metrics_only=True),
        ]
        self.state = train(
            self.objective,
            self.optimizers,
            timed(),
            recipe=replace_settings(self.recipe, {"train.steps": self.state.step + count}),
            state=self.state,
            timer=StepTimer(StepCost(self.batch.input_ids.numel(), 1, 1, 1.0), 1, clock(torch.device(self.job.device))),
            hooks=Hooks(callbacks, should_stop=stopping, step_guard=self.judge),
        )
        return now(self.job) - begun[0], heard

    def waits(self) -> str | None:
        """What a step waits for the GPU for, if it does, between its batch and the end of its update."""
        if self.job.device != "cuda":
            return None

        def batches() -> Iterator[Any]:
            torch.cuda.set_sync_debug_mode("error")
            yield self.batch

        def stopping() -> bool:  # asked before a step and once it is launched
            torch.cuda.set_sync_debug_mode("default")
            return False

        try:
            with attending(self.job.attention):
                self.take(1, batches=batches(), stopping=stopping)
        except RuntimeError as error:
            return str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            self.objective.zero_grad(set_to_none=True)
        return None

    def repeats(self, steps: int = 3) -> bool:
        """Whether the same steps from the same weights end at the same weights, to the bit."""
        from smolforge.training.loop import TrainState
        from smolforge.training.optim import build_optimizers

        parameters = list(self.objective.parameters())
        start, ends = [each.detach().clone() for each in parameters], []
        for _ in range(2):
            with torch.no_grad():
                for each, value in zip(parameters, start, strict=True):
                    each.copy_(value)
            self.optimizers, self.state = build_optimizers(self.objective.model, self.recipe.optim), TrainState()
            self.turn(steps)
            ends.append([each.detach().clone() for each in parameters])
        return all(map(torch.equal, *ends))

    def profile(self, out: Path, steps: int = 3) -> str:
        """Where the time of some steps goes; the trace and this summary stay in out/profile."""
        from smolforge.runs.profiler import FOLDER, SUMMARY, Profiler

        with attending(self.job.attention), Profiler(out, steps) as profile:
            self.take(steps + 1, profile.step)
        return (out / FOLDER / SUMMARY).read_text("utf-8")


class Peer:
    """Transformers or litgpt, in the loop that their users write."""

    def __init__(self, **given: Any) -> None:
        self.job = Job(**given)
        prepare(self.job)
        model, self.loss = {"transformers": transformers, "litgpt": litgpt}[self.job.peer](self.job)
        self.model = model.to(self.job.device).train()
        self.forward = torch.compile(self.model, dynamic=False) if self.job.compiled == "whole" else self.model
        vocabulary = self.model.get_parameter("lm_head.weight").shape[0]
        self.batch = batch(self.job, vocabulary)
        self.adamw = adamw(self.model, self.job.learning_rate)

    def turn(self, steps: int, warm: int = 0) -> dict[str, Any]:
        return turn(self.job, self.take, steps, warm)

    def take(self, count: int) -> Taken:
        begun, losses = now(self.job), []
        for _ in range(count):
            ids, labels = (moved(side, self.job) for side in self.batch)
            with autocast(self.job):
                loss = self.loss(self.forward, ids, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        taken = now(self.job) - begun
        return taken, [loss.item() for loss in losses]


def transformers(job: Job) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Its Llama, and its loss; without the cache that it would fill in training too."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(job.folder))
    missing, unknown = model.load_state_dict(load_file(job.folder / "model.safetensors"), strict=False)
    assert not unknown
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()

    def loss(forward: Any, ids: Tensor, labels: Tensor) -> Tensor:
        return forward(input_ids=ids, labels=ids, shift_labels=labels, use_cache=False).loss

    return model, loss


def litgpt(job: Job) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Its GPT, weights renamed by its own converter, and the loss of its pretraining."""
    import json

    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from litgpt_shape import shape_of
    from safetensors.torch import load_file

    ours = json.loads((job.folder / "config.json").read_text("utf-8"))
    config = shape_of(job.folder, job.length)
    model, renamed = GPT(config), dict[str, Tensor]()
    copy_weights_hf_llama(config, {}, renamed, load_file(job.folder / "model.safetensors"))
    model.load_state_dict(renamed)
    if ours["tie_word_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    return model, lambda forward, ids, labels: chunked_cross_entropy(forward(ids), labels)


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """As `smolforge.training.optim` has it: matrices decay, vectors do not."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.01},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def recipe(job: Job, shape: Any) -> Any:
    """What ours trains by: the same at a constant rate."""
    from smolforge.config import Guard, Optim, Recipe, Schedule, Train

    return Recipe(
        model=shape,
        optim=Optim(learning_rate=job.learning_rate, schedule=Schedule(decay=None, steps=1)),
        train=Train(sequence_length=job.length, batch_tokens=job.rows * job.length, dtype=job.dtype, device=job.device),
        guard=Guard(spike=None),
    )
