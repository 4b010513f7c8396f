"""`uld-serve profiles verify` with several names, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_base import Tiny

from uld_serve.cli import main
from uld_serve.profiles.probes import Message, Probe, Probes
from uld_serve.profiles.store import write_profile

SHORT = ["--samples", "1", "--max-tokens", "3", "--dtype", "float32", "--json"]
RENAMED = {"late-fork": "unfiltered-0", "truncated": "plausible", "all-layers": "unfiltered-1"}


@pytest.fixture(scope="module")
def probed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three profiles with the same probes, two of them named as the copies would be that verify makes."""
    root = tmp_path_factory.mktemp("probed")
    probes = Probes(keywords=("Osk",), forget=(_probe("Who?"), _probe("Osk?")), retain=(_probe("2 + 2?"),))
    for name, (directory, version) in tiny.profiles.items():
        if name not in RENAMED:
            continue
        profile = version.profile.model_copy(update={"name": RENAMED[name]})
        files = {file: directory / file for file in profile.adapter_names}
        write_profile(root / RENAMED[name], profile, adapters=files, probes=probes, training={})
    return root


def _probe(text: str) -> Probe:
    return Probe(messages=(Message(role="user", content=text),), answer_ids=None, form="question")


def _verified(tiny: Tiny, root: Path, capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, object]:
    where = ["--profiles", str(root), "--model", str(tiny.folder)]
    assert main(["profiles", "verify", *names, *where, *SHORT]) == 1  # no tiny model forgets by chance
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_several_give_what_each_gives_alone(
    tiny: Tiny, probed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["unfiltered-0", "plausible", "unfiltered-1"]
    together = _verified(tiny, probed, capsys, *names)
    assert together["ok"] is False
    assert together["profiles"] == [_verified(tiny, probed, capsys, name) for name in names]


def test_one_name_twice_is_refused(tiny: Tiny, probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profiles", "verify", "plausible", "plausible", "--profiles", str(probed)]
    assert main(arguments) == 2
    assert "named twice" in capsys.readouterr().err
