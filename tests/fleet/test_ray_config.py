"""What touches Ray, without a cluster: Serve's config files by Ray's own schema, the application that they build, the
router, and what the ledger's actor runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_base import Tiny

from uld_serve.errors import InvalidRequest
from uld_serve.server.keys import sha256_of

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def configs() -> list[object]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "rayservice.yaml").read_text())
    (service,) = [one for one in documents if one["kind"] == "RayService"]
    return [
        yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text()),
        yaml.safe_load(service["spec"]["serveConfigV2"]),
    ]


@pytest.mark.parametrize("config", configs(), ids=["serve.yaml", "rayservice.yaml"])
def test_config_is_what_serve_takes(config: object) -> None:
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "uld_serve.fleet.ray_app:build"


def args(tmp_path: Path, text: str) -> dict[str, object]:
    (tmp_path / "server.toml").write_text(text)
    return {
        "config": str(tmp_path / "server.toml"),
        "active_file": str(tmp_path / "active.json"),
        "max_replicas": 3,
    }


def test_build_gives_doors_over_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.build_app import build_app

    from uld_serve.fleet.ray_app import build

    key = f'[[keys]]\nname = "one"\nsha256 = "{sha256_of(b"k").hex()}"\nallow_base = true\n'
    built = build_app(build(args(tmp_path, key)), name="uld-serve")
    found = {one.name: one for one in built.deployments}
    assert set(found) == {"door", "replica"}
    assert built.ingress_deployment_name == "door"
    config = found["replica"]._deployment_config
    assert config.autoscaling_config.max_replicas == 3
    assert (config.max_ongoing_requests, config.max_queued_requests) == (32, 64)
    assert "AffinityRouter" in str(config.request_router_config.request_router_class)
    assert found["door"]._deployment_config.max_ongoing_requests > 3 * 32 + 64


@pytest.mark.parametrize(
    ("more", "says"),
    [({}, "needs keys"), ({"misspelt": 1}, "misspelt"), ({"active_file": None}, "active_file")],
)
def test_build_refuses_what_could_not_be_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, object], says: str
) -> None:
    from uld_serve.fleet.ray_app import build

    monkeypatch.delenv("ULD_SERVE_API_KEY", raising=False)
    with pytest.raises(InvalidRequest, match=says):
        build(args(tmp_path, "") | more)


def test_router_asks_for_affinity_and_looks_at_loads() -> None:
    import asyncio
    from types import SimpleNamespace

    from uld_serve.fleet.affinity import preference
    from uld_serve.fleet.router import AffinityRouter

    loads = {"a": 0, "b": 9, "c": 1}
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in loads]
    router = object.__new__(AffinityRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda one: loads[one.unique_id] or None)
    router.initialize_state(slack=4)
    request = SimpleNamespace(
        metadata=SimpleNamespace(session_id="key"), routing_context=SimpleNamespace(should_backoff=False)
    )
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    assert [rank[0].replica_id.unique_id for rank in ranks] == preference("key", loads, slack=4)
    assert ranks[-1][0].replica_id.unique_id == "b"
    assert request.routing_context.should_backoff


def test_rays_failures_have_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import BackPressureError

    from uld_serve.fleet.ray_app import DoorDeployment, plan_of
    from uld_serve.fleet.settings import FleetSettings
    from uld_serve.server.settings import ServerSettings

    monkeypatch.delenv("ULD_SERVE_API_KEY", raising=False)
    plan = plan_of(FleetSettings(active_file=tmp_path / "a.json", retry_after_s=7), ServerSettings())
    door = DoorDeployment(plan, None)
    full = door._error_of(BackPressureError(num_queued_requests=4, max_queued_requests=4))
    assert (full.status, full.retry_after_s) == (429, 7)
    assert door._error_of(ActorDiedError()).status == 503
    other = door._error_of(ValueError("secret words"))
    assert (other.status, "secret" in other.message) == (500, False)


def test_the_actor_keeps_one_ledger_and_opens_the_operators_listener(tmp_path: Path, tiny: Tiny) -> None:
    import asyncio
    import shutil
    from dataclasses import replace

    import httpx

    from uld_serve.fleet.ledger import Report
    from uld_serve.fleet.ray_app import plan_of
    from uld_serve.fleet.ray_ledger import LedgerHost
    from uld_serve.fleet.settings import FleetSettings
    from uld_serve.server.listener import bound_socket
    from uld_serve.server.settings import ServerSettings

    shutil.copytree(tiny.profiles["pair"][0], tmp_path / "profiles" / "pair")
    with bound_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    settings = ServerSettings(
        model=str(tiny.folder),
        profiles=[tmp_path / "profiles"],
        admin={"port": port},
        audit_log=tmp_path / "audit.jsonl",
    )
    plan = plan_of(FleetSettings(active_file=tmp_path / "active.json"), settings)

    async def work() -> None:
        host = LedgerHost(plan)
        await host.use(plan)
        orders = await host.poll(Report("r1"), -1, 0.0)
        assert set(orders.active.entries) == {"pair"}
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    listed = await client.get(f"http://127.0.0.1:{port}/admin/forget_profiles")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
        assert [one["name"] for one in listed.json()["data"]] == ["pair"]
        elsewhere = plan.fleet.model_copy(update={"active_file": tmp_path / "other.json"})
        with pytest.raises(InvalidRequest, match="one such file for all its life"):
            await host.use(replace(plan, fleet=elsewhere))
        await host.leave("r1")
        assert host._listening is not None
        host._listening.cancel()
        await asyncio.gather(host._listening, return_exceptions=True)

    asyncio.run(asyncio.wait_for(work(), 60))
    assert (tmp_path / "active.json").exists()
    again = LedgerHost(plan)
    assert set(again._ledger.active.entries) == {"pair"}
