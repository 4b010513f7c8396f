"""Two real replicas on the tiny base behind a real door, in one process: profiles change while clients ask. No Ray."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from tiny_base import RULES, Tiny, write_tiny_profile

from uld_serve.errors import EngineStopped, UldError
from uld_serve.fleet.active_set import ActiveSet, Entry
from uld_serve.fleet.affinity import preference
from uld_serve.fleet.door import Batches, Door
from uld_serve.fleet.forwarded import Forwarded
from uld_serve.fleet.ledger import Ledger
from uld_serve.fleet.replica import FleetPlan, Replica
from uld_serve.fleet.settings import FleetSettings
from uld_serve.profiles.store import read_profile
from uld_serve.server.keys import KeyRing
from uld_serve.server.settings import Limits, ServerSettings

PROMPTS = ("One is", "Two are", "Three were", "Four have been")
NUM_CLIENTS = 4


@pytest.fixture(scope="module")
def root(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of "acme" in the folders acme-1 and acme-2 of `profiles`."""
    work = tmp_path_factory.mktemp("swap")
    rule, streams = RULES["truncated"]
    for number in (1, 2):
        path = work / str(number) / "acme"
        path.parent.mkdir()
        write_tiny_profile(
            path, tiny.base, tiny.folder, rule={**rule, "strength": 3.0}, streams=streams, seed=70 * number
        )
        shutil.copytree(path, work / "profiles" / f"acme-{number}")
    return work


def entry_of(root: Path, number: int) -> Entry:
    folder = root / "profiles" / f"acme-{number}"
    return Entry(digest=read_profile(folder).digest, directory=folder.name)


@dataclass
class Fleet:
    plan: FleetPlan
    ledger: Ledger
    replicas: dict[str, Replica] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)

    async def start(self, name: str) -> None:
        self.replicas[name] = Replica(self.plan, name, self.ledger)
        await self.replicas[name].start()

    async def send_to(self, key: str, request: Forwarded) -> Batches:
        chosen = preference(key, {name: self.running[name] for name in self.replicas}, slack=1)[0]
        self.running[chosen] += 1
        try:
            async for batch in self.replicas[chosen].answer(request):
                yield batch
        finally:
            self.running[chosen] -= 1

    def error_of(self, error: Exception) -> UldError:
        return EngineStopped(type(error).__name__)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=Door(self.send_to, self.error_of, Limits(), prefix_chars=8))
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet", timeout=60) as client:
            yield client

    async def stop(self) -> None:
        for replica in self.replicas.values():
            await replica.stop()


@pytest.fixture
def plan(tiny: Tiny, root: Path, tmp_path: Path) -> FleetPlan:
    settings = ServerSettings(
        model=str(tiny.folder),
        profiles=[root / "profiles"],
        dtype="float32",
        kv_cache_bytes=2**24,
        audit_log=tmp_path / "audit.jsonl",
    )
    fleet = FleetSettings(active_file=tmp_path / "active.json", lease_s=1.0, poll_s=0.2, start_s=30)
    return FleetPlan(settings, KeyRing(), fleet, made_s=0.0)


@asynccontextmanager
async def fleet(plan: FleetPlan, root: Path) -> AsyncIterator[Fleet]:
    first = ActiveSet(number=1, entries={"acme": entry_of(root, 1)})
    ledger = Ledger(first, path=plan.fleet.active_file, lease_s=1.0, prepare_s=30)
    made = Fleet(plan, ledger)
    try:
        for name in ("r1", "r2"):
            await made.start(name)
        yield made
    finally:
        await made.stop()


async def answer(client: httpx.AsyncClient, tiny: Tiny, prompt: str) -> tuple[str, str]:
    """The digest of the receipt, and the text."""
    ask = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json={"model": f"{tiny.folder.name}:acme", **ask})
    assert response.status_code == 200, response.text
    body = response.json()
    return body["forget"]["profiles"][0]["digest"], body["choices"][0]["text"]


def test_answers_under_swaps_are_old_or_new_and_never_mixed(tiny: Tiny, root: Path, plan: FleetPlan) -> None:
    entries = [entry_of(root, number) for number in (1, 2)]
    found: list[tuple[str, str, str]] = []

    async def ask_on(client: httpx.AsyncClient, number: int, is_over: asyncio.Event) -> None:
        turn = number
        while not is_over.is_set():
            prompt = PROMPTS[turn % len(PROMPTS)]
            turn += 1
            found.append((prompt, *await answer(client, tiny, prompt)))

    async def work() -> dict[tuple[str, str], str]:
        expected = {}
        async with fleet(plan, root) as made, made.client() as client:
            for entry in entries:
                await made.ledger.put("acme", entry)
                for prompt in PROMPTS:
                    said, expected[prompt, entry.digest] = await answer(client, tiny, prompt)
                    assert said == entry.digest
            is_over = asyncio.Event()
            clients = [asyncio.create_task(ask_on(client, n, is_over)) for n in range(NUM_CLIENTS)]
            for swap in range(6):
                await made.ledger.put("acme", entries[swap % 2])
                said = [await answer(client, tiny, prompt) for prompt in PROMPTS]
                assert {digest for digest, _ in said} == {entries[swap % 2].digest}
            is_over.set()
            await asyncio.gather(*clients)
        return expected

    expected = asyncio.run(asyncio.wait_for(work(), 110))
    assert len(set(expected.values())) > len(PROMPTS), "the versions must answer differently"
    wrong = [(prompt, digest) for prompt, digest, text in found if expected[prompt, digest] != text]
    assert wrong == []
    assert {digest for _, digest, _ in found} == {entry.digest for entry in entries}


def test_a_replica_that_joins_after_a_swap_answers_as_the_others(
    tiny: Tiny, root: Path, plan: FleetPlan
) -> None:
    """Folders of both versions lie in the root: what is active is said by the ledger, not by what is found."""

    async def work() -> set[tuple[str, str]]:
        async with fleet(plan, root) as made:
            await made.ledger.put("acme", entry_of(root, 2))
            await made.start("r3")
            said = set()
            for name, replica in made.replicas.items():
                async with Fleet(plan, made.ledger, {name: replica}).client() as client:
                    said.add(await answer(client, tiny, PROMPTS[0]))
            return said

    ((digest, _),) = asyncio.run(asyncio.wait_for(work(), 110))
    assert digest == entry_of(root, 2).digest
