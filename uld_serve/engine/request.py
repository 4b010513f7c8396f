"""What a client asks of the engine and what it gets back. Plain values; knows no tensor, profile or HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from uld_serve.errors import InvalidRequest, UldError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens for one request. Field names follow OpenAI's API and vLLM's extras.

    `temperature` 0, or below 1e-5, is greedy. `logprobs` = n returns each drawn token's log-probability and the n best;
    `prompt_logprobs` = n the same for the prompt's tokens from position `scored_from` on: what stands before them may
    come from the cache. Both are under the served (fused) distribution.
    `max_tokens` 0 draws nothing: the prompt is only scored. `json_schema` is a schema's text, which the answer keeps to
    as far as it gets; log-probabilities are then of the tokens that the schema allows.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    scored_from: int = 0
    include_stop_str: bool = False
    json_schema: str | None = None

    @property
    def penalises(self) -> bool:
        """Whether a draw hangs on which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def needs_tokens(self) -> bool:
        """Whether a draw cannot be launched before the host knows every token before it."""
        return self.penalises or self.json_schema is not None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 0, "max_tokens", "must be 0 or more")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens")
        _require(0.0 <= self.temperature <= 2.0, "temperature", "must be between 0 and 2")
        _require(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", "must be 0 (off) or more")
        _require(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1")
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "must be between -2 and 2")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "must be between -2 and 2")
        _require(0.01 <= self.repetition_penalty <= 10.0, "repetition_penalty", "must be between 0.01 and 10")
        _require(self.seed is None or 0 <= self.seed < MAX_SEED, "seed", "must be between 0 and 2**64 - 1")
        _require(all(self.stop), "stop", "must not hold an empty string")
        if self.json_schema is not None:  # it says itself when a text ends, and then nothing else may follow
            _require(self.min_tokens == 0, "min_tokens", "must be 0 with a response_format")
            _require(not self.ignore_eos, "ignore_eos", "must be false with a response_format")
        for name in ("logprobs", "prompt_logprobs"):
            n = getattr(self, name)
            _require(n is None or 0 <= n <= MAX_TOP_LOGPROBS, name, f"must be 0 to {MAX_TOP_LOGPROBS}")
        _require(self.scored_from >= 0, "scored_from", "must be 0 or more")
        _require(
            all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()),
            "logit_bias",
            "values must be between -100 and 100",
        )


def _require(condition: bool, param: str, what: str) -> None:
    if not condition:
        raise InvalidRequest(f"{param} {what}", param=param)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability under the served distribution; -inf where the filter removed it."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiptEntry:
    name: str
    digest: str
    rule: str
    strength: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was forgotten, as the sampler applied it. `profiles` is empty for the base alone."""

    profiles: tuple[ReceiptEntry, ...]
    engine: str

    @property
    def header(self) -> str:
        """`name@digest12,…`, or `none`."""
        if not self.profiles:
            return "none"
        return ",".join(f"{p.name}@{p.digest.removeprefix('sha256:')[:12]}" for p in self.profiles)


@dataclass(frozen=True, slots=True)
class Usage:
    """`cached_tokens` of the prompt were taken from the prefix cache when the request first ran."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Measure:
    """What the rules did to one drawn token's scores. `kl_nats`: KL(fused || target); `num_kept`: tokens that filters
    and rules left; `argmax_changed`: the likeliest token is no longer the target's."""

    kl_nats: float
    num_kept: int
    argmax_changed: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request was added (Unix time) and how long it was queued, in its prompt, and being answered, in
    nanoseconds. None for what it did not come to."""

    added_ns: int
    queue_ns: int
    prefill_ns: int | None
    decode_ns: int | None

    @property
    def queued_s(self) -> float:
        return self.queue_ns / 1e9

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """(name, start, end) of each, in Unix nanoseconds."""
        found, start = [], self.added_ns
        for name, length in (
            ("queue", self.queue_ns),
            ("prefill", self.prefill_ns),
            ("decode", self.decode_ns),
        ):
            if length is None:
                break
            found.append((name, start, start + length))
            start += length
        return found


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has to do now. `cache_usage`: share of the target's keys and values in use, 0 to 1."""

    num_running: int
    num_waiting: int
    cache_usage: float
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to one request. The last one has `finish_reason`; then `usage` is set too.

    `text` never ends in a broken UTF-8 sequence; it may be empty while bytes or a possible stop string are
    held back. The first Delta and the last carry the receipt; the first carries prompt log-probabilities
    (one entry per prompt token, None for the first). `measure` is of the drawn token, where the engine measures.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: UldError | None = None
    receipt: Receipt | None = None
    usage: Usage | None = None
    measure: Measure | None = None
    timing: Timing | None = None
