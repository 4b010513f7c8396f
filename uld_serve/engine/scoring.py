"""Runs batches of requests to their end on one engine, without HTTP: generation and teacher-forced scoring
through the very same combine rule. Called by LLM and at start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision, ProfileVersion
from uld_serve.engine.request import Delta, SamplingParams, TokenLogprob
from uld_serve.errors import ProfileMismatch, PromptTooLong, UldError

# A replayed probe may be off by this much (nats): kernels and dtypes differ by rounding, a profile that lost
# its effect differs by nats.
REPLAY_TOLERANCE_NATS = 0.15
REPLAY_TOLERANCE_SHARE = 0.05

OnFinish = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Job:
    prompt_ids: list[int]
    params: SamplingParams
    decision: Decision


def run_jobs(engine: Engine, jobs: Sequence[Job], *, on_finish: OnFinish | None = None) -> list[list[Delta]]:
    """Every job's deltas, in the order of the jobs. Raises the first job's error that occurs; on any error
    the rest is aborted and nothing stays in the engine."""
    deltas: dict[str, list[Delta]] = {}
    queue = iter(enumerate(jobs))
    try:
        _fill(engine, queue, deltas)
        while engine.has_work:
            for delta in engine.step():
                deltas[delta.request_id].append(delta)
                if delta.error is not None:
                    raise delta.error
                if delta.finish_reason is not None and on_finish is not None:
                    on_finish()
            _fill(engine, queue, deltas)
    finally:
        for request_id in deltas:
            engine.abort(request_id)
    return list(deltas.values())


def _fill(engine: Engine, queue: enumerate[Job], deltas: dict[str, list[Delta]]) -> None:
    """Keep the engine's queue topped up without overrunning it."""
    while engine.num_waiting < engine.config.max_waiting:
        number, job = next(queue, (None, None))
        if job is None:
            return
        request_id = f"job-{number}"
        engine.add(request_id, job.prompt_ids, job.params, job.decision)
        deltas[request_id] = []


def score(
    engine: Engine,
    sequences: Sequence[list[int]],
    decision: Decision,
    *,
    starts: Sequence[int] | None = None,
    top: int = 1,
    on_finish: OnFinish | None = None,
) -> list[tuple[TokenLogprob | None, ...]]:
    """Log-probability of each token given those before it, under the decision; None for the first, and for those
    before the sequence's position in `starts`, which are then run once for all sequences that begin alike."""
    params = [
        SamplingParams(max_tokens=0, prompt_logprobs=top, scored_from=start)
        for start in starts or [0] * len(sequences)
    ]
    jobs = [Job(token_ids, one, decision) for token_ids, one in zip(sequences, params, strict=True)]
    runs = run_jobs(engine, jobs, on_finish=on_finish)
    return [run[-1].prompt_logprobs or () for run in runs]


def replay(engine: Engine, version: ProfileVersion) -> None:
    """Score the profile's replay probes and compare with what training recorded.

    Raises ProfileMismatch when a probe's negative log-likelihood under the profile is off by more than the
    tolerance: the profile does not do here what it did when it was made.
    """
    decision = Decision.of_version(version)
    probes = version.probes.replay
    sequences = [[*probe.prompt_ids, *probe.answer_ids] for probe in probes]
    starts = [len(probe.prompt_ids) for probe in probes]
    scored = score(engine, sequences, decision, starts=starts, top=0)
    for number, entries in enumerate(scored):
        check_replayed(version, number, entries)


def check_replayed(version: ProfileVersion, number: int, entries: Sequence[TokenLogprob | None]) -> None:
    """`entries`: the scores of replay probe `number`. Raises ProfileMismatch."""
    probe = version.probes.replay[number]
    answer = entries[len(probe.prompt_ids) :]
    nll = -sum(entry.logprob for entry in answer if entry is not None) / len(answer)
    tolerance = REPLAY_TOLERANCE_NATS + REPLAY_TOLERANCE_SHARE * probe.nll_fused
    if not abs(nll - probe.nll_fused) <= tolerance:
        raise ProfileMismatch(
            f"profile '{version.name}' does not reproduce its replay probe {number}: negative log-likelihood "
            f"{nll:.3f} nats a token here, {probe.nll_fused:.3f} when it was made; train it again on this base"
        )


def admit(engine: Engine, version: ProfileVersion) -> None:
    """All that must hold before a profile may be asked for. Raises ProfileError."""
    engine.planner.check(version)
    try:
        replay(engine, version)
    except ProfileMismatch:
        raise
    except PromptTooLong as error:
        raise ProfileMismatch(
            f"profile '{version.name}' cannot be checked at start: its replay probes are longer than max_model_len "
            f"{engine.config.max_model_len}; raise that"
        ) from error
    except UldError as error:
        raise cannot_run(version, error) from error


def cannot_run(version: ProfileVersion, error: UldError) -> ProfileMismatch:
    return ProfileMismatch(f"profile '{version.name}' cannot be run on this base: {error.message}")
