"""A fault at every named point of the path of a request and of a profile, of every kind, under a mixed load: no
canary, no hang, no clean end of what failed; afterwards everything is given back and the next requests are answered,
or the engine has stopped, says so and answers nobody."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from canary import CanaryModel
from canary_server import CanaryServer, Said, canary_server, mixed_load, one_each
from fault_points import POINTS, Fault, Kind, Point
from scale import SCALE

# The n-th passage that a fault strikes at.
PASSAGES = {"fast": (2,), "gate": (1, 6), "aim": (1, 2, 3, 5, 8, 13, 21)}[SCALE]
PAIRS_AT_AIM = 2000
SETTLE_S = 5.0


def faults() -> list[tuple[str, Kind, int]]:
    """At the least scale each point gets one of its kinds, in turn."""
    found = []
    for number, (name, point) in enumerate(POINTS.items()):
        kinds = (point.kinds[number % len(point.kinds)],) if SCALE == "fast" else point.kinds
        found += [(name, kind, at) for kind in kinds for at in PASSAGES]
    return found


def once_or(at: int, point: Point) -> int:
    """What happens once in a round is struck the first time."""
    return at if point.needs == "request" else 1


@dataclass
class Chaos:
    """One server after another: who has stopped is replaced."""

    make: Callable[[], CanaryServer]
    server: CanaryServer
    num_answers: int = 0
    num_failed: int = 0
    num_stops: int = 0
    num_struck: int = 0
    not_struck: set[str] = field(default_factory=set)

    def run(self, names: list[str], kinds: list[Kind], ats: list[int]) -> list[str]:
        """Problems of one round with faults at these points."""
        points = [POINTS[name] for name in names]
        problems = asyncio.run(self._round(points, kinds, ats, names))
        if not self.server.asynchronous.is_alive:
            self.num_stops += 1
            if not any(point.stops for point in points):
                problems.append("the engine has stopped, where a fault may end requests alone")
            problems += asyncio.run(self._refuses_everybody())
            self.server = self.make()
            return problems
        left = self.server.still_held(within_s=SETTLE_S)
        problems += [f"not given back: {left}"] if left else []
        problems += asyncio.run(self._answers_again())
        return problems

    async def _round(
        self, points: list[Point], kinds: list[Kind], ats: list[int], names: list[str]
    ) -> list[str]:
        loop, server, asking = asyncio.get_running_loop(), self.server, []

        def clients_leave() -> None:
            for task in asking[::2]:
                loop.call_soon_threadsafe(task.cancel)

        faults = [
            Fault(point, kind, once_or(at, point), clients_leave)
            for point, kind, at in zip(points, kinds, ats, strict=True)
        ]
        with ExitStack() as in_place:
            for fault in faults:
                in_place.enter_context(fault.in_place())
            asking += [asyncio.create_task(server.ask(question)) for question in mixed_load()]
            working = [asyncio.create_task(one) for one in self._operators_work(points)]
            if any(point.needs == "failure" for point in points):
                loop.call_later(0.03, clients_leave)
            found = await asyncio.gather(*asking, return_exceptions=True)
            await asyncio.gather(*working, return_exceptions=True)
        self.num_struck += sum(fault.has_struck for fault in faults)
        self.not_struck |= {name for name, fault in zip(names, faults, strict=True) if not fault.num_passed}
        said = [one for one in found if isinstance(one, Said)]
        self.num_answers += sum(one.is_answered for one in said)
        self.num_failed += sum(not one.is_answered for one in said)
        problems = [problem for one in said for problem in one.problems]
        return problems + ["a request hangs" for one in found if isinstance(one, TimeoutError)]

    def _operators_work(self, points: list[Point]) -> Iterator[object]:
        """A swap in every round, an unloading where it is asked for."""
        held = self.server.live.apps[0].state.catalog.registry.get("late").directory.name
        yield self.server.load("late", "late" if held == "late-2" else "late-2")
        if any(point.needs == "unload" for point in points):
            yield self.server.unload("truncated")

    async def _refuses_everybody(self) -> list[str]:
        said = await self.server.ask_all(one_each())
        problems = [problem for one in said for problem in one.problems]
        return problems + [
            f"{one.reply.status} of an engine that has stopped" for one in said if one.is_answered
        ]

    async def _answers_again(self) -> list[str]:
        if "truncated" not in self.server.live.apps[0].state.catalog.registry.names():
            await self.server.load("truncated", "truncated")
        said = await self.server.ask_all(one_each())
        self.num_answers += sum(one.is_answered for one in said)
        problems = [problem for one in said for problem in one.problems]
        problems += [
            f"afterwards {one.reply.status}: {one.reply.data!r}" for one in said if not one.is_answered
        ]
        try:
            await self.server.asynchronous.between_steps(lambda engine: engine.check_integrity())
        except AssertionError as error:
            problems.append(str(error))
        return problems


@pytest.fixture(scope="module")
def chaos(canary: CanaryModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    folder: Path = tmp_path_factory.mktemp("audit")
    numbers = itertools.count()
    with ExitStack() as servers:

        def make() -> CanaryServer:
            servers.close()
            return servers.enter_context(canary_server(canary, audit=folder / f"{next(numbers)}.jsonl"))

        yield Chaos(make, make())


def test_points_are_places_in_the_product() -> None:
    assert len(POINTS) >= 40
    for name, point in POINTS.items():
        owner, attribute = point.place()
        assert callable(getattr(owner, attribute)), name
    assert len({point.where for point in POINTS.values()}) == len(POINTS)


@pytest.mark.row("fault points")
@pytest.mark.timeout(7200)
def test_a_fault_at_any_point_lets_no_token_out_and_nothing_hang(
    chaos: Chaos, record_property: Callable[[str, object], None]
) -> None:
    found = {fault: problems for fault in faults() if (problems := chaos.run(*([one] for one in fault)))}
    record_property("points", len(POINTS))
    record_property("count", len(faults()))
    record_property("struck", chaos.num_struck)
    record_property("answers", chaos.num_answers)
    record_property("failed", chaos.num_failed)
    record_property("engine stops", chaos.num_stops)
    assert not found, "\n".join(f"{fault}: {problem}" for fault, ps in found.items() for problem in ps[:3])
    # With few rounds a point that needs a certain timing may not come up.
    assert SCALE == "fast" or not chaos.not_struck, f"never passed: {sorted(chaos.not_struck)}"


@pytest.mark.skipif(SCALE != "aim", reason="pairs of faults are the aim")
@pytest.mark.row("pairs of faults")
@pytest.mark.timeout(14400)
def test_two_faults_at_once_let_no_token_out_and_nothing_hang(
    chaos: Chaos, record_property: Callable[[str, object], None]
) -> None:
    rng, found = random.Random(8), {}
    for _ in range(PAIRS_AT_AIM):
        names = rng.sample(list(POINTS), 2)
        kinds = [rng.choice(POINTS[name].kinds) for name in names]
        ats = [rng.randrange(1, 12) for _ in names]
        if problems := chaos.run(names, kinds, ats):
            found[(*names, *kinds, *ats)] = problems
    record_property("count", PAIRS_AT_AIM)
    record_property("answers", chaos.num_answers)
    assert not found, "\n".join(f"{fault}: {problem}" for fault, ps in found.items() for problem in ps[:3])
