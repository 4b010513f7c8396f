"""Takes profiles in and lets go of them while requests are served: what scoring.admit does at start, beside everybody
else's steps. Called by the server's loader. Knows no file and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision, ProfileVersion
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.scoring import cannot_run, check_replayed
from uld_serve.errors import EngineStopped, Overloaded, ProfileError, UldError
from uld_serve.model.loading import Base

SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)
# Of the replays' cached prefixes: no key shares it.
SALT = "replay probes"


async def admit_live(engine: AsyncEngine, version: ProfileVersion, models: Mapping[str, Base]) -> None:
    """All that must hold before a profile may be asked for; `models` are separate models that it names, loaded.

    Raises ProfileError, Overloaded when there is no room for it just now, and EngineStopped.
    """
    try:
        await engine.between_steps(lambda inner: _prepare(inner, version, models))
        for number, probe in enumerate(version.probes.replay):
            await _replay(engine, version, number, [*probe.prompt_ids, *probe.answer_ids])
    except (ProfileError, Overloaded, EngineStopped):
        raise
    except UldError as error:
        raise cannot_run(version, error) from error


async def missing_models(engine: AsyncEngine, version: ProfileVersion) -> set[str]:
    """Fingerprints of the separate models that it names and that are not loaded."""
    return await engine.between_steps(lambda inner: set(version.models) - set(inner.planner.models))


async def drop_live(engine: AsyncEngine, version: ProfileVersion) -> int:
    """Forget the adapters of a version that nobody uses; how many were in memory."""
    return await engine.between_steps(lambda inner: _drop(inner, version))


def _prepare(engine: Engine, version: ProfileVersion, models: Mapping[str, Base]) -> None:
    engine.prepare([version], models)
    engine.planner.check(version)


def _drop(engine: Engine, version: ProfileVersion) -> int:
    planner = engine.planner
    banks = [planner.bank, *(model.bank for model in planner.models.values())]
    return sum(bank.evict_all(f"{version.digest}/") for bank in banks)


async def _replay(engine: AsyncEngine, version: ProfileVersion, number: int, token_ids: list[int]) -> None:
    decision, request_id = Decision.of_version(version), f"replay-{version.digest}-{number}"
    async for delta in engine.stream(
        token_ids, SCORE, decision, request_id=request_id, tenant=SALT, cache_salt=SALT
    ):
        if delta.error is not None:
            raise delta.error
        if delta.finish_reason is not None:
            check_replayed(version, number, delta.prompt_logprobs or ())
