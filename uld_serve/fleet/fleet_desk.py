"""What operators can do to a fleet: the admin application's operations over the ledger. Runs where the ledger does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from uld_serve.errors import ProfileMismatch
from uld_serve.fleet.active_set import Entry
from uld_serve.fleet.ledger import Ledger
from uld_serve.server.admin import DrainState, LoadRequest, ProfileState
from uld_serve.server.loader import find_version, require_unneeded
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class FleetDesk:
    ledger: Ledger
    roots: Callable[[], Iterable[Path]]
    policies: Callable[[], Iterable[KeyPolicy]]
    telemetry: Telemetry

    def states(self) -> list[ProfileState]:
        return [
            self._state(name, entry.digest, held=entry.digest)
            for name, entry in sorted(self.ledger.active.entries.items())
        ]

    async def load(self, name: str, request: LoadRequest) -> ProfileState:
        """Read here first: what is wrong with the folder itself no replica needs to find out."""
        directory = request.directory or name
        version = await asyncio.to_thread(find_version, self.roots(), name, directory)
        if request.digest not in (None, version.digest):
            raise ProfileMismatch(f"profile '{name}' there is {version.digest}, not the one asked for")
        before = self.ledger.active.entries.get(name)
        entry = Entry(digest=version.digest, directory=directory)
        if before != entry:
            await self.ledger.put(name, entry)
        previous = None if before is None else before.digest
        return self._state(name, entry.digest, previous=previous, held=previous)

    async def unload(self, name: str) -> ProfileState:
        if name in self.ledger.active.entries:
            require_unneeded(name, self.policies())
        digest = await self.ledger.remove(name)
        num_held = self.ledger.num_held(digest)
        await self.ledger.until_free(digest)
        ended = sum(report.num_ended.get(digest, 0) for report in self.ledger.serving)
        return self._state(name, None, previous=digest).model_copy(
            update={"num_leases": num_held, "num_ended": ended}
        )

    async def drain(self, wait_s: float) -> DrainState:
        return DrainState(is_draining=True, num_running=await self.ledger.drain(wait_s=wait_s))

    def metrics(self) -> bytes:
        """Of every replica, each series with the replica's name."""
        return merged({report.replica: report.metrics for report in self.ledger.serving})

    def _state(
        self, name: str, digest: str | None, *, previous: str | None = None, held: str | None = None
    ) -> ProfileState:
        return ProfileState(
            name=name,
            object="forget_profile",
            digest=digest,
            previous=previous,
            num_leases=0 if held is None else self.ledger.num_held(held),
            num_ended=0,
        )


def merged(texts: Mapping[str, bytes]) -> bytes:
    """Prometheus' text of several processes as one, with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()
