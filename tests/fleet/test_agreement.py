"""Two phases, leases and late replicas: a fleet serves one set of profiles, or says nothing. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path

import pytest
from simulated import FIRST, LEASE_S, Fleet, Node, entry, fleet, until

from uld_serve.errors import EngineStopped, ProfileError, ProfileMismatch, UnknownProfile
from uld_serve.fleet.active_set import ActiveSet, read_set
from uld_serve.fleet.ledger import MARGIN, Ledger


def run(work: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "active.json"


def all_serve(made: Fleet, name: str, digit: str | None) -> bool:
    wanted = None if digit is None else entry(digit).digest
    return all(node.digests.get(name) == wanted for node in made.nodes.values())


def test_a_change_is_everywhere_when_it_is_answered(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2", "r3") as made:
            await made.ledger.put("acme", entry("b"))
            assert all_serve(made, "acme", "b")
            assert all_serve(made, "secret", "c")
            stored = read_set(path)
            assert stored is not None
            assert stored.entries["acme"] == entry("b")
            await made.ledger.put("fresh", entry("d"))
            assert all_serve(made, "fresh", "d")

    run(work())


def test_one_refusal_changes_nothing_anywhere(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            made.nodes["r2"].engine.error = ProfileMismatch("was made for another base")
            with pytest.raises(
                ProfileError, match=r"replica r2 refuses: was made for another base; nothing was changed"
            ):
                await made.ledger.put("acme", entry("b"))
            assert all_serve(made, "acme", "a")
            assert read_set(path) == FIRST
            await until(lambda: entry("b").digest in made.nodes["r1"].engine.dropped)
            made.nodes["r2"].engine.error = None
            await made.ledger.put("acme", entry("b"))
            assert all_serve(made, "acme", "b")

    run(work())


@pytest.mark.parametrize("lacks", ["folder", "bytes"])
def test_a_replica_whose_files_differ_refuses(path: Path, lacks: str) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            wanted = entry("b")
            if lacks == "folder":
                made.nodes["r1"].loader.missing.add(wanted.directory)
            else:
                wanted = wanted.model_copy(update={"directory": "folder-e"})
            with pytest.raises(ProfileError, match="nothing was changed"):
                await made.ledger.put("acme", wanted)
            assert all_serve(made, "acme", "a")

    run(work())


def test_old_versions_serve_while_the_new_one_is_prepared(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            made.nodes["r2"].engine.admit_s = 3 * LEASE_S
            change = asyncio.create_task(made.ledger.put("acme", entry("b")))
            for _ in range(20):
                await asyncio.sleep(LEASE_S / 8)
                assert all_serve(made, "acme", "a")
                assert all(node.member.is_current for node in made.nodes.values())
            await change
            assert all_serve(made, "acme", "b")

    run(work())


def test_preparing_that_never_ends_changes_nothing(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2", prepare_s=0.5) as made:
            made.nodes["r2"].engine.admit_s = 60
            with pytest.raises(ProfileError, match=r"not every replica could prepare this within 0.5 s"):
                await made.ledger.put("acme", entry("b"))
            made.nodes["r2"].engine.admit_s = 0
            assert all_serve(made, "acme", "a")
            await made.ledger.put("acme", entry("d"))
            assert all_serve(made, "acme", "d")

    run(work())


def cut(node: Node) -> None:
    node.wire.is_cut = True


def test_a_replica_that_is_cut_off_answers_nothing_once_a_change_is_answered(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            lost = made.nodes["r2"]
            cut(lost)
            await made.ledger.put("acme", entry("b"))
            assert made.nodes["r1"].digests["acme"] == entry("b").digest
            assert lost.digests["acme"] == entry("a").digest
            assert not lost.member.is_current
            assert lost.backend.is_behind()

    run(work())


def test_a_replica_that_comes_back_takes_what_it_missed_before_it_answers(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            lost = made.nodes["r2"]
            cut(lost)
            await made.ledger.put("acme", entry("b"))
            await made.ledger.remove("secret")
            lost.wire.is_cut = False
            while not lost.member.is_current:
                await asyncio.sleep(0.005)
            assert lost.digests == {"acme": entry("b").digest}

    run(work())


def test_a_replica_that_cannot_take_what_it_missed_never_answers(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            lost = made.nodes["r2"]
            cut(lost)
            await made.ledger.put("acme", entry("b"))
            lost.loader.missing.add("folder-b")
            lost.wire.is_cut = False
            await asyncio.sleep(3 * LEASE_S)
            assert not lost.member.is_current
            await made.ledger.put("acme", entry("d"))  # and it holds up no other change
            assert made.nodes["r1"].digests["acme"] == entry("d").digest

    run(work())


def test_without_a_ledger_nothing_is_answered_when_the_lease_ends(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            node = made.nodes["r1"]
            assert node.member.is_current
            cut(node)
            await asyncio.sleep(1.5 * LEASE_S)
            assert node.backend.is_behind()
            node.wire.is_cut = False
            await until(lambda: not node.backend.is_behind())

    run(work())


def test_a_replica_that_starts_with_an_old_set_catches_up_first(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            await made.ledger.put("acme", entry("b"))
            late = await made.start("r2", active=FIRST)
            assert late.digests["acme"] == entry("b").digest

    run(work())


def test_a_replica_that_cannot_get_the_active_set_does_not_become_ready(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            await made.ledger.put("acme", entry("b"))
            late = made.make("r2", FIRST)
            late.loader.missing.add("folder-b")
            with pytest.raises(EngineStopped, match="r2 could not take the active profiles"):
                await late.member.start(timeout_s=0.5)
            assert not late.member.is_current
            assert "r2" not in {report.replica for report in made.ledger.serving}

    run(work())


def test_a_replica_that_starts_during_a_change_ends_with_the_new_set(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            made.nodes["r1"].engine.admit_s = 0.3
            change = asyncio.create_task(made.ledger.put("acme", entry("b")))
            await asyncio.sleep(0.1)
            await made.start("r2", active=FIRST)
            await change
            assert all_serve(made, "acme", "b")

    run(work())


def test_no_lease_runs_on_a_set_that_the_ledger_was_not_told_of(path: Path) -> None:
    """Else the ledger could go on to the next set without waiting for this replica."""

    async def work() -> None:
        async with fleet(path, "r1") as made:
            await made.ledger.put("acme", entry("b"))
            late = made.make("r2", FIRST)
            await late.member._ask(known=-1, wait_s=0.0)
            assert late.digests["acme"] == entry("b").digest
            assert not late.member.is_current
            await late.member._ask(known=-1, wait_s=0.0)
            assert late.member.is_current
            assert "r2" in {report.replica for report in made.ledger.serving}
            await late.member.stop()

    run(work())


def test_unloading_waits_for_requests_that_hold_it(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            node = made.nodes["r1"]
            with node.request("acme") as digest:
                assert await made.ledger.remove("acme") == digest
                assert all_serve(made, "acme", None)
                waiting = asyncio.create_task(made.ledger.until_free(digest))
                await until(lambda: made.ledger.num_held(digest) > 0)
                assert not waiting.done()
            await waiting
            assert digest in node.engine.dropped

    run(work())


def test_unloading_what_is_not_there_is_unknown(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            with pytest.raises(UnknownProfile):
                await made.ledger.remove("nothing")
            assert made.ledger.active == FIRST

    run(work())


def test_what_could_not_be_recorded_is_not_activated(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            path.unlink()
            path.mkdir()
            (path / "in the way").write_text("")
            with pytest.raises(ProfileError, match="cannot record"):
                await made.ledger.put("acme", entry("b"))
            assert all_serve(made, "acme", "a")
            assert made.ledger.active == FIRST

    run(work())


def test_nothing_is_activated_that_no_replica_has_verified(path: Path) -> None:
    async def work() -> None:
        async with fleet(path) as made:
            with pytest.raises(EngineStopped, match="no replica is up"):
                await made.ledger.put("acme", entry("b"))

    run(work())


def test_a_new_ledger_waits_until_leases_of_the_last_one_have_ended(path: Path) -> None:
    """A replica that has not found it yet could serve what it knows meanwhile."""

    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            lost = made.nodes["r2"]
            stored = read_set(path)
            assert stored is not None
            second = Ledger(stored, path=path, lease_s=LEASE_S, prepare_s=5)
            made.nodes["r1"].wire.ledger = second
            await second.put("acme", entry("b"))
            assert made.nodes["r1"].digests["acme"] == entry("b").digest
            lost.wire.is_cut = True
            assert MARGIN > 1

    run(work())


def test_draining_reaches_every_replica_and_counts_what_runs(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            with made.nodes["r2"].backend.in_flight.admitted():
                assert await made.ledger.drain(wait_s=0.5) == 1
            assert all(node.backend.is_draining for node in made.nodes.values())
            assert await made.ledger.drain(wait_s=5) == 0
            late = await made.start("r3")
            assert late.backend.is_draining

    run(work())


def test_changes_at_once_are_made_one_after_another(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            await asyncio.gather(*(made.ledger.put("acme", entry(digit)) for digit in "bdef"))
            assert len({node.digests["acme"] for node in made.nodes.values()}) == 1
            assert made.ledger.active.number == FIRST.number + 4

    run(work())


def test_an_operator_who_leaves_midway_leaves_nothing_half_done(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1", "r2") as made:
            made.nodes["r1"].engine.admit_s = 1.0
            change = asyncio.create_task(made.ledger.put("acme", entry("b")))
            await asyncio.sleep(0.2)
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)
            assert all_serve(made, "acme", "a")
            made.nodes["r1"].engine.admit_s = 0
            await made.ledger.put("acme", entry("d"))
            assert all_serve(made, "acme", "d")

    run(work())


def test_a_number_is_never_used_twice(path: Path) -> None:
    async def work() -> None:
        async with fleet(path, "r1") as made:
            made.nodes["r1"].engine.error = ProfileError("no")
            with pytest.raises(ProfileError):
                await made.ledger.put("acme", entry("b"))
            made.nodes["r1"].engine.error = None
            await made.ledger.put("acme", entry("b"))
            assert made.ledger.active == ActiveSet(number=3, entries={**FIRST.entries, "acme": entry("b")})

    run(work())
