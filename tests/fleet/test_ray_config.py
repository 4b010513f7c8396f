"""Serve's config files by Ray's own schema, and the application that they build. Needs Ray, and no cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
