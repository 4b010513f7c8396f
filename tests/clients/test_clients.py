"""Clients that others wrote, unchanged, against the real server on the tiny base. Each runs in its own process, in an
environment of its own that `make clients-test` sets up: what they depend on is none of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_server import BASE, RealServer, real_server
from tiny_base import Tiny

from uld_serve.engine.engine import Engine

HERE = Path(__file__).parent
CLIENTS = Path(os.environ.get("ULD_CLIENTS", HERE.parent.parent / ".venv" / "clients")).resolve()
PROFILE = "late-fork"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real(
    tiny: Tiny, make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    with real_server(tiny, make_engine(), tmp_path_factory.mktemp("audit") / "audit.jsonl") as server:
        yield server


def run(server: RealServer, command: list[str]) -> None:
    """The program says "ok", and the audit log that it was answered under the profile, by the sampler's receipt."""
    before = len(server.recorded())
    # No client may wait for a host that is not ours, and none may see this machine's keys.
    environment = {"PATH": os.environ["PATH"], "HOME": str(CLIENTS), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    result = subprocess.run(
        [*command, server.live.url, BASE, PROFILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split()[-1] == "ok"
    ended = [line for line in server.recorded()[before:] if line["event"] == "ended"]
    assert any(str(line["forget"]).startswith(f"{PROFILE}@") and line["outcome"] == "ok" for line in ended)


@pytest.mark.parametrize(
    ("package", "program"),
    [("langchain-openai", "use_langchain.py"), ("litellm", "use_litellm.py"), ("llm", "use_llm.py")],
)
def test_python_client_works_unchanged(real: RealServer, package: str, program: str) -> None:
    python = CLIENTS / package / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{package} is not installed; run: make clients-test")
    run(real, [str(python), str(HERE / program)])


def test_javascript_client_works_unchanged(real: RealServer) -> None:
    node, modules = shutil.which("node"), CLIENTS / "js"
    if node is None:
        pytest.skip("node is not installed")
    if not (modules / "node_modules" / "openai").exists():
        pytest.skip("the JavaScript client is not installed; run: make clients-test")
    run(real, [node, str(HERE / "use_openai.mjs"), str(modules)])
