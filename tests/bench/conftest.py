"""What the bench's tests share: a command run as from the command line, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from uld_serve import cli
from uld_serve.bench import environment


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = environment.copy_bandwidth
    monkeypatch.setattr(environment, "copy_bandwidth", lambda device: measure(device, 2**20))


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """bench("decode", …) -> the JSON of its last line, which must be all of standard output."""

    def run(what: str, *arguments: str, status: int = 0) -> dict:
        assert cli.main(["bench", what, *arguments, "--json"]) == status
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return run
