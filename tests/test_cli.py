"""The command line's own work: finding a command, errors as one line, exit statuses."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from uld_serve import __version__, cli
from uld_serve.errors import UldError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"uld-serve {__version__}\n"


def test_help_lists_every_command_without_importing_torch() -> None:
    code = "import sys; from uld_serve.cli import main; main([]); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in cli.COMMANDS:
        assert f"    {name} " in result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: uld-serve {name}")


def _fake_command(error: BaseException | None) -> ModuleType:
    def run(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        return 7

    module = ModuleType("fake")
    module.add_parser = lambda subparsers: subparsers.add_parser("model")
    module.run = run
    return module


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 7, ""),
        (UldError("the anvil is missing; order one"), 2, "uld-serve: the anvil is missing; order one\n"),
        (KeyboardInterrupt(), 130, "uld-serve: interrupted\n"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    status: int,
    line: str,
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda path: _fake_command(error))
    assert cli.main(["model"]) == status
    assert capsys.readouterr().err == line


def test_our_own_bugs_are_not_dressed_up_as_users_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda path: _fake_command(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["model"])


def test_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["forgte"])
    assert caught.value.code == 2
    assert "forgte" in capsys.readouterr().err


def test_empty_profiles_directory_lists_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profiles", "list", "--profiles", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"profiles": []}
