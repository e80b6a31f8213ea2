"""The request schemas of OpenAI's API, and their conversion to the engine's settings.

A field that would change the answer is implemented or refused by name; any other is accepted and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from smolforge.config import Generation
from smolforge.generation.samplers import LogitBias, PresencePenalty, Sampler, SamplerChain, make_sampler

MAX_CHOICES, MAX_PROMPTS, MAX_LOGPROBS = 8, 64, 20
MIN_TOP_P = 1e-6
"""Stands for OpenAI's 0, which means greedy: the most likely token alone."""


def check_utf8(text: str) -> str:
    """Check that a text has no half characters, as JSON's \\ud800 can make. Raises ValueError."""
    if text.encode(errors="ignore").decode() != text:
        raise ValueError("it should be text that can be written as UTF-8")
    return text


Text = Annotated[str, AfterValidator(check_utf8)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]


class StrictModel(BaseModel):
    """The base of all schemas: a number is a number, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text"]


class RequestFields(StrictModel):
    """The fields that completions and chats share."""

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
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
    def _check_stream_options(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it is only for a request with stream set to true")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("its keys should be token ids, as text")
        return value

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def stream_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampler(self, prompt_tokens: int) -> SamplerChain:
        """Return the sampler chain for a prompt of `prompt_tokens` tokens, with OpenAI's defaults (temperature 1)."""
        first: list[Sampler] = []
        if self.presence_penalty or self.frequency_penalty:
            first.append(PresencePenalty(self.presence_penalty or 0.0, self.frequency_penalty or 0.0, prompt_tokens))
        if self.logit_bias:
            first.append(LogitBias(tuple((int(token), bias) for token, bias in self.logit_bias.items())))
        options = Generation(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=max(1.0 if self.top_p is None else self.top_p, MIN_TOP_P),
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            min_p=self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )
        return make_sampler(options, *first)

    def seed_for_choice(self, choice: int) -> int | None:
        """Return the seed of a choice: the choices of one request differ, and the same request repeats them."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class TextFields(StrictModel):
    """How a text becomes token ids: whether the special tokens in it are read, and BOS is added."""

    parse_special: bool | None = None
    add_special_tokens: bool | None = None


class CompletionRequest(RequestFields, TextFields):
    """POST /v1/completions. Special tokens in a text are plain text unless parsed; token ids are taken as they are."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise ValueError("it should be n or left out; choosing among more answers is not offered")
        return value

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens may be 0 only with echo set to true")
        return self

    @property
    def prompt_list(self) -> list[str | list[int]]:
        """Return the prompts as a list."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]  # pyrefly: ignore [bad-return]
        return list(prompt)  # pyrefly: ignore [bad-return]

    @property
    def num_logprobs(self) -> int | None:
        """Return how many top log-probabilities each token gets; None asks for no log-probabilities."""
        return self.logprobs


class ContentPart(StrictModel):
    type: Literal["text"]
    text: Text


class ChatMessage(StrictModel):
    """One turn. What clients send back of an earlier answer is taken where it is empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Any = None
    reasoning_content: Any = None

    def as_template_message(self) -> dict[str, Any]:
        """Return the message as chat templates take it; `developer` is OpenAI's newer name for `system`."""
        content = self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.text} for part in content]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or "", **({"name": self.name} if self.name else {})}


class ChatCompletionRequest(RequestFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    chat_template_kwargs: "ChatTemplateKwargs | None" = None

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs set to true")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("it should be at least 1")
        return value

    @property
    def num_logprobs(self) -> int | None:
        """Return how many top log-probabilities each token gets; None asks for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatTemplateKwargs(StrictModel):
    """The variables of a chat template that a client may set."""

    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None


class TokenizeRequest(TextFields):
    """POST /tokenize, of a text or of messages."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    model: Text | None = None

    @model_validator(mode="after")
    def _check_prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages is needed")
        return self


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: Text | None = None
