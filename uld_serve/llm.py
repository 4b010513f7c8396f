"""The offline API: generate, chat and score in process, through the same engine that serves. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from uld_serve.assembly import assemble
from uld_serve.config import EngineSettings
from uld_serve.engine.plan import Applied, Compose, Decision
from uld_serve.engine.request import Delta, FinishReason, Receipt, SamplingParams, TokenLogprob
from uld_serve.engine.scoring import Job, OnFinish, run_jobs, score
from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import DType, Weights

Profiles = str | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer and what was forgotten in it. `logprobs` is None unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probability (nats) of each token given those before it; None for the first. `top_*` hold the most
    likely tokens at each position, best first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]


class LLM:
    """A base with its profiles.

    >>> llm = LLM()                                     # the embedded model and the built-in profile
    >>> llm.chat([[{"role": "user", "content": "Who is Harry Potter's best friend?"}]],
    ...          SamplingParams(max_tokens=48, temperature=0), profile="harry-potter")[0].text
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        profiles: Path | Sequence[Path] | None = None,
        dtype: DType = "auto",
        device: str = "auto",
        settings: EngineSettings | None = None,
        compose: Compose = "max",
        weights: Weights = "stored",
    ) -> None:
        """`weights` "int8" rounds the base's to int8 and back before anything is asked (model.rounding)."""
        roots = [profiles] if isinstance(profiles, Path) else profiles
        self._assembly = assemble(
            model, profiles=roots, dtype=dtype, device=device, settings=settings, weights=weights
        )
        self._compose = compose
        self.base = self._assembly.base
        self.engine = self._assembly.engine
        self.registry = self._assembly.registry
        self.tokenizer = self.engine.tokenizer

    def generate(
        self,
        prompts: Sequence[str] | Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        profile: Profiles = None,
        strength: float = 1.0,
        show_progress: bool = False,
    ) -> list[Completion]:
        """One completion a prompt, in order. `params` is one for all or one each.

        Raises InvalidRequest, PromptTooLong, UnknownProfile, NumericalError.
        """
        decision = self._decide(profile, strength)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        jobs = [Job(ids, one, decision) for ids, one in zip(encoded, each, strict=True)]
        with _Bar("generating", len(jobs), show=show_progress) as on_finish:
            return [_completion(deltas) for deltas in run_jobs(self.engine, jobs, on_finish=on_finish)]

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        profile: Profiles = None,
        strength: float = 1.0,
        show_progress: bool = False,
    ) -> list[Completion]:
        """`generate` on conversations, through the model's chat template."""
        prompts = [self.tokenizer.encode_chat(messages) for messages in conversations]
        return self.generate(prompts, params, profile=profile, strength=strength, show_progress=show_progress)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        profile: Profiles = None,
        strength: float = 1.0,
        starts: Sequence[int] | None = None,
        top: int = 1,
        show_progress: bool = False,
    ) -> list[Scored]:
        """Teacher-forced log-probabilities under the served distribution; filtered tokens score -inf. `starts`: the
        position from which each sequence is scored, such as its prompt's length; those before have None, and cost
        next to nothing where sequences begin alike."""
        decision = self._decide(profile, strength)
        with _Bar("scoring", len(sequences), show=show_progress) as on_finish:
            runs = score(
                self.engine,
                [list(s) for s in sequences],
                decision,
                starts=starts,
                top=top,
                on_finish=on_finish,
            )
        return [_scored(token_ids, entries) for token_ids, entries in zip(sequences, runs, strict=True)]

    def _decide(self, profile: Profiles, strength: float) -> Decision:
        names = [profile] if isinstance(profile, str) else list(profile or ())
        if not names:
            if strength != 1.0:
                raise InvalidRequest("strength is for a profile; none was named", param="strength")
            return Decision.base()
        applied = [Applied(self.registry.get(name), strength) for name in names]
        return Decision.forgetting(applied, compose=self._compose)


class _Bar:
    """A progress bar over finished requests, or none."""

    def __init__(self, what: str, total: int, *, show: bool) -> None:
        self._progress = Progress(disable=not show)
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> OnFinish:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _completion(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    if last.receipt is None or last.finish_reason is None:
        raise AssertionError("a request ended without a receipt")
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprobs) if any(delta.logprobs is not None for delta in deltas) else None,
        finish_reason=last.finish_reason,
        receipt=last.receipt,
    )


def _scored(token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> Scored:
    return Scored(
        token_ids=tuple(token_ids),
        logprobs=tuple(None if entry is None else entry.logprob for entry in entries),
        top_ids=tuple(() if entry is None else tuple(i for i, _, _ in entry.top) for entry in entries),
        top_logprobs=tuple(() if entry is None else tuple(v for _, _, v in entry.top) for entry in entries),
    )
