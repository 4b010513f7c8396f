"""The compose files, as far as they can be checked without a container engine; `make deploy-test` starts them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from uld_serve.server.policy import KeyPolicy
from uld_serve.server.settings import KeySettings, ServerSettings

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
SERVICES = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text("utf-8"))["services"]
SECTION = re.compile(r"^## First start\n(.*?)^## ", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server() -> dict[str, object]:
    return SERVICES["server"]


@pytest.fixture(scope="module")
def settings() -> ServerSettings:
    return ServerSettings.model_validate(tomllib.loads((DEPLOY / "server.toml").read_text("utf-8")))


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_file_follows_the_compose_specification(name: str) -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    command = [sys.executable, "-m", "check_jsonschema", *schema, str(DEPLOY / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_only(name: str) -> None:
    assert {port.rsplit(":", 2)[0] for port in SERVICES[name].get("ports", [])} <= {"127.0.0.1"}


def test_every_service_that_runs_is_watched_or_waits_for_one() -> None:
    running = {name: one for name, one in SERVICES.items() if one["restart"] != "no"}
    assert {name for name, one in running.items() if "healthcheck" not in one} == {"proxy"}
    assert running["proxy"]["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_health_command_fails_when_nobody_answers(server: dict[str, object]) -> None:
    code = server["healthcheck"]["test"][-1]
    assert "http://127.0.0.1:8000/ready" in code
    command = [sys.executable, "-c", code.replace(":8000", ":9")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_no_key_or_password_is_written_anywhere() -> None:
    for name in ("docker-compose.yml", "docker-compose.gpu.yml", "server.toml"):
        text = (DEPLOY / name).read_text("utf-8")
        assert re.search(r'^sha256 = "[0-9a-f]', text, re.MULTILINE) is None
        assert re.search(r"(?i)(password|key): ['\"]?[a-z0-9]{8}", text) is None
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert "/deploy/secrets/" in ignored


def test_what_is_mounted_exists_and_is_read_only() -> None:
    for service in SERVICES.values():
        for source, target, *mode in (volume.split(":") for volume in service.get("volumes", [])):
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert mode == ["ro"], target


def test_settings_name_what_is_mounted(server: dict[str, object], settings: ServerSettings) -> None:
    targets = {volume.split(":")[1]: volume.split(":") for volume in server["volumes"]}
    config = Path(server["command"][-1])
    assert targets[str(config)][0] == "./server.toml"
    assert targets["/profiles"][0] == "./profiles"
    assert Path("/profiles") in (settings.profiles or [])
    assert str((config.parent / settings.keys_file).parent) in targets
    assert settings.host == "0.0.0.0"


def test_server_cannot_write_keys_and_the_keys_command_can(server: dict[str, object]) -> None:
    assert "keys:/etc/uld-serve/keys:ro" in server["volumes"]
    assert "keys:/etc/uld-serve/keys" in SERVICES["keys"]["volumes"]
    assert SERVICES["keys"]["network_mode"] == "none"


def test_grace_is_longer_than_the_servers_own(server: dict[str, object], settings: ServerSettings) -> None:
    assert int(server["stop_grace_period"].removesuffix("s")) > settings.limits.grace_s


def test_prometheus_reads_the_admin_listener_with_a_key_of_its_own(settings: ServerSettings) -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{settings.admin.port}"]}]
    assert job["authorization"] == {"credentials_file": "/run/secrets/metrics-key"}
    assert SERVICES["prometheus"]["secrets"] == ["metrics-key"]
    shared = set(SERVICES["prometheus"]["networks"]) & set(SERVICES["server"]["networks"])
    assert shared


def test_keys_of_the_first_start_are_keys_that_the_server_takes() -> None:
    readme = SECTION.search((DEPLOY / "README.md").read_text("utf-8"))
    assert readme is not None
    made = re.findall(r"keys new (\S+) (.*) > secrets/(\S+)-key", readme[1])
    assert [(name, options) for name, options, _ in made] == [
        ("prometheus", "--metrics --allowed"),
        ("ops", "--admin --allowed"),
        ("team-a", "--base"),
    ]
    secret = {"sha256": "0" * 64}
    prometheus = KeySettings(name="prometheus", metrics=True, allowed=[], **secret).policy
    assert prometheus.may_read_metrics
    assert not prometheus.is_admin
    assert isinstance(KeySettings(name="ops", admin=True, allowed=[], **secret).policy, KeyPolicy)


def test_proxy_holds_nothing_back_and_knows_one_listener(settings: ServerSettings) -> None:
    text = (DEPLOY / "nginx" / "nginx.conf").read_text("utf-8")
    assert "proxy_buffering off;" in text
    assert "client_max_body_size 1m;" in text
    assert settings.limits.body_bytes == 2**20
    assert re.findall(r"^\s*server (\S+);", text, re.MULTILINE) == [f"server:{settings.port}"]


def test_workflow_follows_its_schema_and_pins_every_action() -> None:
    path = ROOT / ".github" / "workflows" / "ci.yml"
    schema = ["--builtin-schema", "vendor.github-workflows"]
    result = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    used = re.findall(r"uses: \S+@(\S+)", path.read_text("utf-8"))
    assert used
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in used)
