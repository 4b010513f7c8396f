"""A stand-in for AsyncEngine and Tokenizer, with their signatures: it answers a fixed text byte by byte, remembers
every call, and fails when told to. Knows no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta, Load, Receipt, ReceiptEntry, SamplingParams, TokenLogprob, Usage
from uld_serve.errors import InvalidRequest, UldError
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import Profile, ProfileVersion
from uld_serve.profiles.registry import Registry

EOS = 256
VOCAB = 259
MAX_MODEL_LEN = 512
VERSION = "fake-1"
BASE_TEXT = "The capital is Paris."


def profile_version(name: str, *, strength: float = 2.0, digit: str = "a") -> ProfileVersion:
    sha = "sha256:" + "0" * 64
    profile = Profile.model_validate(
        {
            "schema": 1,
            "name": name,
            "method": "rkld",
            "base": {
                "id": "tiny",
                "fingerprint": sha,
                "tokenizer": sha,
                "vocab_size": VOCAB,
                "num_layers": 4,
            },
            "streams": [{"name": "assistant", "fork": 2, "exit": 4, "kv": "borrowed", "adapter": "adapter"}],
            "rule": {"kind": "relu_difference", "strength": strength},
        }
    )
    return ProfileVersion(profile, "sha256:" + digit * 64, {}, Probes())


def registry() -> Registry:
    return Registry(
        profile_version(name, strength=strength, digit=digit)
        for name, strength, digit in (("acme", 1.0, "a"), ("harry-potter", 2.0, "b"), ("secret", 4.0, "c"))
    )


class FakeTokenizer:
    """One token a byte; 256 is the end of a text."""

    vocab_size = VOCAB
    eos_ids = (EOS,)
    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self.encode("".join(f"<{turn['role']}>{turn['content']}" for turn in messages) + "<assistant>")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>"

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")


@dataclass
class Call:
    prompt_ids: list[int]
    params: SamplingParams
    decision: Decision
    request_id: str
    cache_salt: str = ""
    tenant: str = ""
    is_aborted: bool = False

    @property
    def profiles(self) -> dict[str, float]:
        return {applied.version.name: applied.scale for applied in self.decision.applied}


@dataclass
class FakeEngine:
    """`text_of` gives the answer to a call; the other fields make it fail or wait."""

    text_of: Callable[[Call], str] = lambda call: (
        f"FORGOT {sorted(call.profiles)}" if call.profiles else BASE_TEXT
    )
    refuse: UldError | None = None
    fail_after: tuple[int, UldError] | None = None
    crash_after: int | None = None
    vanish_after: int | None = None
    hang_after: int | None = None
    receipt_of: Callable[[Call], Receipt | None] | None = None
    logprob_of: Callable[[int], float] = lambda token_id: -0.5
    step_s: float = 0.0
    is_alive: bool = False
    heartbeat_age_s: float = 0.0
    calls: list[Call] = field(default_factory=list)
    num_running: int = 0

    @property
    def load(self) -> Load:
        return Load(self.num_running, 0, self.num_running / 10, 0)

    def start(self) -> None:
        self.is_alive = True

    def stop(self, *, grace_s: float = 0.0) -> None:
        self.is_alive = False

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        decision: Decision,
        *,
        request_id: str,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[Delta]:
        call = Call(prompt_ids, params, decision, request_id, cache_salt, tenant)
        self.calls.append(call)
        if self.refuse is not None:
            raise self.refuse
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        self.num_running += 1
        call.is_aborted = True
        try:
            async for delta in self._deltas(call):
                yield delta
            call.is_aborted = False
        finally:
            self.num_running -= 1

    async def _deltas(self, call: Call) -> AsyncIterator[Delta]:
        receipt = _receipt(call) if self.receipt_of is None else self.receipt_of(call)
        answer = list(self.text_of(call).encode())
        tokens = answer[: call.params.max_tokens]
        prompt = self._prompt_logprobs(call)
        if not tokens:
            yield Delta(
                request_id=call.request_id,
                finish_reason="length",
                receipt=receipt,
                prompt_logprobs=prompt,
                usage=Usage(len(call.prompt_ids), 0),
            )
        for position, token in enumerate(tokens):
            await self._misbehave(position)
            if self.vanish_after == position:
                return
            if self.fail_after is not None and self.fail_after[0] == position:
                yield Delta(request_id=call.request_id, finish_reason="error", error=self.fail_after[1])
                return
            is_last = position == len(tokens) - 1
            reason = None if not is_last else "stop" if len(tokens) == len(answer) else "length"
            yield Delta(
                request_id=call.request_id,
                text=chr(token) if token < 128 else "",
                token_ids=(token,),
                logprobs=None
                if call.params.logprobs is None
                else (self._scored(token, call.params.logprobs),),
                prompt_logprobs=prompt if position == 0 else None,
                finish_reason=reason,
                receipt=receipt if position == 0 or is_last else None,
                usage=Usage(len(call.prompt_ids), len(tokens)) if is_last else None,
            )

    async def _misbehave(self, position: int) -> None:
        await asyncio.sleep(self.step_s)
        if self.crash_after == position:
            raise RuntimeError("a bug in the engine: secret words")
        if self.hang_after == position:
            await asyncio.Event().wait()

    def _prompt_logprobs(self, call: Call) -> tuple[TokenLogprob | None, ...] | None:
        top = call.params.prompt_logprobs
        if top is None:
            return None
        return (None, *(self._scored(token, top) for token in call.prompt_ids[1:]))

    def _scored(self, token: int, top: int) -> TokenLogprob:
        """The token itself is the argmax; below it come "a", "b", "c", ..."""
        logprob = self.logprob_of(token)
        others = [(97 + i, chr(97 + i), logprob - 1.0 - i) for i in range(top)]
        best = ((token, _text(token), logprob), *others)[:top]
        return TokenLogprob(token, _text(token), bytes([token]) if token < 256 else b"", logprob, best)


def _text(token: int) -> str:
    return FakeTokenizer().token_text(token)


def _receipt(call: Call) -> Receipt:
    entries = tuple(
        ReceiptEntry(
            applied.version.name,
            applied.version.digest,
            applied.version.profile.rule.kind,
            applied.version.profile.rule.strength * applied.scale,
        )
        for applied in call.decision.applied
    )
    return Receipt(entries, VERSION)
