"""A fleet's settings refuse what could not work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from pydantic import ValidationError

from uld_serve import cli
from uld_serve.errors import InvalidRequest
from uld_serve.fleet import command
from uld_serve.fleet.settings import FleetSettings


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["ray", "--active", "active.json", *arguments])


def test_replicas_are_as_many_as_asked_for() -> None:
    fleet = command.fleet_of(parsed("--min-replicas", "3"))
    assert (fleet.min_replicas, fleet.max_replicas) == (3, 3)
    assert fleet.active_file.is_absolute()


def test_every_option_reaches_its_setting() -> None:
    numbers = [name for name in command.OPTIONS if name != "routing"]
    values = {name: str(number) for number, name in enumerate(numbers, start=7)}
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    fleet = command.fleet_of(parsed(*flags, "--routing", "load"))
    assert fleet.routing == "load"
    assert {name: float(getattr(fleet, name)) for name in values} == {n: float(v) for n, v in values.items()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_replicas": 3, "max_replicas": 2},
        {"lease_s": 3.0, "poll_s": 1.5},
        {"min_replicas": 0},
        {"max_queued_requests": -1},
        {"misspelt": 1},
        {"routing": "random"},
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FleetSettings(active_file=Path("active.json"), **wrong)


def test_a_wrong_option_is_a_users_error() -> None:
    with pytest.raises(InvalidRequest, match="min_replicas is above max_replicas"):
        command.fleet_of(parsed("--min-replicas", "3", "--max-replicas", "2"))


def test_a_doors_own_limit_is_never_the_one_that_refuses() -> None:
    fleet = FleetSettings(
        active_file=Path("a"), max_replicas=4, max_ongoing_requests=10, max_queued_requests=50
    )
    assert fleet.door_ongoing_requests > 4 * 10 + 50


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    for name in ("ray_app", "ray_service", "ray_ledger"):
        monkeypatch.delitem(__import__("sys").modules, f"uld_serve.fleet.{name}", raising=False)
    assert cli.main(["ray", "--active", str(tmp_path / "active.json")]) == 2
    assert "pip install 'uld-serve[ray]'" in capsys.readouterr().err
