"""The requests that clients may send: every field, its type and its bounds. Parsed by admission, read by
completions and chat. Knows no engine state: bounds that depend on the model are checked in choices.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from uld_serve.errors import InvalidRequest
from uld_serve.server.response_format import ResponseFormat
from uld_serve.server.validation import Neutral, Strict

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_CHARS = 4, 64
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_MESSAGES = 256
MAX_PROFILES = 16

Prompt = str | list[str] | list[int] | list[list[int]]


def _prompt(value: JsonValue) -> Prompt:
    """pydantic would report a union's every branch; one sentence says it better."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value  # type: ignore[return-value]
        if _is_ids(value) or all(isinstance(item, list) and item and _is_ids(item) for item in value):
            return value  # type: ignore[return-value]
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")


def _is_ids(value: list[JsonValue]) -> bool:
    return all(type(item) is int for item in value)


def _stop(value: JsonValue) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(
        0 < len(stop) <= MAX_STOP_CHARS for stop in stops if isinstance(stop, str)
    ):
        raise ValueError(f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
    return stops  # type: ignore[return-value]


def _logit_bias(value: JsonValue) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must be an object of at most {MAX_LOGIT_BIAS} token ids")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # Only the canonical form: "7" and "07" would be one token given twice.
        if not (key.isascii() and key.isdecimal() and str(int(key)) == key and len(key) < 10):
            raise ValueError("keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise ValueError("values must be numbers between -100 and 100")
        biases[int(key)] = float(bias)
    return biases


def _profiles(value: JsonValue) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and 0 < len(value) <= MAX_PROFILES
        and all(isinstance(item, str) for item in value)
    ):
        return value  # type: ignore[return-value]
    raise ValueError(f"must be a profile's name, a list of 1 to {MAX_PROFILES} names, or null for none")


class ModelRequest(Strict):
    model: Annotated[
        str, Field(max_length=2048, description="`base`, or `base:profile` to forget, or `base:a+b`.")
    ]


class ForgetRequest(ModelRequest):
    forget_profile: Annotated[
        str | list[str] | None,
        BeforeValidator(_profiles),
        Field(
            description='What to forget: a name, several, or null / "none" for the base where the key may use it.'
        ),
    ] = None
    forget_strength: Annotated[
        float | None, Field(ge=0, le=2, description="Scales every chosen profile.")
    ] = None

    @property
    def names_profile(self) -> bool:
        """Whether forget_profile was given at all: null means the base, absence means the key's default."""
        return "forget_profile" in self.model_fields_set


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(ForgetRequest):
    """What completions and chat share. A null where OpenAI allows one means the default."""

    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float | None, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31, description="0 or -1: off.")] = 0
    min_p: Annotated[float | None, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: Annotated[list[str], BeforeValidator(_stop, json_schema_input_type=str | list[str] | None)] = Field(
        default_factory=list
    )
    stop_token_ids: Annotated[list[int] | None, Field(max_length=MAX_STOP_TOKEN_IDS)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10)] = 1.0
    logit_bias: Annotated[
        dict[int, float], BeforeValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
    ] = Field(default_factory=dict)
    min_tokens: Annotated[int | None, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool | None = False
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    return_token_ids: bool | None = False
    user: Annotated[str | None, Field(max_length=256, description="Written to the audit log.")] = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        return self

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(GenerationRequest):
    prompt: Annotated[Prompt, BeforeValidator(_prompt)]
    max_tokens: Annotated[int | None, Field(ge=0, lt=2**31)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    echo: bool | None = False

    @property
    def logprob_fields(self) -> tuple[str, ...]:
        """The fields of this request that ask for log-probabilities."""
        return tuple(name for name in ("logprobs", "prompt_logprobs") if getattr(self, name) is not None)


class TextPart(Strict):
    type: Literal["text"]
    text: str


# Clients send an answer's message back as it came, with these set to null or empty.
_UNUSED_MESSAGE_FIELDS = (
    "name",
    "refusal",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "audio",
    "annotations",
)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: JsonValue) -> JsonValue:
        if not isinstance(data, dict):
            return data
        for name in _UNUSED_MESSAGE_FIELDS:
            if data.get(name) not in (None, []):
                raise InvalidRequest(
                    f"{name} in a message is not supported",
                    param=f"messages.{name}",
                    code="unsupported_parameter",
                )
        return {name: value for name, value in data.items() if name not in _UNUSED_MESSAGE_FIELDS}

    @property
    def text(self) -> str:
        return (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )

    @property
    def template_role(self) -> str:
        """ "developer" is OpenAI's newer word for "system"; chat templates know the older one."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens disagree", param="max_completion_tokens"
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that the answer must keep to."""
        return None if self.response_format is None else self.response_format.schema_text

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprob_fields(self) -> tuple[str, ...]:
        named = ("logprobs",) if self.logprobs else ()
        return named if self.prompt_logprobs is None else (*named, "prompt_logprobs")


class TokenizeRequest(ModelRequest):
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1, max_length=MAX_MESSAGES)] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(ModelRequest):
    tokens: list[int]


_COMMON_REFUSED: dict[str, tuple[str, Neutral]] = {
    "suffix": ("the model cannot insert text before a given end", ()),
    "best_of": ("only the choices that are drawn are returned; use n", ()),
}

_CHAT_REFUSED: dict[str, tuple[str, Neutral]] = {
    "tools": ("the server calls no tools", ([],)),
    "tool_choice": ("the server calls no tools", ("none", "auto")),
    "parallel_tool_calls": ("the server calls no tools", ()),
    "functions": ("the server calls no functions", ([],)),
    "function_call": ("the server calls no functions", ("none", "auto")),
    "modalities": ("only text is generated", (["text"],)),
    "audio": ("only text is generated", ()),
    "prediction": ("no predicted output is used", ()),
    "reasoning_effort": ("the model has no reasoning mode", ("none",)),
    "verbosity": ("the model has no verbosity setting", ()),
    "web_search_options": ("the server searches nothing", ()),
    "store": ("nothing is stored", (False,)),
    "metadata": ("nothing is stored", ({},)),
    "service_tier": ("there is one tier", ("auto", "default")),
}

REFUSED: dict[type[Strict], dict[str, tuple[str, Neutral]]] = {
    CompletionRequest: _COMMON_REFUSED,
    ChatRequest: _COMMON_REFUSED | _CHAT_REFUSED,
}
