"""One training step, ours and our peers': the same weights, batch, loss and optimizer, each in its own best loop.

    job -> a contestant -> turn(steps): seconds, losses, peak memory

Weights come from a Hugging Face model folder, so that each reads them in its own way. A step is forward, backward,
clipping and AdamW over one micro-batch; ours is the loop of `smolforge train` itself, guard included. Under bfloat16
all keep fp32 weights and autocast. Nobody reads a loss before its turn is over.

Imports stand inside functions: a contestant of another environment has only torch, safetensors and its own package.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SEPARATOR = 35
"""Ends a document where documents are kept apart; drawn so often that one has about 400 tokens."""
Taken = tuple[float, list[float]]


@dataclass(frozen=True)
class Job:
    """What a contestant is to do."""

    folder: Path
    rows: int
    length: int
    peer: str = "smolforge"
    device: str = "cpu"
    dtype: str = "float32"
    compiled: str = "no"
    """no, whole, layers (each by itself) or autotuned (whole, products chosen by trying)."""
    attention: str = "default"
    """A backend of scaled_dot_product_attention, or documents, which are kept apart by FlexAttention."""
    deterministic: bool = False
    learning_rate: float = 3e-3


class Smolforge:
    """Ours."""

    def __init__(self, **given: Any) -> None:
        from smolforge import guard
        from smolforge.checkpoint import weights
        from smolforge.data.batches import Batch
        from smolforge.objective import Objective
        from smolforge.optim import optimizers
        from smolforge.training import State

        self.job = Job(**given)
        prepare(self.job)
        model = weights.load(self.job.folder).to(self.job.device)
        if self.job.compiled == "layers":
            for layer in model.model.layers:
                layer.self_attn.layer = 0  # whole rows ask no layer's number, and one number makes one graph
                layer.compile(dynamic=False)
        whole, separator = self.job.compiled in ("whole", "autotuned"), None
        if self.job.attention == "documents":
            separator = SEPARATOR
        self.objective = Objective(model, self.job.dtype, separator, compiled=whole)
        self.batch = Batch(*batch(self.job, model.config.vocab_size))
        self.recipe = recipe(self.job, model.config)
        self.judge = guard.Judge(self.recipe.guard, guard.decided([]), 0, [], lambda incident: None)
        self.optimizers, self.state = optimizers(model, self.recipe.optim), State()

    def turn(self, steps: int, warm: int = 0) -> dict[str, Any]:
        return turn(self.job, self.take, steps, warm)

    def take(self, count: int, after: Callable[..., None] | None = None) -> Taken:
        """So many steps of the loop, timed from the moment it asks for the first batch. `after` is called each step."""
        from smolforge.settings import replaced
        from smolforge.training import Action, train

        begun: list[float] = []
        heard: list[float] = []

        def batches() -> Iterator[Any]:
            begun.append(now(self.job))
            while True:
                yield self.batch

        actions = [Action(1, lambda _, metrics: heard.append(metrics["loss"]), late=True)]
        actions += [Action(1, after, late=True)] if after else []
        recipe = replaced(self.recipe, {"train.steps": self.state.step + count})
        self.state = train(
            *(self.objective, self.optimizers, batches(), recipe, self.state, actions),
            stopping=lambda: False,
            meter=self.meter(),
            judge=self.judge,
        )
        return now(self.job) - begun[0], heard

    def meter(self) -> Any:
        from smolforge.meter import Meter, Work, clock

        return Meter(Work(self.batch.ids.numel(), 1, 1, 1.0), 1, clock(torch.device(self.job.device)))

    def waits(self) -> str | None:
        """Launch one step where waiting for the device is an error; what it waited for, if it did."""
        from smolforge.training import launch

        with attending(self.job.attention), waiting_is_an_error(self.job.device):
            try:
                launch(self.objective, self.optimizers, iter([self.batch]), self.recipe, 0, self.meter(), self.judge)
            except RuntimeError as error:
                return str(error)
        return None

    def repeats(self, steps: int = 3) -> bool:
        """Whether the same steps from the same weights end at the same weights, to the bit."""
        from smolforge.optim import optimizers
        from smolforge.training import State

        parameters = list(self.objective.parameters())
        start, ends = [each.detach().clone() for each in parameters], []
        for _ in range(2):
            with torch.no_grad():
                for each, value in zip(parameters, start, strict=True):
                    each.copy_(value)
            self.optimizers, self.state = optimizers(self.objective.model, self.recipe.optim), State()
            self.turn(steps)
            ends.append([each.detach().clone() for each in parameters])
        return all(map(torch.equal, *ends))

    def profile(self, out: Path, steps: int = 3) -> str:
        """Where the time of some steps goes; the trace and this summary stay in out/profile."""
        from smolforge.recipe.profile import FOLDER, SUMMARY, Profile

        with attending(self.job.attention), Profile(out, steps) as profile:
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

    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    ours = json.loads((job.folder / "config.json").read_text("utf-8"))
    config = Config(
        block_size=job.length,
        vocab_size=ours["vocab_size"],
        padded_vocab_size=ours["vocab_size"],
        n_layer=ours["num_hidden_layers"],
        n_head=ours["num_attention_heads"],
        n_query_groups=ours["num_key_value_heads"],
        n_embd=ours["hidden_size"],
        head_size=ours["head_dim"],
        intermediate_size=ours["intermediate_size"],
        rope_base=int(ours["rope_parameters"]["rope_theta"]),
        norm_eps=ours["rms_norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model, renamed = GPT(config), dict[str, Tensor]()
    copy_weights_hf_llama(config, {}, renamed, load_file(job.folder / "model.safetensors"))
    model.load_state_dict(renamed)
    if ours["tie_word_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    return model, lambda forward, ids, labels: chunked_cross_entropy(forward(ids), labels)


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """As `smolforge.optim` has it: matrices decay, vectors do not."""
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


def batch(job: Job, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (rows, length), the same each time; few ids are frequent and most are rare, as in text."""
    chance = 1 / torch.arange(10, 10 + vocabulary, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.multinomial(chance, job.rows * (job.length + 1), replacement=True, generator=drawn)
    ids = ids.view(job.rows, job.length + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def turn(job: Job, take: Callable[[int], Taken], steps: int, warm: int) -> dict[str, Any]:
    """`warm` steps, then `steps` that are timed; afterwards the device's memory is free for others."""
    with attending(job.attention):
        warm_seconds, losses = take(warm) if warm else (0.0, [])
        seconds, more = take(steps) if steps else (0.0, [])
    peak = peak_bytes(job)
    if job.device == "cuda":
        torch.cuda.empty_cache()
    return {
        "seconds": seconds,
        "warm_seconds": warm_seconds,
        "losses": losses + more,
        "peak_bytes": peak,
        "graphs": graphs(),
    }


def prepare(job: Job) -> None:
    """What is set for a whole process."""
    if job.device == "cuda":
        torch.set_float32_matmul_precision("high")
    if job.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if job.compiled == "autotuned":
        from torch._inductor import config

        config.max_autotune = True


def attending(name: str) -> AbstractContextManager:
    """Only this backend of scaled_dot_product_attention, which raises where it cannot be used."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return sdpa_kernel(backends[name]) if name in backends else nullcontext()


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """Inside, whatever makes the processor wait for the GPU raises RuntimeError."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def autocast(job: Job) -> AbstractContextManager:
    return torch.autocast(job.device, torch.bfloat16) if job.dtype == "bfloat16" else nullcontext()


def moved(tensor: Tensor, job: Job) -> Tensor:
    return tensor.pin_memory().to(job.device, non_blocking=True) if job.device == "cuda" else tensor


def now(job: Job) -> float:
    """The clock once the device has done all it was asked."""
    if job.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(job: Job) -> int:
    """Most memory that tensors took on a GPU; elsewhere, that this process took."""
    if job.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # a child's getrusage begins with its parent's peak
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def graphs() -> int:
    """Graphs that torch.compile made in this process: none where it gave up, and ever more where shapes change."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def prepared(preset: str, folder: Path) -> Path:
    """A model folder of the shape with fresh weights."""
    from smolforge import presets
    from smolforge.checkpoint import weights
    from smolforge.config import ModelConfig
    from smolforge.model import build

    weights.save(build(ModelConfig.model_validate(presets.shape(preset))), folder)
    return folder
