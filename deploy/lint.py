"""`make deploy-lint`: what others check these files with. hadolint, Docker Compose's own reader on every combination
of the files, and Grafana's model of a dashboard. Runs in the tools' environment."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

HERE = Path(__file__).resolve().parent
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"
# The program itself: the script that the package installs loses its exit status.
COMPOSE = Path(sysconfig.get_path("purelib")) / "compose" / "docker-compose"
GPU = ("-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml")
COMBINATIONS = ((), ("--profile", "proxy", "--profile", "tools"), GPU, (*GPU, "--profile", "tools"))


def main() -> int:
    commands = [[str(HADOLINT), str(HERE.parent / "Dockerfile")]]
    commands += [[str(COMPOSE), *options, "config", "--quiet"] for options in COMBINATIONS]
    wrong = [command for command in commands if subprocess.run(command, cwd=HERE).returncode]
    for command in wrong:
        print("failed:", *command, file=sys.stderr)
    unknown = [
        f"{path.name}: {field}"
        for path in (HERE / "grafana" / "dashboards").glob("*.json")
        for field in lost(path)
    ]
    for field in unknown:
        print("Grafana does not know, or reads otherwise:", field, file=sys.stderr)
    print(f"{len(commands) - len(wrong)} of {len(commands)} commands, {len(unknown)} unknown fields")
    return 1 if wrong or unknown else 0


def lost(path: Path) -> Iterator[str]:
    """What Grafana's model of a dashboard does not give back as it was."""
    plugins.register_default_plugins()
    written = json.loads(path.read_text("utf-8"))
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    yield from differences(written, read, at="")


def differences(written: object, read: object, *, at: str) -> Iterator[str]:
    """Paths below which `read` lacks what `written` has, or has something else; it may have more."""
    if isinstance(written, dict) and isinstance(read, dict):
        for name, value in written.items():
            if name not in read:
                yield f"{at}.{name}"
            else:
                yield from differences(value, read[name], at=f"{at}.{name}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for i, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from differences(one, other, at=f"{at}[{i}]")
    elif written != read:
        yield at


if __name__ == "__main__":
    sys.exit(main())
