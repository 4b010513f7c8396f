"""A replica on the tiny base: exactly the active versions, or it does not start. No Ray."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Coroutine
from pathlib import Path

import pytest
from tiny_base import Tiny

from uld_serve.errors import InvalidRequest, NotFound, ProfileError, ProfileMismatch, UldError
from uld_serve.fleet.active_set import ActiveSet, Entry, first_set
from uld_serve.fleet.forwarded import Forwarded
from uld_serve.fleet.ledger import Ledger
from uld_serve.fleet.replica import FleetPlan, Replica
from uld_serve.fleet.settings import FleetSettings
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.keys import KeyRing
from uld_serve.server.settings import KeySettings, ServerSettings

NAME = "late-fork"


@pytest.fixture
def root(tiny: Tiny, tmp_path: Path) -> Path:
    shutil.copytree(tiny.profiles[NAME][0], tmp_path / "profiles" / NAME)
    shutil.copytree(tiny.profiles["pair"][0], tmp_path / "profiles" / "pair")
    return tmp_path / "profiles"


@pytest.fixture
def plan(tiny: Tiny, root: Path, tmp_path: Path) -> FleetPlan:
    settings = ServerSettings(
        model=str(tiny.folder),
        profiles=[root],
        dtype="float32",
        kv_cache_bytes=2**24,
        audit_log=tmp_path / "audit.jsonl",
    )
    fleet = FleetSettings(active_file=tmp_path / "active.json", start_s=5.0)
    return FleetPlan(settings, KeyRing(), fleet, made_s=0.0)


async def started(plan: FleetPlan, active: ActiveSet, name: str = "r1") -> Replica:
    replica = Replica(plan, name, Ledger(active, path=plan.fleet.active_file, lease_s=10, prepare_s=5))
    try:
        await replica.start()
    except BaseException:
        await replica.stop()
        raise
    return replica


async def asked(
    replica: Replica, path: str, body: dict[str, object] | None = None
) -> tuple[int, dict[str, object]]:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
    }
    messages = [
        m async for batch in replica.answer(Forwarded(scope, json.dumps(body).encode())) for m in batch
    ]
    return messages[0]["status"], json.loads(b"".join(m.get("body", b"") for m in messages))


def run(work: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_a_replica_serves_the_active_versions_and_no_others(plan: FleetPlan, root: Path, tiny: Tiny) -> None:
    everything = first_set([root])
    active = ActiveSet(number=4, entries={NAME: everything.entries[NAME]})

    async def work() -> None:
        replica = await started(plan, active)
        try:
            await replica.check()
            _, listed = await asked(replica, "/v1/forget_profiles")
            assert [one["name"] for one in listed["data"]] == [NAME]
            ask = {"model": f"{tiny.folder.name}:{NAME}", "prompt": "Hello", "max_tokens": 4}
            status, answer = await asked(replica, "/v1/completions", ask)
            assert (status, answer["forget"]["profiles"][0]["digest"]) == (200, active.entries[NAME].digest)
        finally:
            await replica.stop()

    run(work())


def _other_digest(root: Path) -> ActiveSet:
    entry = first_set([root]).entries[NAME]
    return ActiveSet(number=1, entries={NAME: entry.model_copy(update={"digest": "sha256:" + "0" * 64})})


def _no_folder(root: Path) -> ActiveSet:
    entry = first_set([root]).entries[NAME]
    return ActiveSet(number=1, entries={NAME: entry.model_copy(update={"directory": "gone"})})


def _other_name(root: Path) -> ActiveSet:
    return ActiveSet(number=1, entries={"renamed": first_set([root]).entries[NAME]})


@pytest.mark.parametrize(
    ("active", "error"),
    [(_other_digest, ProfileMismatch), (_no_folder, NotFound), (_other_name, ProfileMismatch)],
)
def test_a_replica_that_lacks_what_is_active_does_not_start(
    plan: FleetPlan, root: Path, active: object, error: type[UldError]
) -> None:
    wanted = active(root)

    async def work() -> None:
        with pytest.raises(error):
            await started(plan, wanted)

    run(work())


def test_changed_bytes_in_an_active_folder_keep_a_replica_from_starting(plan: FleetPlan, root: Path) -> None:
    active = first_set([root])
    path = root / NAME / "profile.json"
    path.chmod(0o600)
    path.write_text(path.read_text().replace("rkld", "dpo"))

    async def work() -> None:
        with pytest.raises(ProfileError):
            await started(plan, active)

    run(work())


def test_a_fleet_has_no_place_for_what_is_for_one_server(plan: FleetPlan, tmp_path: Path) -> None:
    for change in ({"fine_tuning": FineTuningSettings(folder=tmp_path / "jobs")}, {"tensor_parallel": 2}):
        settings = plan.settings.model_copy(update=change)
        with pytest.raises(InvalidRequest, match="for one server"):
            FleetPlan(settings, plan.keys, plan.fleet, plan.made_s)


def test_a_key_whose_profile_is_not_active_keeps_a_replica_from_starting(plan: FleetPlan, root: Path) -> None:
    key = KeySettings(name="bound", sha256="0" * 64, mandatory=["pair"])
    settings = plan.settings.model_copy(update={"keys": [key]})
    bound = FleetPlan(settings, plan.keys, plan.fleet, plan.made_s)
    active = ActiveSet(number=1, entries={NAME: first_set([root]).entries[NAME]})

    async def work() -> None:
        with pytest.raises(ProfileError, match="pair"):
            await started(bound, active)

    run(work())


def test_a_replica_that_drains_is_healthy_and_one_that_is_behind_is_not(plan: FleetPlan, root: Path) -> None:
    async def work() -> None:
        replica = await started(plan, first_set([root]))
        try:
            backend = replica._backend
            assert backend is not None
            backend.is_draining = True
            assert (await asked(replica, "/ready"))[0] == 503
            await replica.check()
            backend.is_draining = False
            backend.is_behind = lambda: True
            assert (await asked(replica, "/ready"))[0] == 503
            ask = {"model": "tiny-llama", "prompt": "Hello", "max_tokens": 4}
            status, answer = await asked(replica, "/v1/completions", ask)
            assert (status, answer["error"]["code"]) == (503, "engine_stopped")
            with pytest.raises(UldError, match="/ready of replica r1 answers 503"):
                await replica.check()
        finally:
            await replica.stop()

    run(work())


def test_every_replica_has_an_audit_log_of_its_own(plan: FleetPlan, root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        for name in ("r1", "r2"):
            replica = await started(plan, first_set([root]), name)
            await asked(replica, "/v1/completions", {"model": "tiny-llama", "prompt": "Hi", "max_tokens": 1})
            await replica.stop()

    run(work())
    lines = {one.name: one.read_text().count('"admitted"') for one in tmp_path.glob("audit.*")}
    assert lines == {"audit.r1.jsonl": 1, "audit.r2.jsonl": 1}


def test_an_entry_says_no_more_than_it_must() -> None:
    assert set(Entry.model_fields) == {"digest", "directory"}
