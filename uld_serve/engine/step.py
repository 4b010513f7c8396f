"""One step from what was scheduled to what was drawn: launched without waiting, collected later, and run again in
halves where something raises. Called by Engine.step. Knows no text and no delta.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Series
from dataclasses import dataclass

from uld_serve.engine.batch import Batch
from uld_serve.engine.cuda_graphs import GraphedRunner
from uld_serve.engine.pools import Pools
from uld_serve.engine.runner import Runner
from uld_serve.engine.sampler import InFlight, Outcome, Sampler
from uld_serve.engine.sequence import Scheduled
from uld_serve.engine.streams import TARGET_POOL
from uld_serve.errors import RanksLost, UldError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was launched, or why it could not be."""

    scheduled: list[Scheduled]
    in_flight: InFlight | Exception

    @property
    def is_live(self) -> bool:
        """Whether anybody waits for some of it."""
        return any(item.is_live for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class Result:
    """What a step gave: outcomes, and what of it ended in an error."""

    outcomes: list[Outcome]
    failed: list[tuple[Scheduled, UldError]]


@dataclass(frozen=True, slots=True)
class Steps:
    """Launches and collects steps."""

    runner: Runner
    sampler: Sampler
    pools: Pools

    def launch(self, scheduled: list[Scheduled]) -> Step:
        if not scheduled:
            return Step([], InFlight((), (), None, None))
        try:
            return Step(scheduled, self._launch(scheduled, None))
        except RanksLost:  # no part of the batch could be run either
            raise
        except Exception as error:  # `again` finds out whose it is
            logger.exception("a step of %d requests failed", len(scheduled))
            return Step(scheduled, error)

    def launch_ahead(self, scheduled: list[Scheduled], before: Step) -> Step | None:
        """The step after `before`, which is still in flight; None if it cannot be launched."""
        assert isinstance(before.in_flight, InFlight)
        try:
            return Step(scheduled, self._launch(scheduled, before.in_flight))
        except Exception:  # it is run again, and looked into, when nothing else is in flight
            logger.warning("a step of %d requests could not go ahead", len(scheduled), exc_info=True)
            return None

    def collect(self, step: Step) -> Result | Exception:
        """Waits for the device. What it raised then, or when it was launched, is for `again`."""
        if isinstance(step.in_flight, Exception):
            return step.in_flight
        try:
            return Result(self.sampler.collect(step.in_flight), [])
        except Exception as error:
            logger.exception("a step of %d requests failed", len(step.scheduled))
            return error

    def rerun(self, step: Step, error: Exception) -> Result:
        """A step that ended in `error`, for those who still wait for it. Who is left alone is blamed only if nobody who
        has ended meanwhile can have been the culprit."""
        live = [item for item in step.scheduled if item.is_live]
        return self.again(live, error) if len(live) == len(step.scheduled) else self._run(live)

    def again(self, scheduled: list[Scheduled], error: Exception) -> Result:
        """After `error`: halve the batch until the culprit is alone, so that only its request ends.

        Running twice is harmless: the cache is written with the same values and nothing has been drawn. Nothing else
        may be in flight.
        """
        if len(scheduled) < 2:
            return Result([], [(item, _blamed(item, error)) for item in scheduled])
        middle = len(scheduled) // 2
        first, second = self._run(scheduled[:middle]), self._run(scheduled[middle:])
        return Result(first.outcomes + second.outcomes, first.failed + second.failed)

    def _run(self, scheduled: list[Scheduled]) -> Result:
        found = self.collect(self.launch(scheduled))
        return found if isinstance(found, Result) else self.again(scheduled, found)

    def _launch(self, scheduled: Series[Scheduled], before: InFlight | None) -> InFlight:
        self._clear_left_over()
        batch = Batch.of(scheduled, block_size=self.pools.block_size)
        drawn = None if before is None else before.drawn
        if isinstance(self.runner, GraphedRunner):
            return self.runner.launch(batch, drawn, self.sampler)
        return self.sampler.launch(batch.wants, self.runner.run(batch.on(self.sampler.device, drawn)))

    def _clear_left_over(self) -> None:
        for name, pool in self.pools.by_name.items():
            if left_over := pool.pop_to_clear():
                if name == TARGET_POOL:
                    self.runner.clear(left_over)
                else:
                    self.runner.clear_beside(name, left_over)


def _blamed(item: Scheduled, error: Exception) -> UldError:
    told = (
        error.message if isinstance(error, UldError) else type(error).__name__
    )  # its words may be the client's
    logger.error("request %s failed: %s", item.sequence.request_id, told)
    return as_uld_error(error)


def as_uld_error(error: Exception) -> UldError:
    """What the client is told; the cause is in the log, never in the answer."""
    return error if isinstance(error, UldError) else UldError("the request failed inside the engine")
