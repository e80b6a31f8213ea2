"""What may be asked for, in OpenAI's words, and what it is in the engine's.

A field that would change the answer works or is refused by its name; one that would not is taken and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from smolforge.config import Generation
from smolforge.generation.samplers import LogitBias, PresencePenalty, Sampler, Sampling, sampling

MOST_CHOICES, MOST_PROMPTS, MOST_LOGPROBS = 8, 64, 20
LEAST_TOP_P = 1e-6
"""OpenAI's 0 means the likeliest token alone, as this does."""


def whole(text: str) -> str:
    """Text that is text: no half characters, as JSON's \\ud800 can make."""
    if text.encode(errors="ignore").decode() != text:
        raise ValueError("it should be text that can be written as UTF-8")
    return text


Text = Annotated[str, AfterValidator(whole)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]


class Fields(BaseModel):
    """What is common to all: a number is a number, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text"]


class Asked(Fields):
    """What completions and chats share."""

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    # What changes nothing here is taken, so that nobody's client fails.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("stream_options")
    @classmethod
    def _needs_a_stream(cls, given: StreamOptions | None, others: Any) -> StreamOptions | None:
        if given is not None and not others.data.get("stream"):
            raise ValueError("it is only for a request with stream set to true")
        return given

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for key in given or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("its keys should be token ids, as text")
        return given

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, prompt_tokens: int) -> Sampling:
        """The chain of samplers for a prompt of so many tokens; OpenAI's defaults, which draw as the model believes."""
        first: list[Sampler] = []
        if self.presence_penalty or self.frequency_penalty:
            first.append(PresencePenalty(self.presence_penalty or 0.0, self.frequency_penalty or 0.0, prompt_tokens))
        if self.logit_bias:
            first.append(LogitBias(tuple((int(token), bias) for token, bias in self.logit_bias.items())))
        options = Generation(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=max(1.0 if self.top_p is None else self.top_p, LEAST_TOP_P),
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            min_p=self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )
        return sampling(options, *first)

    def seed_of(self, choice: int) -> int | None:
        """Choices of one request draw differently, and the same again."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class Completion(Asked):
    """POST /v1/completions. A prompt's special tokens are read as plain text; token ids are taken as they are."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    add_special_tokens: bool | None = None

    @field_validator("best_of")
    @classmethod
    def _all_are_returned(cls, given: int | None, others: Any) -> int | None:
        if given is not None and given != (others.data.get("n") or 1):
            raise ValueError("it should be n or left out; choosing among more answers is not offered")
        return given

    @model_validator(mode="after")
    def _as_we_can(self) -> "Completion":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens may be 0 only with echo set to true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]  # pyrefly: ignore [bad-return]
        return list(given)  # pyrefly: ignore [bad-return]

    @property
    def scored(self) -> int | None:
        """How many likeliest tokens are told with each; none asks for no scores."""
        return self.logprobs


class Part(Fields):
    type: Literal["text"]
    text: Text


class Message(Fields):
    """One turn. What clients send back of an earlier answer is taken where it is empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Any = None
    reasoning_content: Any = None

    def plain(self) -> dict[str, Any]:
        """As templates are given it; `developer` is OpenAI's newer word for `system`."""
        content = self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.text} for part in content]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or "", **({"name": self.name} if self.name else {})}


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    chat_template_kwargs: "TemplateWords | None" = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, given: int | None, others: Any) -> int | None:
        if given is not None and not others.data.get("logprobs"):
            raise ValueError("it needs logprobs set to true")
        return given

    @field_validator("max_tokens")
    @classmethod
    def _says_something(cls, given: int | None) -> int | None:
        if given == 0:
            raise ValueError("it should be at least 1")
        return given

    @property
    def scored(self) -> int | None:
        """How many likeliest tokens are told with each; none asks for no scores."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TemplateWords(Fields):
    """The variables of a chat template that a client may set."""

    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None


class Tokenize(Fields):
    """POST /tokenize, of a text or of messages."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    model: Text | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages is needed")
        return self


class Detokenize(Fields):
    """POST /detokenize."""

    tokens: list[Id]
    model: Text | None = None
