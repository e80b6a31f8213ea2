"""The text of a run: plain sources, or a mixture of named sources whose weights change by stage.

[data.mixture.web]   source, weight, and how it is read if that differs from [data]
[[data.stages]]      until_step, until_tokens or until; weights by name. The last has no end
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from smolforge.config.base import FREE, Settings
from smolforge.config.optim import Schedule, Share, Text
from smolforge.errors import did_you_mean
from smolforge.formatting import format_value

MAX_PERIOD = 100_000
"""Windows after which the order of sources repeats, at most: enough for shares of up to five digits."""
HeldOut = Annotated[float, Field(ge=0, le=0.5)]
CONDITION = r"^([\w.-]+) *(>=|<=|==|!=|>|<) *([^\s<>=].*)$"
Condition = Annotated[str, Field(pattern=CONDITION, title="a condition such as int_score >= 3")]
Template = Annotated[str, Field(pattern=r"\{[\w.-]+\}", title="text with the name of a column in it, as {title}")]


class Source(Settings):
    """One text of a mixture; how it is read is as [data] says where it says nothing itself."""

    source: Text
    """What data.sources may name: a file, a directory, a glob, a prepared corpus."""
    weight: NonNegativeFloat = 1.0
    """Its share, relative to the others'; stages may give it another."""
    tokens: PositiveInt | None = None
    """Tokens it is said to have: with it inspect tells expected epochs before it is prepared."""
    text_key: Text | None = None
    """Key or column of the text; by default data.text_key."""
    text_template: Template | None = None
    """Text made of several columns; by default data.text_template."""
    text_url: Template | None = None
    """Where the text of a row is to be had; by default data.text_url."""
    encoding_key: Text | None = None
    """Column with its encoding; by default data.encoding_key."""
    split: Text | None = None
    """Which split of a data set on the Hub; by default data.split."""
    filters: tuple[Condition, ...] | None = None
    """Conditions that its rows meet; by default data.filters."""
    min_characters: NonNegativeInt | None = None
    """Shorter documents are left out; by default data.min_characters."""
    max_characters: PositiveInt | None = None
    """Longer documents are left out; by default data.max_characters."""
    deduplication: Literal["exact", "minhash"] | None = None
    """Whether near duplicates within it are left out as well; by default data.deduplication."""
    group_key: Text | None = None
    """Key that names documents which the held-out split must keep together; by default data.group_key."""
    held_out: HeldOut | None = None
    """Share of it kept back to measure on; by default data.held_out."""


READ_SETTINGS = tuple(name for name in Source.model_fields if name not in ("source", "weight", "tokens"))
"""Settings of a source that say how it is read."""


class Stage(Settings):
    """A stretch of a run with weights of its own."""

    name: Text | None = None
    """What to call it."""
    until_step: PositiveInt | Share | None = None
    """Step after which it ends; below 1, a share of the schedule's horizon."""
    until_tokens: PositiveInt | None = None
    """Tokens after which it ends, counted from the run's beginning: a multiple of train.batch_tokens."""
    until: Literal["decay"] | None = None
    """decay ends it where the learning rate begins to fall."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Shares by name, relative to each other; those not named have none. By default the sources' own."""

    @property
    def ends(self) -> list[str]:
        """The ends it names."""
        return [name for name in ("until_step", "until_tokens", "until") if self.__dict__[name] is not None]


def check_read_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError if the settings that say how a text is read contradict each other."""
    min_characters, max_characters = settings["min_characters"], settings["max_characters"]
    if settings["text_template"] is not None and settings["text_url"] is not None:
        raise ValueError(f"{prefix}text_template and text_url both say what the text is; give one of them")
    if settings["encoding_key"] is not None and settings["text_url"] is None:
        raise ValueError(f"{prefix}encoding_key is of what text_url fetches, which is not given")
    if max_characters is not None and max_characters < min_characters:
        raise ValueError(f"{prefix}max_characters ({max_characters}) is below min_characters ({min_characters})")


def check_source_names(mixture: Mapping[str, Source]) -> None:
    """Raise ValueError for no names, or names that no flag, folder or metric could have."""
    if not mixture:
        raise ValueError("mixture names no source; [data.mixture.NAME] with a source in it does")
    for name in mixture:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
            raise ValueError(
                f"mixture has a source called {format_value(name)}; a name is up to 40 small letters, digits and _, "
                "and begins with a letter"
            )


def check_stages(stages: tuple[Stage, ...] | None, mixture: Mapping[str, Source]) -> None:
    """Raise ValueError for stages with an unclear end, or with weights of unknown sources."""
    for number, stage in enumerate(stages or (), 1):
        for name in stage.weights or {}:
            if name not in mixture:
                known_names = f"data.mixture has {', '.join(mixture)}.{did_you_mean(name, mixture)}"
                raise ValueError(
                    f"{stage_label(number, stage)} weighs {format_value(name)}, which is no source; {known_names}"
                )
        is_last = number == len(stages or ())
        if is_last and stage.ends:
            raise ValueError(
                f"{stage_label(number, stage)} is the last and has {stage.ends[0]}; the last goes on to the end"
            )
        if not is_last and len(stage.ends) != 1:
            ends = " and ".join(stage.ends) or "no end"
            raise ValueError(
                f"{stage_label(number, stage)} has {ends}; give it one of until_step, until_tokens and until"
            )
    if stages == ():
        raise ValueError("stages is an empty list; none is one stage")


def check_weights(weights: Mapping[str, float], stage: str) -> None:
    """Raise ValueError for weights that sum to zero, or give an order that repeats too late."""
    if not any(weights.values()):
        raise ValueError(f"the weights of {stage} sum to zero; give at least one source a weight above 0")
    period = sum(integer_weights(weights).values())
    if period > MAX_PERIOD:
        total = f"{period:,}" if period < 10**12 else "more than 10^12"
        raise ValueError(
            f"the weights of {stage}, as whole numbers, sum to {total}, and the most is {MAX_PERIOD:,}; "
            "give them to fewer digits (they need not sum to 1)"
        )


def integer_weights(weights: Mapping[str, int | float]) -> dict[str, int]:
    """Return weights as the smallest whole numbers in the same proportion; 0.1 is exactly a tenth."""
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    denominator = lcm(*(value.denominator for value in exact.values()))
    integers = {name: int(value * denominator) for name, value in exact.items()}
    divisor = gcd(*integers.values()) or 1
    return {name: value // divisor for name, value in integers.items()}


def stage_label(number: int, stage: Stage) -> str:
    """Return the name of a stage in error messages."""
    return f"stage {number}" if stage.name is None else f"stage {number} ({stage.name:.40})"


def stage_end(stage: Stage, name: str, batch_tokens: int, *, schedule: Schedule) -> int:
    """Return the step after which a stage ends."""
    assert schedule.steps is not None
    if stage.until_tokens is not None:
        step, remainder = divmod(stage.until_tokens, batch_tokens)
        if remainder:
            near = " or ".join(f"{count * batch_tokens}" for count in (step, step + 1) if count)
            raise ValueError(
                f"data.stages: {name} ends inside a step, after {stage.until_tokens} tokens, where "
                f"train.batch_tokens is {batch_tokens}; make it {near}"
            )
        return step
    if stage.until == "decay":
        decay_start = schedule.decay_begins
        if decay_start is None:
            raise ValueError(f"data.stages: {name} ends with the decay, and optim.schedule.decay is none")
        return decay_start
    until = stage.until_step
    return int(until * schedule.steps) if isinstance(until, float) else until or 0


class Data(Settings):
    """Where the text comes from."""

    sources: tuple[Text, ...] = ("python-docs",)
    """Text, .jsonl (also .gz, .zst), .parquet or datatrove's .ds files, directories, globs, data sets on the Hub as
    org/name[@revision][:config], or one prepared corpus; python-docs is what CPython carries."""
    mixture: dict[str, Source] | None = None
    """Named sources with weights, in place of data.sources."""
    stages: tuple[Stage, ...] | None = None
    """Stretches of the run with other weights, in their order; none is one stage."""
    cache: Annotated[Text | None, FREE] = None
    """Folder where the prepared sources of a mixture are kept for all runs; none is `corpora` beside the run's."""
    warn_epochs: Annotated[PositiveInt | None, FREE] = 4
    """Warn when a source of a mixture is read more often: up to four times is about as good as new text (Muennighoff
    et al. 2023)."""
    format: Literal["text", "chat", "pairs"] = "text"
    """chat reads conversations, messages or a prompt and a completion in a .jsonl line, and learns the assistant's;
    pairs reads a prompt with a chosen and a rejected answer, and learns to prefer the one (DPO)."""
    text_key: Text = "text"
    """Key of the text in a .jsonl line, or the column it stands in; texts in a list there are joined by line breaks."""
    text_template: Template | None = None
    """Text made of several columns, as "{title}\\n\\n{text}", in place of text_key."""
    text_url: Template | None = None
    """Where the text of a row is to be had, gzipped or plain, with columns in braces; python-edu's and stack-edu's is
    at https://softwareheritage.s3.amazonaws.com/content/{blob_id}."""
    encoding_key: Text | None = None
    """Column with the encoding of what text_url names; by default it is UTF-8, and bytes that are none are left out."""
    split: Text = "train"
    """Which split of a data set on the Hub."""
    filters: tuple[Condition, ...] = ()
    """Only rows that meet all of these: COLUMN >= VALUE, or >, <, <=, ==, !=. metadata.score is inside a column."""
    min_characters: NonNegativeInt = 0
    """Shorter documents are left out."""
    max_characters: PositiveInt | None = None
    """Longer documents are left out."""
    deduplication: Literal["exact", "minhash"] = "exact"
    """exact leaves out documents that were there before; minhash those as well that share about three quarters of
    their runs of five words with one before (FineWeb's MinHash, 14 bands of 8)."""
    group_key: Text | None = None
    """Key or column that names documents which the held-out split must keep together."""
    held_out: HeldOut = 0.05
    """Share of the text kept back to measure on."""
    intra_document_masking: bool = False
    """Attention stays inside each document of a row and positions restart there, as Llama 3 and SmolLM3 trained."""
    num_workers: Annotated[NonNegativeInt, FREE] = 1
    """Batches read ahead, each by a thread of its own; 0 reads in the training thread."""

    @model_validator(mode="after")
    def _check_read_settings(self) -> "Data":
        check_read_settings(self.__dict__)
        return self

    @model_validator(mode="after")
    def _has_near_duplicates(self) -> "Data":
        if self.deduplication == "minhash" and self.format == "pairs":
            raise ValueError(
                "deduplication minhash is of texts and conversations: pairs of one long prompt are nearly the same, "
                "and each has something else to prefer; leave it at exact"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _mixtures_have_no_others(cls, values: Any) -> Any:
        has_mixture = isinstance(values, dict) and values.get("mixture") is not None
        return {"sources": (), **values} if has_mixture else values

    @model_validator(mode="after")
    def _is_one_text(self) -> "Data":
        if self.mixture is None:
            if not self.sources:
                raise ValueError("sources is an empty list; name a text, or named ones in data.mixture")
            if self.stages is not None:
                raise ValueError("stages change the weights of data.mixture, and there is none")
            return self
        if self.sources:
            raise ValueError("sources and mixture both say where the text comes from; keep one of them")
        if self.format != "text":
            raise ValueError(f"a mixture is of text, and format is {self.format}; name one source with data.sources")
        check_source_names(self.mixture)
        for name in self.mixture:
            check_read_settings(self.read_settings(name), f"mixture.{name}: ")
        check_stages(self.stages, self.mixture)
        for stage, weights in zip(self.stage_names, self.weights, strict=True):
            check_weights(weights, stage)
        return self

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages in error messages; a mixture without stages is one."""
        return ["the mixture"] if self.stages is None else [stage_label(*pair) for pair in enumerate(self.stages, 1)]

    @property
    def weights(self) -> list[dict[str, float]]:
        """Weights of the sources by stage, without sources whose weight is always 0."""
        default = {name: source.weight for name, source in (self.mixture or {}).items()}
        by_stage = [None] if self.stages is None else [stage.weights for stage in self.stages]
        resolved = [default if weights is None else weights for weights in by_stage]
        used = [name for name in default if any(weights.get(name) for weights in resolved)]
        return [{name: weights.get(name, 0.0) for name in used} for weights in resolved]

    def read_settings(self, name: str) -> dict[str, Any]:
        """Return how one source of the mixture is read: its own settings over the shared ones."""
        assert self.mixture is not None
        return self.model_dump() | self.mixture[name].model_dump(include=set(READ_SETTINGS), exclude_none=True)

    def single_source(self, name: str) -> "Data":
        """Return the settings that prepare one source of the mixture by itself."""
        assert self.mixture is not None
        text = {"sources": (self.mixture[name].source,), "mixture": None, "stages": None}
        return Data.model_validate(self.read_settings(name) | text)

    def stage_ends(self, batch_tokens: int, schedule: Schedule) -> list[int]:
        """Return the step after which each stage but the last ends, under a schedule with lengths in steps.

        Raises ValueError for a stage that would end before it starts, or inside a step.
        """
        steps = [0]
        for number, stage in enumerate((self.stages or ())[:-1], 1):
            end = stage_end(stage, stage_label(number, stage), batch_tokens, schedule=schedule)
            if isinstance(stage.until_step, float):
                end += end == steps[-1]  # of a run too short for its shares
            if end <= steps[-1]:
                message = f"begins after step {steps[-1]:,} and ends after step {end:,}"
                raise ValueError(f"data.stages: {stage_label(number, stage)} {message}; stages stand in their order")
            steps.append(end)
        return steps[1:]

    def with_stage_ends(self, ends: list[int]) -> "Data":
        """Return the same settings with the ends of the stages in steps."""
        if self.stages is None:
            return self
        updates = [{"until_step": end, "until_tokens": None, "until": None} for end in ends]
        stages = [stage.model_copy(update=end) for stage, end in zip(self.stages, [*updates, {}], strict=True)]
        return self.model_copy(update={"stages": tuple(stages)})
