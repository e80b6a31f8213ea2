"""Every setting of every stage, as one frozen tree.

A recipe file, dotted flags and Python arguments all become a `Recipe`. Each field is defined once: its name is its key
and its flag, the text below it is its help. Only fields marked FREE may change when a run is resumed.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from smolforge.config.base import FREE, Settings
from smolforge.config.data import Data, Source, Stage
from smolforge.config.model import ModelConfig
from smolforge.config.optim import Dpo, Lora, Optim, Schedule, Share, Text

__all__ = [
    "Data",
    "Dpo",
    "Generation",
    "Guard",
    "Lora",
    "ModelConfig",
    "Optim",
    "Recipe",
    "Report",
    "Schedule",
    "Seed",
    "Share",
    "Source",
    "Stage",
    "Text",
    "Train",
]

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Train(Settings):
    """The loop."""

    steps: Annotated[PositiveInt, FREE] = 1000
    """Optimizer steps after which to stop."""
    epochs: PositiveFloat | None = None
    """How often to go through the text: decides train.steps at the first start, and is the most that a budget does."""
    sequence_length: PositiveInt = 2048
    """Tokens in one row."""
    batch_tokens: PositiveInt = 1_048_576
    """Tokens per optimizer step, over all ranks."""
    micro_batch_size: Annotated[PositiveInt | Literal["auto"] | None, FREE] = None
    """Rows in one forward pass: by default all, auto as many as fit. The rest is accumulated. Fixed for experts."""
    activation_checkpointing: Annotated[Literal["auto", "selective", "full"] | None, FREE] = "auto"
    """Compute again in backward instead of keeping: selective all but products and attention, full whole layers; auto
    is selective where a processor's program is compiled, which is then no slower, and else none."""
    dtype: Literal["auto", "float32", "tfloat32", "bfloat16", "float64"] = "auto"
    """Arithmetic over weights kept in fp32 (float64 for proofs); auto is bfloat16 where it is faster."""
    compile: Annotated[bool | Literal["auto"], FREE] = "auto"
    """Whether torch.compile makes one program of the model; auto does where the run is long enough to gain by it."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log of the softmax's normaliser in what is minimised; PaLM used 1e-4, 0 is off."""
    device: Annotated[str, FREE] = "auto"
    """cpu, cuda or mps; auto is cuda where that is present, else cpu: mps must be asked for."""
    rank_timeout_seconds: Annotated[PositiveInt, FREE] = 600
    """How long a rank waits for another within a step before it takes it for hung, and ends."""
    checkpoint_every: Annotated[PositiveInt | None, FREE] = 1000
    """Steps between checkpoints; one is always written at the end."""
    checkpoint_in_background: Annotated[bool, FREE] = True
    """Copy the state and write it while training goes on; false needs no memory for the copy, and waits."""
    keep_last: Annotated[PositiveInt, FREE] = 2
    """Newest checkpoints to keep; the last two sound ones always stay."""
    keep_best: Annotated[bool, FREE] = True
    """Also keep the checkpoint of the lowest validation loss."""
    mirror: Annotated[Text | None, FREE] = None
    """A folder that gets a copy of the run, such as one on a mounted drive; a run that is gone here resumes from it."""
    evaluate_every: Annotated[PositiveInt | None, FREE] = 500
    """Steps between measurements on the held-out text."""
    evaluate_tokens: Annotated[PositiveInt | None, FREE] = 65_536
    """Held-out tokens used by each measurement while training; none uses all."""
    evaluate_tasks: Annotated[tuple[Text, ...] | None, FREE] = None
    """Tasks by name and .jsonl files of items, scored whenever the held-out text is measured."""
    evaluate_task_items: Annotated[PositiveInt | None, FREE] = 200
    """First items of each task used by each measurement while training; none uses all."""
    sample_every: Annotated[PositiveInt | None, FREE] = 500
    """Steps between text samples."""
    sample_prompts: Annotated[tuple[str, ...], FREE] = ("",)
    """One sample is drawn for each; empty starts a new document."""

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.sequence_length

    @property
    def sequences_per_micro_batch(self) -> int:
        """Sequences per forward pass; all of a step's where that is not decided yet."""
        size = self.micro_batch_size
        return min(size, self.sequences_per_step) if isinstance(size, int) else self.sequences_per_step

    @property
    def recompute_mode(self) -> Literal["selective", "full"] | None:
        """What layers compute again, if decided."""
        return None if self.activation_checkpointing == "auto" else self.activation_checkpointing

    @model_validator(mode="after")
    def _rows_are_whole(self) -> "Train":
        if self.batch_tokens % self.sequence_length:
            suggestion = max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_length "
                f"({self.sequence_length}); {suggestion} is the nearest"
            )
        return self


class Guard(Settings):
    """What happens when numbers go wrong."""

    enabled: Annotated[bool, FREE] = True
    """Leave out updates whose loss or gradient is not finite, and rewind when that does not help."""
    skips_before_rewind: Annotated[PositiveInt, FREE] = 3
    """This many updates left out in a row rewind to the last sound checkpoint and skip the data since."""
    spike: Annotated[PositiveFloat | None, FREE] = 8.0
    """A loss so many standard deviations above the mean of the last 128 rewinds too; none ignores spikes."""
    max_rewinds: Annotated[NonNegativeInt, FREE] = 3
    """Rewinds in a whole run; where one more would be needed, it ends with a report."""


TrackerName = Literal["tensorboard", "wandb", "trackio"]
"""Modules of smolforge.tracking, each named as the package that it needs."""


class Report(Settings):
    """What is told of a run beside its own files, and to whom."""

    to: Annotated[tuple[TrackerName, ...] | None, FREE] = ("tensorboard",)
    """tensorboard writes into the run's folder, wandb and trackio are extras; none leaves metrics.jsonl alone."""
    project: Annotated[Text, FREE] = "smolforge"
    """Name of the project in W&B and Trackio; WANDB_PROJECT counts before it."""
    norms_every: Annotated[PositiveInt | None, FREE] = 100
    """Steps between norms of the weights."""
    watch: Annotated[Literal["gradients", "parameters", "all"] | None, FREE] = None
    """Norms and histograms of the gradients or weights of each tensor; WANDB_WATCH says the same."""
    watch_every: Annotated[PositiveInt, FREE] = 100
    """Steps between them."""
    log_model: Annotated[Literal["end", "checkpoint"] | None, FREE] = None
    """Give W&B the last checkpoint, or each, as an artifact; WANDB_LOG_MODEL says the same."""


class Generation(Settings):
    """How text is drawn from a model; the words are Transformers'."""

    max_new_tokens: Annotated[PositiveInt, FREE] = 128
    """Longest answer, in tokens."""
    temperature: Annotated[NonNegativeFloat, FREE] = 0.8
    """0 takes the likeliest token; 1 samples as the model believes."""
    top_k: Annotated[PositiveInt | None, FREE] = None
    """Sample among this many likeliest tokens."""
    top_p: Annotated[Annotated[float, Field(gt=0, le=1)] | None, FREE] = 0.95
    """Sample among the likeliest tokens that together hold this much probability."""
    min_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, FREE] = None
    """Sample among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: Annotated[Annotated[float, Field(ge=0.01, le=100)], FREE] = 1.0
    """Above 1, tokens already seen become less likely."""
    stop: Annotated[tuple[Text, ...], FREE] = ()
    """Strings that end the text and are no part of it."""
    seed: Annotated[Seed | None, FREE] = None
    """Makes a draw repeatable; none draws anew each time."""


class Recipe(Settings):
    """Everything that defines a run."""

    seed: Seed = 0
    """Fixes the initial weights, the order of the data and every sample."""
    tokenizer: Text | None = None
    """A folder, a tokenizer.json or a Hub id; none trains one of model.vocab_size on the corpus."""
    special_tokens: tuple[Text, ...] = ()
    """Special tokens to add to a tokenizer that was named; a model to start from grows to hold them."""
    init_from: Annotated[Text | None, FREE] = None
    """Start from the weights of this MODEL, with a fresh optimizer and schedule."""
    init_moments: Annotated[bool, FREE] = False
    """Go on with the AdamW moments of init_from, a checkpoint of ours or of nanotron; false starts with fresh ones."""
    budget: Annotated[str | None, FREE] = None
    """5m, 1h or 10M-tokens: derive steps, batch, warm-up and decay for this machine at the first start."""
    model: ModelConfig = ModelConfig()
    """The shape; in a recipe `preset` names one, and other keys change it."""
    data: Data = Data()
    """The text."""
    optim: Optim = Optim()
    """The optimizer and its schedule."""
    train: Train = Train()
    """The loop."""
    lora: Lora = Lora()
    """Low-rank updates in place of the weights."""
    dpo: Dpo = Dpo()
    """What is learned from pairs."""
    guard: Guard = Guard()
    """What happens when numbers go wrong."""
    report: Report = Report()
    """Who hears of the run."""
    sample: Generation = Generation()
    """How text samples are drawn while training; without a seed of its own, from the run's."""

    @property
    def custom_classes(self) -> list[str]:
        """Names of the custom classes that it uses."""
        optimizer = [self.optim.name] if ":" in self.optim.name else []
        return [*self.model.custom_classes.values(), *optimizer]

    @property
    def needs_base_model(self) -> bool:
        """Whether the run needs the model of init_from throughout: for LoRA, or as the reference model of DPO."""
        return self.lora.rank is not None or self.data.format == "pairs"

    @model_validator(mode="after")
    def _stages_agree(self) -> "Recipe":
        schedule = self.optim.schedule.resolved(self.train.steps)
        length, name = self.train.sequence_length, "train.sequence_length"
        if self.data.format == "pairs":
            length, name = self.dpo.lengths(length)[0], "dpo.max_length"
        if length > self.model.max_position_embeddings:
            raise ValueError(
                f"{name} ({length}) is beyond model.max_position_embeddings ({self.model.max_position_embeddings})"
            )
        if schedule.warmup_steps + (schedule.decay_steps or 0) > (schedule.steps or 0):
            raise ValueError(
                f"optim.schedule.warmup_steps ({schedule.warmup_steps}) and decay_steps "
                f"({schedule.decay_steps or 0}) together are more than the {schedule.steps} steps of the schedule"
            )
        self.data.stage_ends(self.train.batch_tokens, schedule)
        if self.data.mixture is not None and self.train.epochs is not None:
            raise ValueError(
                "train.epochs is of one text, and each source of data.mixture has its own; say train.steps, for which "
                "inspect tells the epochs of each"
            )
        if self.lora.rank is not None and self.init_from is None:
            raise ValueError("lora.rank is given, but no model whose weights it would change: name one with init_from")
        if self.lora.rank is not None and self.special_tokens:
            raise ValueError("special_tokens need an embedding that learns, and under lora.rank it does not")
        if self.init_moments:
            self._check_moments_fit()
        if self.data.format == "pairs":
            self._pairs_fit()
        if schedule.final_learning_rate > self.optim.learning_rate:
            raise ValueError(
                f"optim.schedule.final_learning_rate ({schedule.final_learning_rate}) is above "
                f"optim.learning_rate ({self.optim.learning_rate})"
            )
        return self

    def _check_moments_fit(self) -> None:
        """Raise ValueError if the moments of init_from would not fit the run's parameters."""
        conflicts = {
            "init_from is none": self.init_from is None,
            f"optim.name is {self.optim.name}": self.optim.name != "adamw",
            "lora.rank is given": self.lora.rank is not None,
            "special_tokens are added": bool(self.special_tokens),
        }
        for reason, applies in conflicts.items():
            if applies:
                raise ValueError(f"init_moments goes on with the AdamW and all the weights of init_from, but {reason}")

    def _pairs_fit(self) -> None:
        """Raise ValueError if the run could not train on pairs."""
        max_length, max_prompt_length = self.dpo.lengths(self.train.sequence_length)
        if self.init_from is None:
            raise ValueError("data.format is pairs, but there is no model that is to prefer: name one with init_from")
        if 2 * max_length > self.train.sequence_length:
            raise ValueError(
                f"dpo.max_length ({max_length}) is more than half a row of train.sequence_length "
                f"({self.train.sequence_length}), in which both answers of a pair have to stand"
            )
        if max_prompt_length >= max_length:
            raise ValueError(f"dpo.max_prompt_length ({max_prompt_length}) must be below dpo.max_length ({max_length})")
        if self.train.z_loss:
            raise ValueError("train.z_loss is a part of the loss of text; it has no meaning for pairs")
