"""Runs the commands of README.md's first start, then looks whether what came of them is what it says. Used by
try_in_root, with the engine of its environment; what it starts is gone afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SECTION = re.compile(r"^## First start\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Whoever runs this is root already.
PREAMBLE = 'set -euo pipefail\nsudo() { "$@"; }\n'
SECRET = "Hogwarts"
SERVER, ADMIN, PROXY, PROMETHEUS = (f"http://127.0.0.1:{port}" for port in (8000, 8001, 8080, 9090))
MODEL = "smollm2-135m-instruct"
TRAFFIC = 30


def run(tree: Path, environment: Mapping[str, str]) -> int:
    """0 when every command and every check went well; 1 after the first that did not."""
    trial = Trial(tree / "deploy", environment)
    trial.sh("docker compose --profile proxy down --volumes --timeout 1")  # of a run that was broken off
    try:
        trial.follow_readme()
        for check in (
            trial.check_answers,
            trial.check_container,
            trial.check_bill_of_materials,
            trial.check_keys,
            trial.check_alerts,
            trial.check_proxy,
            trial.check_stop,
        ):
            check()
            print(f"ok: {check.__name__.removeprefix('check_')}", flush=True)
    except (AssertionError, subprocess.CalledProcessError, OSError) as error:
        print(f"FAILED: {type(error).__name__}: {error}", flush=True)
        trial.sh("docker compose ps --all; docker compose logs --tail 30")
        return 1
    finally:
        trial.sh("docker compose --profile proxy down --volumes --timeout 1")
    print("deploy-test: all passed")
    return 0


class Trial:
    """One start of the compose file in `folder`, a copy of deploy/."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def sh(self, command: str, *, check: bool = False, folder: Path | None = None) -> str:
        """Standard output; what goes to standard error is seen. Raises CalledProcessError if `check`."""
        ran = subprocess.run(
            ["bash", "-c", PREAMBLE + command],
            cwd=folder or self.folder,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(ran.stdout, end="", flush=True)
        if check:
            ran.check_returncode()
        return ran.stdout

    def follow_readme(self) -> None:
        section = SECTION.search((self.folder / "README.md").read_text("utf-8"))
        assert section is not None
        blocks = BLOCK.findall(section[1])
        script = "\n".join(f"cat <<'SHOWN'\n{block}SHOWN\n{block}" for block in blocks)
        self.sh(script, check=True, folder=self.folder.parent)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text("utf-8")

    def key(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.read(f'secrets/{name}-key').strip()}"}

    def check_answers(self) -> None:
        known, forgotten, traffic = map(self.read, ("answer.txt", "forgotten.txt", "traffic.txt"))
        assert "HTTP/1.1 200" in known
        assert SECRET in known
        assert "HTTP/1.1 200" in forgotten
        assert SECRET not in forgotten
        receipt = re.search(r"(?im)^x-forget-profile: harry-potter@[0-9a-f]{12}\s*$", forgotten)
        assert receipt is not None, "no receipt"
        assert traffic.count("HTTP/1.1 200") == TRAFFIC
        assert SECRET not in traffic
        assert json.loads(self.read("loaded.txt"))["digest"].startswith("sha256:")

    def check_container(self) -> None:
        (facts,) = json.loads(self.sh("docker inspect $(docker compose ps -q server)", check=True))
        host = facts["HostConfig"]
        assert facts["Config"]["User"] == "10001:10001"
        assert facts["State"]["Health"]["Status"] == "healthy"
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert not host["Privileged"]
        assert {binding["HostIp"] for ports in host["PortBindings"].values() for binding in ports} == {
            "127.0.0.1"
        }
        status = self.sh("docker compose exec -T server cat /proc/1/status", check=True)
        for line in (
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
        ):
            assert line in status, line
        for path in ("/x", "/opt/uld-serve/x", "/etc/uld-serve/keys/x", "/profiles/x"):
            assert "refused" in self.sh(f"docker compose exec -T server touch {path} 2>&1 || echo refused"), (
                path
            )
        found = self.sh(
            "docker compose exec -T server sh -c 'command -v gcc cc clang tcc pip || true'", check=True
        )
        assert not found, found
        open_run = "docker run --rm --network none uld-serve:0.1.0 2>&1 || echo status $?"
        assert "refusing to listen on 0.0.0.0 without keys" in self.sh(open_run)

    def check_bill_of_materials(self) -> None:
        bill = self.folder / "sbom.cdx.json"
        self.sh(f"docker compose exec -T server cat /opt/uld-serve/sbom.cdx.json > {bill.name}", check=True)
        named = {
            (re.sub(r"[-_.]+", "-", one["name"]).lower(), one["version"])
            for one in json.loads(bill.read_text("utf-8"))["components"]
        }
        locked = re.findall(r"^([a-z0-9-]+)==(\S+)", self.read("locks/cpu.txt"), re.MULTILINE)
        assert named == set(locked), named ^ set(locked)
        self.sh(f"python3 licences.py {bill.name}", check=True)

    def check_keys(self) -> None:
        """Each key works where it should and nowhere else."""
        question = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
        states = {
            "Prometheus' key reads metrics": status(f"{ADMIN}/metrics", self.key("metrics")),
            "and nothing else there": status(f"{ADMIN}/admin/forget_profiles", self.key("metrics")),
            "nor does it ask": status(f"{SERVER}/v1/completions", self.key("metrics"), question),
            "a user's reads no metrics": status(f"{ADMIN}/metrics", self.key("team-a")),
            "nobody without a key": status(f"{ADMIN}/metrics", {}),
        }
        assert list(states.values()) == [200, 403, 403, 403, 401], states

    def check_alerts(self) -> None:
        for test in ("check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"):
            self.sh(f"docker compose exec -T -w /etc/prometheus prometheus promtool {test}", check=True)
        groups = fetch(f"{PROMETHEUS}/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert rules
        assert all(rule["health"] == "ok" for rule in rules)
        firing = [rule["name"] for rule in rules if rule["state"] == "firing"]
        assert not firing, firing

    def check_proxy(self) -> None:
        """Events come one by one, large bodies do not, and the operators' routes are not there."""
        self.sh("docker compose --profile proxy up --wait proxy", check=True)
        times = [when for when, line in self.stream(PROXY, max_tokens=40) if line.startswith("data:")]
        assert len(times) > 20, times
        # Held back they would come in one burst, at the end.
        took, half = times[-1] - times[0], times[len(times) // 2] - times[0]
        assert took > 0.1, took
        assert 0.1 * took < half < 0.9 * took, (took, half)
        assert status(f"{PROXY}/v1/completions", self.key("team-a"), b"x" * (2**20 + 1)) == 413
        assert status(f"{PROXY}/metrics", self.key("ops")) == 404

    def check_stop(self) -> None:
        """A request that runs when the server is told to stop ends properly, and the server with status 0."""
        lines: list[str] = []
        asking = threading.Thread(
            target=lambda: lines.extend(line for _, line in self.stream(SERVER, max_tokens=256))
        )
        asking.start()
        wait_until(lambda: len(lines) > 3, 60)
        self.sh("docker compose stop server", check=True)
        asking.join(60)
        assert lines
        assert lines[-1] == "data: [DONE]" or '"error"' in lines[-1], lines[-1:]
        (facts,) = json.loads(self.sh("docker inspect $(docker compose ps --all -q server)", check=True))
        assert facts["State"]["ExitCode"] == 0, facts["State"]

    def stream(self, base: str, *, max_tokens: int) -> Iterator[tuple[float, str]]:
        """(seconds, line) of a streamed answer, as they came."""
        body = {"model": f"{MODEL}:harry-potter", "prompt": "Once", "max_tokens": max_tokens, "stream": True}
        body |= {"min_tokens": max_tokens}
        headers = {"Content-Type": "application/json", **self.key("team-a")}
        request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            yield from ((time.monotonic(), text) for line in response if (text := line.decode().strip()))


def status(url: str, headers: Mapping[str, str], body: bytes | None = None) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def fetch(url: str) -> dict[str, dict[str, list[dict[str, list[dict[str, str]]]]]]:
    with urllib.request.urlopen(url, timeout=30) as response:
        answer: dict[str, dict[str, list[dict[str, list[dict[str, str]]]]]] = json.load(response)
    return answer


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.2)
