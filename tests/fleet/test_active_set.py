"""The file that says which profiles are active: whole or absent, and never guessed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_profile import PROBES, PROFILE, peft_config, peft_tensors, write_adapter

from uld_serve.errors import ProfileError
from uld_serve.fleet.active_set import ActiveSet, Entry, first_set, read_set, same_directories, write_set
from uld_serve.profiles.store import write_profile

SET = ActiveSet(number=3, entries={"acme": Entry(digest="sha256:" + "a" * 64, directory="acme-v2")})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "active.json"
    write_set(path, SET)
    assert read_set(path) == SET
    assert [one.name for one in path.parent.iterdir()] == ["active.json"]
    assert path.stat().st_mode & 0o077 == 0


def test_no_file_is_no_set(tmp_path: Path) -> None:
    assert read_set(tmp_path / "active.json") is None


@pytest.mark.parametrize(
    "change",
    [
        {"number": 0},
        {"entries": None},
        {"more": 1},
        {"entries": {"acme": {"digest": "sha256:1", "directory": "a"}}},
        {"entries": {"acme": {"digest": "sha256:" + "a" * 64, "directory": "../a"}}},
        {"entries": {"../a": {"digest": "sha256:" + "a" * 64, "directory": "a"}}},
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "active.json"
    path.write_text(json.dumps(SET.model_dump() | change))
    with pytest.raises(ProfileError, match="does not say which profiles are active"):
        read_set(path)


@pytest.mark.parametrize("text", ["", "{", '{"number": 1}', "null"])
def test_half_a_file_does_not_begin_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "active.json"
    path.write_text(text)
    with pytest.raises(ProfileError):
        read_set(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ProfileError, match="cannot record"):
        write_set(tmp_path / "active.json", SET)


def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    with pytest.raises(ProfileError, match="cannot record"):
        write_set(tmp_path / "folder" / "active.json", SET)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    adapter = write_adapter(tmp_path / "peft", peft_config(layers_to_transform=[2, 3]), peft_tensors())
    for directory, name in (("acme-v1", "acme"), ("fresh", "fresh")):
        profile = PROFILE.model_copy(update={"name": name})
        write_profile(
            tmp_path / "profiles" / directory,
            profile,
            adapters={"adapter": adapter},
            probes=PROBES,
            training={"seed": 0},
        )
    return tmp_path / "profiles"


def test_a_fleet_begins_with_the_profiles_in_its_roots(root: Path) -> None:
    found = first_set([root])
    assert {name: entry.directory for name, entry in found.entries.items()} == {
        "acme": "acme-v1",
        "fresh": "fresh",
    }
    assert found.number == 1


def test_two_folders_of_one_name_are_seen(root: Path, tmp_path: Path) -> None:
    assert same_directories([root]) == []
    (tmp_path / "other" / "fresh").mkdir(parents=True)
    assert same_directories([root, tmp_path / "other"]) == ["fresh"]
