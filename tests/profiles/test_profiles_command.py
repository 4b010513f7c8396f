"""`uld-serve profiles list` and `show`, and the copy that verify scores without a filter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from uld_serve.cli import main
from uld_serve.evaluation.unfiltered import UNFILTERED, unfiltered_copy
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.store import read_profile

Maker = Callable[..., tuple[Path, ProfileVersion]]


def test_list_shows_each_profile(make_profile: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    directory, version = make_profile()
    assert main(["profiles", "list", "--profiles", str(directory.parent)]) == 0
    out = capsys.readouterr().out
    for word in ("acme", version.digest12, "rkld", "relu_difference", "2-4 borrowed", "tiny"):
        assert word in out


def test_show_tells_all_as_json(make_profile: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    directory, version = make_profile()
    assert main(["profiles", "show", "acme", "--profiles", str(directory), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["digest"] == version.digest
    assert shown["adapters"]["assistant"]["layers"] == [2, 3]
    assert shown["probes"] == {"keywords": 2, "forget": 1, "retain": 1, "replay": 1}
    assert shown["training"] == {"seed": 1}


def test_unknown_name_is_one_line_and_exit_2(make_profile: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    directory, _ = make_profile()
    assert main(["profiles", "show", "acne", "--profiles", str(directory.parent)]) == 2
    assert "no profile 'acne'" in capsys.readouterr().err


def test_damaged_profile_is_one_line_and_exit_2(
    make_profile: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = make_profile()
    (directory / "probes.json").unlink()
    assert main(["profiles", "list", "--profiles", str(directory.parent)]) == 2
    assert "probes.json is missing" in capsys.readouterr().err


def test_unfiltered_copy_differs_by_name_filter_and_replay_only(make_profile: Maker) -> None:
    directory, version = make_profile()
    with unfiltered_copy(directory, version) as copy:
        assert copy is not None
        other = read_profile(copy)
        assert other.name == UNFILTERED
        assert other.profile.rule.filter.mode == "none"
        assert (
            other.profile.model_copy(update={"name": "acme", "rule": version.profile.rule}) == version.profile
        )
        assert other.probes.replay == ()
        assert other.probes.forget == version.probes.forget
    assert not copy.exists()
