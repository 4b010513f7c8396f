"""A Docker engine that nobody else sees: its own network, mounts, processes and storage. Used by try_in_root, in those
namespaces; knows nothing of what is run on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

WHEELS_PORT = 8900
START_TIMEOUT_S = 60.0
PATH = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OPEN_FILES = 20_000
# Root folder -> the images that it stands in for, and what they are set to.
STAND_INS = {
    "python": {"python:3.11-slim-bookworm": [PATH]},
    "services": {
        "prom/prometheus:v3.5.0": [PATH, "USER 65534", 'ENTRYPOINT ["prometheus"]'],
        "nginxinc/nginx-unprivileged:1.28-alpine": [PATH, "USER 101"],
    },
}
# Beside the compose file: the build reaches the wheels on this engine's loopback, and there is no Grafana to run.
OVERRIDE = {
    "services": {
        "server": {"build": {"network": "host"}},
        "grafana": {"profiles": ["not here"]},
    }
}


@contextmanager
def running(work: Path, *, compose: Path) -> Iterator[dict[str, str]]:
    """The environment in which `docker` and `docker compose` mean this engine, and pip the wheels in `work`."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    wheels = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(work / "wheels")]
    with (
        (work / "engine.log").open("w") as log,
        subprocess.Popen([*wheels, str(WHEELS_PORT)], stdout=log, stderr=log) as server,
        subprocess.Popen(_engine(work), stdout=log, stderr=log) as engine,
    ):
        try:
            environment = _environment(work, compose)
            _wait(environment, engine)
            yield environment
        finally:
            engine.terminate()
            server.terminate()


def import_images(work: Path, environment: Mapping[str, str]) -> None:
    """Those that compose would download, from the roots; kept in the storage for the next time."""
    for root, images in STAND_INS.items():
        for image, changes in images.items():
            if subprocess.run(
                ["docker", "image", "inspect", image], env=environment, capture_output=True
            ).returncode:
                print(f"+ {image}: from {root}", flush=True)
                options = [f"--change={change}" for change in changes]
                with subprocess.Popen(
                    ["tar", "-C", str(work / root), "-c", "."], stdout=subprocess.PIPE
                ) as packed:
                    subprocess.run(
                        ["docker", "import", *options, "-", image],
                        stdin=packed.stdout,
                        env=environment,
                        check=True,
                        capture_output=True,
                    )


def _engine(work: Path) -> list[str]:
    return [
        "dockerd",
        f"--data-root={work / 'storage'}",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        "--host=unix:///run/docker.sock",
        f"--default-ulimit=nofile={OPEN_FILES}:{OPEN_FILES}",
    ]


def _environment(work: Path, compose: Path) -> dict[str, str]:
    plugins = work / "config" / "cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    plugin = plugins / "docker-compose"
    plugin.unlink(missing_ok=True)
    plugin.symlink_to(compose)
    override = work / "override.json"
    override.write_text(json.dumps(OVERRIDE))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "DOCKER_", "COMPOSE_"))
    }
    return kept | {
        "DOCKER_HOST": "unix:///run/docker.sock",
        "DOCKER_CONFIG": str(work / "config"),
        "DOCKER_BUILDKIT": "0",  # its builder is a plugin that Debian 12 does not have
        "COMPOSE_FILE": f"docker-compose.yml:{override}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": f"http://127.0.0.1:{WHEELS_PORT}/",
    }


def _wait(environment: Mapping[str, str], engine: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False).returncode:
        if engine.poll() is not None or time.monotonic() > until:
            raise SystemExit("the engine did not start: see engine.log")
        time.sleep(0.5)
