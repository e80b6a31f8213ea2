"""How a model learns: the optimizer and its schedule, low-rank updates, preferences."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from smolforge.config.base import Settings
from smolforge.config.model import CustomClass

Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Lora(Settings):
    """Low-rank updates that learn in place of the weights they are added to."""

    rank: PositiveInt | None = None
    """Rank of the updates; none trains the weights themselves. Needs init_from."""
    alpha: PositiveFloat = 16.0
    """What is added is alpha / rank times the updates."""
    targets: Annotated[tuple[Text, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Names of the linear layers that get one; starcoder2's feed-forward has c_fc and c_proj."""


class Dpo(Settings):
    """Direct preference optimisation, of pairs."""

    beta: PositiveFloat = 0.1
    """Price of moving away from the model to start from: a reward is beta times what a log-probability gained by."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of a prompt and an answer together; by default half a row, which is the most."""
    max_prompt_length: PositiveInt | None = None
    """Tokens at the end of a prompt that are kept where the two are longer; by default half of max_length."""

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        """Of both together, and of a prompt that was cut, in rows of so many tokens."""
        max_length = self.max_length or sequence_length // 2
        return max_length, self.max_prompt_length or max_length // 2


class Schedule(Settings):
    """Learning rate over optimizer steps: a linear warm-up, a plateau, a decay."""

    warmup_steps: NonNegativeInt | Share = 0
    """Steps of linear rise to the peak; below 1, a share of the horizon."""
    decay: Literal["linear", "1-sqrt", "cosine"] | None = "linear"
    """Shape of the fall; none stays at the peak."""
    decay_steps: PositiveInt | Share | None = None
    """Length of the fall at the end; below 1, a share of the horizon; by default everything after the warm-up."""
    final_learning_rate: NonNegativeFloat = 0.0
    """Where the fall ends, and what further steps use."""
    steps: PositiveInt | None = None
    """The horizon the fall ends at; by default train.steps of the first start."""

    def resolved(self, steps: int) -> "Schedule":
        """The same with a horizon of its own or else this one, and shares turned into steps."""
        horizon = self.steps or steps
        warmup, decay = self.warmup_steps, self.decay_steps
        changes = {
            "steps": horizon,
            "warmup_steps": int(warmup * horizon) if isinstance(warmup, float) else warmup,
            "decay_steps": max(1, int(decay * horizon)) if isinstance(decay, float) else decay,
        }
        return self.model_copy(update=changes)

    @property
    def decay_begins(self) -> int | None:
        """The step after which the rate falls, if it does, where lengths are said in steps."""
        if self.decay is None or self.steps is None:
            return None
        return self.steps - self.decay_steps if isinstance(self.decay_steps, int) else int(self.warmup_steps)


class Optim(Settings):
    """The optimizer and its learning rates."""

    name: Literal["adamw", "muon"] | CustomClass = "adamw"
    """adamw is the published recipes'; muon orthogonalises the layers' matrices, AdamW has the rest; or a class of your
    own, as mylab:Lion."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate."""
    matrix_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon's matrices; it follows the same schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of Muon's average."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of the matrices, times the learning rate."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients of a larger global norm are scaled down to it; none does not clip."""
    ema_decay: Share | None = None
    """Decay rate of an average of the weights, which then is what is measured, sampled and loaded; none has none."""
    schedule: Schedule = Schedule()
    """Learning rate over steps."""
