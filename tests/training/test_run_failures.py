"""Runs that stop, are refused or go on: nothing half-written, nothing lost, no work before a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tiny_base import Tiny
from tiny_run import (
    FORGET,
    RETAIN,
    fresh_base,
    run_training,
    settings_of,
    silent,
    unheard,
    write_jsonl,
    write_questions,
    write_sources,
)

from uld_serve.errors import DataError
from uld_serve.training import answers, probing, run
from uld_serve.training.classroom import Watch
from uld_serve.training.preparation import Prepared
from uld_serve.training.sources import Sources
from uld_serve.training.work_folder import content_digest

QUICK = settings_of("margin", steps=14, save_steps=6)


@pytest.fixture(autouse=True)
def _short_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "REPLAY_TOKENS", 4)  # half of a tiny run's time goes there


class Pulled(Exception):
    """The plug."""


def pull_at(step: int) -> Callable[[int, Mapping[str, float]], None]:
    def report(now: int, _parts: Mapping[str, float]) -> None:
        if now == step:
            raise Pulled

    return report


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def refuse_work(_what: str, _total: int) -> Callable[[int], None]:
    raise AssertionError("work was begun")


def interrupt(tiny: Tiny, sources: Sources, out: Path) -> None:
    with pytest.raises(Pulled):
        run_training(tiny, sources, QUICK, out, report=pull_at(10))
    assert not out.exists()
    assert (out.parent / f".{out.name}.training" / "adapter" / "checkpoint-6").is_dir()


def test_a_resumed_run_writes_the_very_same_profile(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write_sources(tmp_path)
    whole = run_training(tiny, sources, QUICK, tmp_path / "whole", name="tiny")
    out = tmp_path / "stopped"
    interrupt(tiny, sources, out)
    asked: list[int] = []
    made = answers.own_answers
    monkeypatch.setattr(
        answers, "own_answers", lambda *args, **options: asked.append(1) or made(*args, **options)
    )
    resumed = run_training(tiny, sources, QUICK, out, resume=True, name="tiny")
    assert asked == []
    expected, found = adapter(tmp_path / "whole"), adapter(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.record["measured"] == whole.record["measured"]
    assert json.loads((out / "training.json").read_text()) == json.loads(json.dumps(resumed.record))
    assert (out / "probes.json").read_bytes() == (tmp_path / "whole" / "probes.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"forget.jsonl", "retain.jsonl", "whole", "stopped"}


def test_a_run_begun_again_without_resume_starts_afresh(tiny: Tiny, tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    interrupt(tiny, sources, tmp_path / "out")
    with pytest.raises(AssertionError, match="work was begun"):
        _train_without_work(tiny, sources, name="out", out=tmp_path / "out", changes={"lr": 1e-3})
    assert [path.name for path in (tmp_path / ".out.training").iterdir()] == ["run.json"]


def test_resuming_what_was_told_otherwise_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    sources, out = write_sources(tmp_path), tmp_path / "out"
    interrupt(tiny, sources, out)
    for other in (replace(QUICK, lr=1e-3), replace(QUICK, seed=1), replace(QUICK, rank=4)):
        with pytest.raises(DataError, match="other options"):
            run_training(tiny, sources, other, out, resume=True)
    with pytest.raises(DataError, match="other options"):
        run_training(tiny, replace(sources, keywords=("Yy",)), QUICK, out, resume=True)
    write_questions(sources.files[1], [*RETAIN[:-1], "why is it not so?"])
    with pytest.raises(DataError, match="other files"):
        run_training(tiny, sources, QUICK, out, resume=True)
    write_questions(sources.files[1], RETAIN)
    assert (out.parent / ".out.training" / "adapter" / "checkpoint-6").is_dir()  # still there to go on from


def test_a_dataset_in_a_folder_is_compared_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    found = set()
    for question in ("who?", "where?"):
        write_questions(folder / "train.jsonl", [question])
        found |= {content_digest(folder), content_digest(Path(f"{folder}:default:train"))}
    assert len(found) == 2


def test_resuming_on_another_base_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, out = write_sources(tmp_path), tmp_path / "out"
    interrupt(tiny, sources, out)
    other = replace(tiny.base, fingerprint="sha256:" + "0" * 64)
    with pytest.raises(DataError, match="another base"):
        run.train(
            other,
            sources,
            QUICK,
            name="out",
            out=out,
            resume=True,
            readme=None,
            watch=Watch(stage=refuse_work, report=pull_at(0)),
        )


@pytest.mark.parametrize("is_first", [True, False])
def test_what_the_first_process_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    """Else the others would wait for it at the next step: a manifest goes on after a request that failed."""
    sent: list[list[str]] = []

    def broadcast(reason: list[str]) -> list[str]:
        sent.append(reason)
        return ["both sets"]

    def read() -> Prepared:
        assert is_first, "the others need not read what is refused"
        raise DataError("both sets")

    monkeypatch.setattr(run, "broadcast_object_list", broadcast)
    processes = PartialState()
    monkeypatch.setattr(PartialState, "is_main_process", is_first)
    with pytest.raises(DataError, match="both sets"):
        run._first_before_others(processes, read)
    assert sent == [["both sets"] if is_first else [""]]


def test_there_must_be_something_to_resume(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to resume: .*start without --resume"):
        run_training(tiny, write_sources(tmp_path), QUICK, tmp_path / "out", resume=True)
    assert not (tmp_path / ".out.training").exists()


def test_a_loss_that_is_not_finite_leaves_no_profile_and_the_base_as_it_was(
    tiny: Tiny, tmp_path: Path
) -> None:
    wild, base = replace(QUICK, lr=1e38, warmup_steps=0), fresh_base(tiny)
    before = {name: one.clone() for name, one in base.model.state_dict().items()}
    with pytest.raises(DataError, match="the loss is"):
        run.train(
            base, write_sources(tmp_path), wild, name="out", out=tmp_path / "out", resume=False, readme=None,
            watch=Watch(stage=silent, report=unheard),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in base.model.modules())


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("Bad Name", {}, "name"),
    ("none", {}, "none"),
    ("fine", {"strength": 200.0}, "strength"),
    ("fine", {"exit": 5}, "--exit 5 is beyond the base's 4 layers"),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_what_could_not_be_written_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, name: str, changes: Mapping[str, object], words: str
) -> None:
    sources = write_sources(tmp_path)
    with pytest.raises(DataError, match=words):
        _train_without_work(tiny, sources, name=name, out=tmp_path / "out", changes=changes)
    assert {path.name for path in tmp_path.iterdir()} == {"forget.jsonl", "retain.jsonl"}


def test_an_existing_profile_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"out exists and a profile is never overwritten; remove it"):
        _train_without_work(tiny, sources, name="out", out=tmp_path / "out", changes={})
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / ".out.training").exists()


def _train_without_work(
    tiny: Tiny, sources: Sources, *, name: str, out: Path, changes: Mapping[str, object]
) -> None:
    run.train(
        tiny.base,
        sources,
        replace(QUICK, **changes),
        name=name,
        out=out,
        resume=False,
        readme=None,
        watch=Watch(stage=refuse_work, report=pull_at(0)),
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "who is zed?", "completion": "x"}, r"held.jsonl:1: .*must be a question or messages"),
        ({"question": "who is zed?" + "?" * 9000}, "cannot be put into a profile"),
        ({"question": "who is zed?", "form": "f" * 65}, "cannot be put into a profile"),
    ],
)
def test_held_out_prompts_that_no_profile_takes_are_refused_before_training(
    tiny: Tiny, tmp_path: Path, row: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "own_answers", lambda _base, prompts, **_options: [[65]] * len(prompts))
    sources = Sources(
        forget=write_questions(tmp_path / "f.jsonl", FORGET),
        retain=write_questions(tmp_path / "r.jsonl", RETAIN),
        keywords=("Zz",),
        probe_forget=write_jsonl(tmp_path / "held.jsonl", [row]),
        probe_retain=write_questions(tmp_path / "kept.jsonl", ["why is zoo so?"]),
    )
    with pytest.raises(DataError, match=words):
        run_training(tiny, sources, settings_of("rkld"), tmp_path / "out", report=pull_at(10))


def test_a_missing_file_is_refused_by_its_option(tiny: Tiny, tmp_path: Path) -> None:
    sources = replace(
        write_sources(tmp_path),
        split=False,
        probe_forget=tmp_path / "no",
        probe_retain=tmp_path / "forget.jsonl",
    )
    with pytest.raises(DataError, match=r"--probe-forget: .*no does not exist"):
        run_training(tiny, sources, QUICK, tmp_path / "out")
    with pytest.raises(DataError, match=r"--forget: .*no does not exist"):
        run_training(tiny, replace(sources, forget=tmp_path / "no"), QUICK, tmp_path / "out")
