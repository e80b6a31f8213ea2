"""The text of a run, and how it is read: plain sources, or named ones in a mixture whose weights change by stage."""

from typing import Annotated, Any, Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from smolforge.config.learning import Schedule, Text
from smolforge.config.mixture import (
    READING,
    Condition,
    HeldOut,
    Source,
    Stage,
    Template,
    called,
    check_names,
    check_reading,
    check_stages,
    check_weights,
    end_of,
)
from smolforge.settings import FREE, Settings


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
    def _is_said_once(self) -> "Data":
        check_reading(self.__dict__)
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
    def _mixtures_have_no_others(cls, said: Any) -> Any:
        named = isinstance(said, dict) and said.get("mixture") is not None
        return {"sources": (), **said} if named else said

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
        check_names(self.mixture)
        for name in self.mixture:
            check_reading(self.reading(name), f"mixture.{name}: ")
        check_stages(self.stages, self.mixture)
        for stage, weights in zip(self.stage_names, self.weights, strict=True):
            check_weights(weights, stage)
        return self

    @property
    def stage_names(self) -> list[str]:
        """What to call each stage; of a mixture without any, the one it is."""
        return ["the mixture"] if self.stages is None else [called(*each) for each in enumerate(self.stages, 1)]

    @property
    def weights(self) -> list[dict[str, float]]:
        """Of each stage, what every source weighs; those that never weigh anything are left out."""
        own = {name: source.weight for name, source in (self.mixture or {}).items()}
        given = [None] if self.stages is None else [stage.weights for stage in self.stages]
        found = [own if each is None else each for each in given]
        used = [name for name in own if any(each.get(name) for each in found)]
        return [{name: each.get(name, 0.0) for name in used} for each in found]

    def reading(self, name: str) -> dict[str, Any]:
        """How one source of the mixture is read: what it says itself, over what all share."""
        assert self.mixture is not None
        return self.model_dump() | self.mixture[name].model_dump(include=set(READING), exclude_none=True)

    def alone(self, name: str) -> "Data":
        """One source of the mixture, to be prepared."""
        assert self.mixture is not None
        text = {"sources": (self.mixture[name].source,), "mixture": None, "stages": None}
        return Data.model_validate(self.reading(name) | text)

    def ends(self, batch_tokens: int, schedule: Schedule) -> list[int]:
        """The step after which each stage but the last ends, under a schedule whose lengths are said in steps.

        Raises ValueError for a stage that would end before it starts, or inside a step.
        """
        found = [0]
        for number, stage in enumerate((self.stages or ())[:-1], 1):
            end = end_of(stage, called(number, stage), batch_tokens, schedule)
            if isinstance(stage.until_step, float):
                end += end == found[-1]  # of a run too short for its shares
            if end <= found[-1]:
                said = f"begins after step {found[-1]:,} and ends after step {end:,}"
                raise ValueError(f"data.stages: {called(number, stage)} {said}; stages stand in their order")
            found.append(end)
        return found[1:]

    def settled(self, ends: list[int]) -> "Data":
        """The same with the ends of its stages said in steps."""
        if self.stages is None:
            return self
        said = [{"until_step": end, "until_tokens": None, "until": None} for end in ends]
        stages = [stage.model_copy(update=end) for stage, end in zip(self.stages, [*said, {}], strict=True)]
        return self.model_copy(update={"stages": tuple(stages)})
