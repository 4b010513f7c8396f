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


def test_other_prompts_can_be_asked_spread_over_their_file(
    tiny: Tiny, probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("forget", "retain"):
        rows = [{"question": f"{side} {number}?", "answer": f"number {number}"} for number in range(10)]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.txt").write_text("number\n\n")
    data = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    few = _verified(tiny, probed, capsys, "plausible", *data, "--limit", "4")
    assert (few["forget"]["n"], few["forget"]["tokens"], few["retain"]["n"]) == (4, 4 * len("number 0."), 4)
    assert few["recall"] is None
    whole = _verified(tiny, probed, capsys, "plausible", *data, "--keywords", str(tmp_path / "words.txt"))
    assert (whole["forget"]["n"], whole["recall"]["base"]) == (10, 0.0)


def test_gates_are_as_told(tiny: Tiny, probed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "min-forget-rise": 1.5,
        "max-retain-rise": 0.5,
        "min-agreement": 0.25,
        "max-perplexity-ratio": 9.0,
    }
    told["min-recall-fall"] = 0.125
    options = [text for name, value in told.items() for text in (f"--{name}", str(value))]
    report = _verified(tiny, probed, capsys, "unfiltered-0", *options)
    limits = [gate.get("at_least", gate.get("at_most")) for gate in report["gates"]]
    assert limits == [1.5, 0.5, 0.25, 0.125, 0.125, 9.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--forget", "f"], "--forget and --retain go together"),
        (["--limit", "3"], "--limit is of questions in place"),
        (["--keywords", "w"], "--keywords is of questions in place"),
        (["--forget", "f", "--retain", "r", "--limit", "1"], "--limit must be at least 2"),
        (["--min-forget-rise", "nan"], "--min-forget-rise must be a number"),
    ],
)
def test_options_of_other_prompts_without_them_are_refused(
    probed: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["profiles", "verify", "plausible", "--profiles", str(probed), *options]) == 2
    assert words in capsys.readouterr().err
