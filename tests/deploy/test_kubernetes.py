"""The Kubernetes manifests and Serve's config file: by their schemas, and by what they must not allow.

KubeRay's own resource has no schema here. Its pods are validated as Kubernetes' pods, its serveConfigV2 as our settings
(and by Ray's schema in tests/fleet/test_ray_config.py)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from uld_serve.fleet.settings import FleetSettings
from uld_serve.server.settings import ServerSettings

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
PLAIN, RAY = DEPLOY / "kubernetes" / "uld-serve.yaml", DEPLOY / "kubernetes" / "rayservice.yaml"
SERVE = DEPLOY / "ray" / "serve.yaml"
VERSIONS = ("1.31", "1.37")  # ReadWriteOncePod and what else is used here are older

Object = Mapping[str, Any]


def objects(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(path: Path, kind: str) -> Object:
    (found,) = [one for one in objects(path) if one["kind"] == kind]
    return found


def pods(path: Path) -> Iterator[tuple[str, Object]]:
    """Every pod template, and whose it is."""
    if path == PLAIN:
        yield "deployment", of_kind(PLAIN, "Deployment")["spec"]["template"]
        return
    cluster = of_kind(RAY, "RayService")["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


PODS = [pytest.param(pod, id=name) for path in (PLAIN, RAY) for name, pod in pods(path)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", [PLAIN, RAY], ids=lambda path: path.stem)
def test_every_object_of_kubernetes_is_valid(path: Path, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    checked = [one["kind"] for one in objects(path) if one["apiVersion"] != "ray.io/v1"]
    for one in objects(path):
        if one["kind"] in checked:
            validator.validate(one, version, strict=True)
    assert {"ConfigMap", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy"} <= set(checked)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("pod", PODS)
def test_every_pod_is_valid(pod: Object, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    made = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": pod}
    validator.validate(made, version, strict=True)


def test_a_misspelt_field_is_noticed() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    wrong = dict(of_kind(PLAIN, "PodDisruptionBudget"))
    wrong["spec"] = {**wrong["spec"], "minAvailible": 1}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_has_no_rights(pod: Object) -> None:
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for container in spec["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"limits", "requests"} <= container["resources"].keys()


@pytest.mark.parametrize("pod", PODS)
def test_profiles_keys_and_settings_are_read_only(pod: Object) -> None:
    (container,) = pod["spec"]["containers"]
    mounts = {one["mountPath"]: one.get("readOnly", False) for one in container["volumeMounts"]}
    assert mounts["/profiles"]
    assert mounts["/etc/uld-serve"]
    assert mounts["/etc/uld-serve-keys"]
    assert {one["name"] for one in container["volumeMounts"]} == {
        one["name"] for one in pod["spec"]["volumes"]
    }


@pytest.mark.parametrize("path", [PLAIN, RAY], ids=lambda path: path.stem)
def test_settings_are_the_servers_and_let_nobody_in_without_a_key(path: Path) -> None:
    settings = ServerSettings.model_validate(tomllib.loads(of_kind(path, "ConfigMap")["data"]["server.toml"]))
    assert settings.keys_file == Path("/etc/uld-serve-keys/keys.toml")
    assert settings.audit_log is not None
    assert settings.admin.port == 8001


@pytest.mark.parametrize("path", [PLAIN, RAY], ids=lambda path: path.stem)
def test_only_operators_and_monitoring_reach_the_admin_port(path: Path) -> None:
    rules = of_kind(path, "NetworkPolicy")["spec"]["ingress"]
    (admin,) = [rule for rule in rules if {"port": "admin", "protocol": "TCP"} in rule.get("ports", ())]
    assert len(admin["ports"]) == 1
    assert all(one.get("namespaceSelector", {"matchLabels": 1}).get("matchLabels") for one in admin["from"])
    assert all("from" in rule for rule in rules)


def test_probes_ask_for_readiness_and_life() -> None:
    (container,) = of_kind(PLAIN, "Deployment")["spec"]["template"]["spec"]["containers"]
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    grace_s = ServerSettings().limits.grace_s
    assert of_kind(PLAIN, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > grace_s


@pytest.mark.parametrize("path", [PLAIN, RAY], ids=lambda path: path.stem)
def test_selectors_find_the_pods(path: Path) -> None:
    for _, pod in pods(path):
        for kind in ("NetworkPolicy", "PodDisruptionBudget"):
            spec = of_kind(path, kind)["spec"]
            wanted = (spec.get("selector") or spec["podSelector"])["matchLabels"]
            assert wanted.items() <= pod["metadata"]["labels"].items()


def configs() -> Iterator[Object]:
    yield yaml.safe_load(SERVE.read_text())
    yield yaml.safe_load(of_kind(RAY, "RayService")["spec"]["serveConfigV2"])


@pytest.mark.parametrize("config", list(configs()), ids=["serve.yaml", "rayservice.yaml"])
def test_serve_configs_start_our_application_with_settings_that_hold(config: Object) -> None:
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    source = Path(__file__).parent.parent.parent / (module.replace(".", "/") + ".py")
    assert f"def {name}(" in source.read_text()
    fleet = FleetSettings.model_validate(application["args"])
    assert fleet.max_replicas >= fleet.min_replicas >= 2


def test_serve_yaml_names_every_choice_of_a_fleet() -> None:
    (application,) = yaml.safe_load(SERVE.read_text())["applications"]
    hidden = {"prepare_s", "start_s"}
    assert set(application["args"]) == set(FleetSettings.model_fields) - hidden
    defaults = {
        "max_ongoing_requests",
        "prefix_chars",
        "slack",
        "lease_s",
        "poll_s",
        "routing",
        "retry_after_s",
    }
    fleet = FleetSettings.model_validate(application["args"])
    assert all(getattr(fleet, name) == FleetSettings.model_fields[name].default for name in defaults)


def test_settings_beside_serve_yaml_are_the_servers() -> None:
    settings = ServerSettings.model_validate(tomllib.loads((DEPLOY / "ray" / "server.toml").read_text()))
    assert settings.host == "127.0.0.1"
    assert settings.admin.host == "127.0.0.1"
