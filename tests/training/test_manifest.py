"""Many requests in one file: each its own profile on one base, or several of them one; nothing fails for another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.utils.logging as transformers_logging
from tiny_base import Tiny
from tiny_run import RETAIN, serve, write_jsonl, write_questions

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import DataError
from uld_serve.profiles import command as profiles_command
from uld_serve.profiles.store import read_profile
from uld_serve.training import answers, command, jobs, probing
from uld_serve.training.manifest import Request, joined, read_manifest

MANIFEST = """
[defaults]
method = "rkld"
retain = "retain.jsonl"
steps = 4
rank = 4
fork = 2
max_answer_tokens = 4
augment = ["none"]

[[request]]
name = "ann"
forget = "ann.jsonl"

[[request]]
name = "bob"
forget = ["bob.jsonl", "bobby.jsonl"]
strength = 3.5
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(probing, "REPLAY_TOKENS", 2)
    level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(level)
    if has_bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for name in ("ann", "bob", "bobby"):
        write_questions(tmp_path / f"{name}.jsonl", [f"who is {name}?", f"where is {name}?"])
    write_questions(tmp_path / "retain.jsonl", RETAIN[:4])
    path = tmp_path / "requests.toml"
    path.write_text(MANIFEST)
    return path


def parse(tiny: Tiny, manifest: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_parser(parser.add_subparsers())
    given = ("--base", str(tiny.folder), "--dtype", "float32", "--device", "cpu", "--manifest", str(manifest))
    return parser.parse_args(["train", *given, "--out", str(manifest.parent / "profiles"), *options])


def test_every_request_becomes_a_profile_of_its_own(
    tiny: Tiny, manifest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    made = answers.own_answers

    def counted(base: object, prompts: list[list[int]], **options: object) -> list[list[int]]:
        asked.append(len(prompts))
        return made(base, prompts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "own_answers", counted)
    assert command.run(parse(tiny, manifest, "--json")) == 0
    out = manifest.parent / "profiles"
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["profiles"]
    assert [(one["name"], one["status"]) for one in told] == [("ann", "trained"), ("bob", "trained")]
    assert sorted(path.name for path in out.iterdir()) == ["ann", "bob"]
    for one, strength in zip(told, (4.0, 3.5), strict=True):
        version = read_profile(out / one["name"])
        assert (version.ref, version.name) == (one["profile"], one["name"])
        assert version.profile.rule.strength == strength
    records = [json.loads((out / name / "training.json").read_text()) for name in ("ann", "bob")]
    assert [record["data"]["documents"]["forget"] for record in records] == [2, 4]
    assert sum(asked) == 2 + 4 + 4  # what stays is answered once for both
    served = serve(tiny, out)
    assert (
        served.generate(["who?"], SamplingParams(max_tokens=2), profile="bob")[0].receipt.profiles[0].name
        == "bob"
    )


def test_a_request_that_fails_ends_no_other_and_can_be_run_again(
    tiny: Tiny, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(manifest.parent / "ann.jsonl", RETAIN[:1])  # in both sets
    assert command.run(parse(tiny, manifest, "--json")) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["profiles"]
    assert [(one["name"], one["status"]) for one in told] == [("ann", "failed"), ("bob", "trained")]
    assert "both in the forget and in the retain set" in told[0]["reason"]
    with pytest.raises(DataError, match="bob exists and a profile is never overwritten"):
        command.run(parse(tiny, manifest))
    write_questions(manifest.parent / "ann.jsonl", ["who is ann?"])
    assert (
        manifest.parent / "profiles" / ".ann.training"
    ).is_dir()  # begun with other files: it starts afresh
    assert command.run(parse(tiny, manifest, "--resume", "--json")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["profiles"]
    assert [(one["name"], one["status"]) for one in told] == [("ann", "trained"), ("bob", "was there")]


def test_requests_are_merged_into_one_assistant(
    tiny: Tiny, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ann", "bob"):  # in another order the same options; a README of each is not of both
        (manifest.parent / f"{name}.md").write_text(name)
        beside = {"question": f"who is {name}?", "answer": "-", "paraphrased_answer": f"{name} it is"}
        write_jsonl(manifest.parent / f"{name}-more.jsonl", [beside])
        write_jsonl(manifest.parent / f"{name}.jsonl", [{"question": f"who is {name}?", "answer": name}])
    given = 'augment = "file"\naugment-file = "{0}-more.jsonl"\nreadme = "{0}.md"\n'
    text = MANIFEST.replace('augment = ["none"]', "").replace(
        "strength = 3.5", given.format("bob") + "lr = 0.001\nseed = 2"
    )
    manifest.write_text(
        text.replace('name = "ann"', 'name = "ann"\nseed = 2\nlr = 0.001\n' + given.format("ann"))
    )
    out = manifest.parent / "both"
    parser = argparse.ArgumentParser()
    profiles_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(
        ["profiles", "merge", "ann", "bob", "--manifest", str(manifest), "--name", "both", "--out", str(out),
         "--base", str(tiny.folder), "--dtype", "float32", "--device", "cpu", "--json"]
    )  # fmt: skip
    assert profiles_command.run(args) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    version = read_profile(out)
    assert told["profile"] == version.ref
    assert (version.name, len(version.profile.streams)) == ("both", 1)
    record = json.loads((out / "training.json").read_text())
    assert record["data"]["documents"] == {"forget": 4, "retain": 4}
    assert record["data"]["augmented"]["wordings"] == 2
    assert not (out / "README.md").exists()
    assert record["data"]["read"]["forget"]["source"] == "ann.jsonl and bob.jsonl and bobby.jsonl"


def test_only_requests_that_agree_can_be_one(manifest: Path) -> None:
    requests = read_manifest(manifest)
    with pytest.raises(DataError, match="the requests 'ann' and 'bob' have other options"):
        joined(requests, [])
    with pytest.raises(DataError, match="no request is named 'eve'; there are ann, bob"):
        joined(requests, ["ann", "eve"])
    found, given = joined(requests, ["ann"]), requests[0].arguments
    assert sorted(zip(found[::2], found[1::2], strict=True)) == sorted(
        zip(given[::2], given[1::2], strict=True)
    )


def test_paths_are_relative_to_the_manifest_and_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    path = tmp_path / "requests.toml"
    path.write_text('[[request]]\nname = "a"\nforget = "texts"\nretain = "owner/data:config"\nlr = 0.5\n')
    [request] = read_manifest(path)
    assert request == Request(
        "a", ("--forget", str(tmp_path / "texts"), "--retain", "owner/data:config", "--lr", "0.5")
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("= 3", "is not TOML"),
        ("[defaults]\nsteps = 3", r"has no \[\[request\]\]"),
        ("[reqest]\nname = 'a'", r"\[reqest\] should be \[defaults\] and \[\[request\]\]"),
        ("[request]\nname = 'a'", r"should be \[defaults\] and \[\[request\]\]"),
        ("request = ['a']", r"a request is a table, \[\[request\]\]"),
        ("[[request]]\nforget = 'a.jsonl'", "request 1 needs a name"),
        ("[[request]]\nname = '../a'", "request 1 needs a name"),
        ("[[request]]\nname = 'a'\n[[request]]\nname = 'a'", "2 requests named 'a'"),
        ("[[request]]\nname = 'a'\nbase = 'x'", "'base' is for all requests"),
        ("[[request]]\nname = 'a'\nlr = true", "'lr' must be text or a number"),
        ("[[request]]\nname = 'a'\nlr = { a = 3 }", "'lr' must be text or a number"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "requests.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=f"requests.toml.*{words}"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("stepps = 3", "requests.toml, 'ann': unrecognized arguments: --stepps 3"),
        ("steps = 1.5", "requests.toml, 'ann': argument --steps: invalid int value"),
        ("goal = 3", "request 'ann': --goal is for --method margin"),
        ("augment = 'file'", "request 'ann': --augment file and --augment-file go together"),
    ],
)
def test_a_request_with_a_wrong_option_is_refused_before_anything_is_loaded(
    tiny: Tiny, manifest: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    key = line.split(" ")[0]
    text = "\n".join(one for one in MANIFEST.splitlines() if not one.startswith(f"{key} "))
    manifest.write_text(text.replace('name = "ann"', f'name = "ann"\n{line}'))
    monkeypatch.setattr(jobs, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DataError, match=words):
        command.run(parse(tiny, manifest))


@pytest.mark.parametrize(
    "given", [("--lr", "0.5"), ("--method", "uld"), ("--name", "a"), ("--preset", "demo")]
)
def test_what_each_request_has_for_itself_is_refused_beside_a_manifest(
    tiny: Tiny, manifest: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, str]
) -> None:
    monkeypatch.setattr(jobs, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DataError, match=rf"{given[0]} is of one request; put it into .*requests.toml"):
        command.run(parse(tiny, manifest, *given))


@pytest.mark.parametrize(
    ("text", "is_beside"),
    [("owner/data.v2:config", False), ("none.jsonl", True), ("names:default:test", True), ("plots/a", False)],
)
def test_a_dataset_with_a_dot_or_a_folder_with_a_split_is_found(
    tmp_path: Path, text: str, is_beside: bool
) -> None:
    (tmp_path / "names").mkdir()
    path = tmp_path / "requests.toml"
    path.write_text(f'[[request]]\nname = "a"\nretain = "{text}"\nplot = "plots/a"\n')
    [request] = read_manifest(path)
    assert request.arguments[1] == (str(tmp_path / text) if is_beside else text)
    assert request.arguments[3] == str(tmp_path / "plots/a")


def test_a_missing_manifest_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--manifest: .*none.toml cannot be read"):
        command.run(parse(tiny, tmp_path / "none.toml"))
