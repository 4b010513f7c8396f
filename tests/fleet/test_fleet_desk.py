"""The operators' routes over a fleet, through the same admin application as one server's. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from simulated import entry, fleet
from tiny_profile import PROBES, PROFILE, peft_config, peft_tensors, write_adapter

from uld_serve.fleet.active_set import ActiveSet, first_set
from uld_serve.fleet.fleet_desk import FleetDesk, merged
from uld_serve.profiles.store import write_profile
from uld_serve.server.admin import create_admin_app
from uld_serve.server.audit import AuditLog
from uld_serve.server.catalog import Access
from uld_serve.server.keys import KeyRing, sha256_of
from uld_serve.server.metrics import Metrics
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.telemetry import Telemetry

KEYS = {
    "key-admin": KeyPolicy(name="admin", allowed=frozenset(), is_admin=True, may_read_metrics=True),
    "key-bound": KeyPolicy(name="bound", mandatory=frozenset({"acme"})),
}
ADMIN = {"Authorization": "Bearer key-admin"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    adapter = write_adapter(tmp_path / "peft", peft_config(layers_to_transform=[2, 3]), peft_tensors())
    profile = PROFILE.model_copy(update={"name": "fresh"})
    write_profile(
        tmp_path / "profiles" / "fresh",
        profile,
        adapters={"adapter": adapter},
        probes=PROBES,
        training={"seed": 0},
    )
    return tmp_path / "profiles"


def operate(tmp_path: Path, root: Path, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """On a fleet of two that serves "acme" and "secret"."""

    async def run() -> None:
        async with fleet(tmp_path / "active.json", "r1", "r2") as made:
            fresh = first_set([root]).entries["fresh"]
            for node in made.nodes.values():  # their folders are made up: let them know the real one
                node.loader.known[fresh.directory] = fresh.digest
            telemetry = Telemetry(audit=AuditLog(tmp_path / "audit.ledger.jsonl"))
            desk = FleetDesk(made.ledger, lambda: [root], lambda: KEYS.values(), telemetry)
            keys = KeyRing({sha256_of(key.encode()): policy for key, policy in KEYS.items()})
            transport = httpx.ASGITransport(app=create_admin_app(Access(keys=keys), desk))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://admin", headers=ADMIN
            ) as client:
                await work(client)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_profile_is_loaded_listed_and_unloaded(tmp_path: Path, root: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        loaded = await client.post("/admin/forget_profiles/fresh/load", json={})
        digest = first_set([root]).entries["fresh"].digest
        assert (loaded.status_code, loaded.json()["digest"], loaded.json()["previous"]) == (200, digest, None)
        listed = (await client.get("/admin/forget_profiles")).json()["data"]
        assert [one["name"] for one in listed] == ["acme", "fresh", "secret"]
        gone = await client.delete("/admin/forget_profiles/fresh")
        assert (gone.status_code, gone.json()["previous"]) == (200, digest)

    operate(tmp_path, root, work)
    events = [
        json.loads(line)["event"] for line in (tmp_path / "audit.ledger.jsonl").read_text().splitlines()
    ]
    assert events == ["loading", "loaded", "unloading", "unloaded"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/forget_profiles/fresh/load", {"directory": "gone"}, 404),
        ("POST", "/admin/forget_profiles/fresh/load", {"digest": "sha256:" + "0" * 64}, 409),
        ("POST", "/admin/forget_profiles/other/load", {"directory": "fresh"}, 409),
        ("DELETE", "/admin/forget_profiles/nothing", None, 404),
        ("DELETE", "/admin/forget_profiles/acme", None, 409),
    ],
)
def test_what_cannot_be_done_is_refused_as_by_one_server(
    tmp_path: Path, root: Path, method: str, path: str, body: object, status: int
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.request(method, path, json=body)).status_code == status
        listed = (await client.get("/admin/forget_profiles")).json()["data"]
        assert {one["name"]: one["digest"] for one in listed} == {
            "acme": entry("a").digest,
            "secret": entry("c").digest,
        }

    operate(tmp_path, root, work)


def test_others_keys_may_not(tmp_path: Path, root: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        other = {"Authorization": "Bearer key-bound"}
        assert (await client.get("/admin/forget_profiles", headers=other)).status_code == 403
        assert (await client.get("/metrics", headers=other)).status_code == 403

    operate(tmp_path, root, work)


def test_draining_and_metrics_are_of_all(tmp_path: Path, root: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        drained = await client.post("/admin/drain", json={"wait_s": 1})
        assert drained.json() == {"is_draining": True, "num_running": 0}
        assert (await client.get("/metrics")).status_code == 200

    operate(tmp_path, root, work)


def test_series_of_replicas_stay_apart() -> None:
    texts = {}
    for replica, count in (("r1", 3), ("r2", 5)):
        metrics = Metrics()
        metrics.generation_tokens.inc(count)
        texts[replica] = metrics.text()
    families = {one.name: one for one in text_string_to_metric_families(merged(texts).decode())}
    samples = {
        sample.labels["replica"]: sample.value
        for sample in families["uld_generation_tokens"].samples
        if sample.name.endswith("_total")
    }
    assert samples == {"r1": 3, "r2": 5}
    assert merged(texts).count(b"# TYPE uld_generation_tokens_total") == 1


def test_no_replica_no_series() -> None:
    assert merged({}) == b""
    assert ActiveSet(number=1, entries={}).digests == frozenset()
