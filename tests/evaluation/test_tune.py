"""`uld-serve tune` and `eval sweep` on a tiny base: what they measure is what is served, what they choose is within the
constraint, and what they write can be served."""

from __future__ import annotations

import json
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
from tiny_base import Tiny, base_spec, random_adapter

from uld_serve.cli import main
from uld_serve.data.documents import Document, Message, read_documents
from uld_serve.engine.request import SamplingParams
from uld_serve.evaluation.held_out import halves, items
from uld_serve.evaluation.settings import grid, variant
from uld_serve.evaluation.sweep import Sweep
from uld_serve.llm import LLM
from uld_serve.profiles.probes import Probes, ReplayProbe
from uld_serve.profiles.profile import Profile, RuleSpec, StreamSpec
from uld_serve.profiles.store import read_profile, read_training_record, write_profile

WORDS = ("ink", "owl", "tea", "map", "sea", "fox", "oak", "sun")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for side in ("forget", "retain"):
        lines = [{"question": f"{side} {word}?", "answer": f"the {word}"} for word in WORDS]
        lines[0].pop("answer")  # the base's to give
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def command(tiny: Tiny, data: Path, name: str, *options: str, verb: tuple[str, ...] = ("tune",)) -> list[str]:
    return [
        *(*verb, name, "--profiles", str(tiny.profiles[name][0].parent), "--model", str(tiny.folder)),
        *("--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")),
        *("--out", str(data / "out"), "--dtype", "float32", "--device", "cpu", "--json", *options),
    ]


def open_tiny(tiny: Tiny, name: str) -> LLM:
    return LLM(str(tiny.folder), profiles=[tiny.profiles[name][0]], dtype="float32", device="cpu")


def sides(llm: LLM, data: Path) -> dict[str, Any]:
    return {
        side: items(llm, read_documents(data / f"{side}.jsonl", kind=side).documents, kind=side)
        for side in ("forget", "retain")
    }


@pytest.mark.parametrize("name", ["late-fork", "truncated", "pair", "all-layers"])
def test_every_point_is_what_a_profile_with_that_rule_serves(tiny: Tiny, data: Path, name: str) -> None:
    """Also where the taus of a strength come of one pass, and where `protect` moves scores after the cut."""
    llm = open_tiny(tiny, name)
    found = sides(llm, data)
    rules = grid(tiny.version(name).profile, strengths=[0.5, 2.0], taus=[0.05, 0.3])
    points = Sweep(llm, tiny.version(name), forget=found["forget"], retain=found["retain"]).points(rules)
    for number, point in enumerate(points):
        served = variant(tiny.version(name), point.rule, name=f"served-{number}")
        llm.registry.add(served)
        for side in ("forget", "retain"):
            assert getattr(point, side).cut == pytest.approx(
                cut_of(llm, found[side], served.name, point.rule)
            )
    assert any(point.forget.cut > 0 for point in points) or name == "truncated"
    assert len({point.forget.nll for point in points}) >= 2


def cut_of(llm: LLM, found: list[Any], name: str, rule: RuleSpec) -> float:
    """By scoring what is served, and the base's own probabilities."""
    cut = total = 0
    for item in found:
        ids = item.prompt_ids + item.answer_ids
        (served,), (base,) = llm.score([ids], profile=name), llm.score([ids])
        for at in range(len(item.prompt_ids), len(ids)):
            ratio = 2.718281828459045 ** (base.logprobs[at] - base.top_logprobs[at][0])  # type: ignore[operator]
            cut += served.logprobs[at] == -inf and ratio >= rule.filter.tau
            total += 1
    return cut / total


def test_taus_of_a_fused_filter_take_one_pass_a_strength(tiny: Tiny, data: Path) -> None:
    llm = open_tiny(tiny, "late-fork")
    found = sides(llm, data)
    sweep = Sweep(llm, tiny.version("late-fork"), forget=found["forget"], retain=found["retain"])
    rules = grid(tiny.version("late-fork").profile, strengths=[1.0, 2.0], taus=[0.01, 0.02, 0.05, 0.1])
    assert len(sweep.points(rules)) == 8
    assert sweep.num_passes == 2 * 3  # both sides: the base and two strengths


def test_the_setting_is_written_as_the_profiles_next_version(
    tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tiny.version("late-fork")
    options = ("--max-retain", "40", "--max-cut", "1", "--strengths", "1", "4", "--taus", "0.05")
    assert main(command(tiny, data, "late-fork", *options)) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record == json.loads((data / "out" / "sweep.json").read_text())
    assert (data / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    new = read_profile(data / "out" / "late-fork")
    assert (new.name, new.ref) == (old.name, record["tuned"])
    assert new.digest != old.digest
    assert new.profile.rule.model_dump(mode="json") == record["chosen"]["rule"]
    assert new.profile.streams == old.profile.streams
    best = max(record["points"], key=lambda point: point["forget"]["rise"])
    assert record["chosen"] == best
    assert record["data"] == {part: {"forget": 4, "retain": 4} for part in ("choosing", "reporting")}
    training = read_training_record(data / "out" / "late-fork")
    assert training["seed"] == read_training_record(tiny.profiles["late-fork"][0])["seed"]
    assert training["tuned"]["from"] == old.ref  # type: ignore[index]
    assert "the constraint cost nothing" in printed.err
    served = LLM(str(tiny.folder), profiles=data / "out", dtype="float32", device="cpu")
    sequence = [[*b"who is it?"]]
    expected = open_tiny(tiny, "late-fork")
    expected.registry.add(variant(old, new.profile.rule, name="chosen"))
    (found,), (wanted,) = (
        served.score(sequence, profile="late-fork"),
        expected.score(sequence, profile="chosen"),
    )
    assert found.logprobs == wanted.logprobs


def test_a_constraint_takes_a_gentler_setting_and_says_what_it_bought(
    tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-cut", "1", "--strengths", "0.01", "0.5", "8")
    assert main(command(tiny, data, "late-fork", "--max-retain", "40", *options)) == 0
    free = json.loads(capsys.readouterr().out)
    rises = sorted(point["retain"]["rise"] for point in free["points"] if point["forget"]["rise"] > 0)
    assert rises[0] < free["chosen"]["retain"]["rise"]
    limit = (rises[0] + free["chosen"]["retain"]["rise"]) / 2
    again = command(tiny, data, "late-fork", "--max-retain", str(limit), *options)
    again[again.index("--out") + 1] = str(data / "gentle")
    assert main(again) == 0
    printed = capsys.readouterr()
    gentle = json.loads(printed.out)
    assert gentle["chosen"]["retain"]["rise"] <= limit
    assert gentle["chosen"]["forget"]["rise"] < free["chosen"]["forget"]["rise"]
    assert "the constraint bought" in printed.err
    # The figures that are told are of the half that nothing was chosen by.
    assert gentle["reported"]["chosen"]["rule"] == gentle["chosen"]["rule"]
    assert gentle["reported"]["chosen"]["forget"] != gentle["chosen"]["forget"]


def test_where_nothing_meets_the_constraint_nothing_is_written(
    tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny, data, "late-fork", "--max-retain", "-20", "--strengths", "4")) == 1
    printed = capsys.readouterr()
    assert "nothing was written" in printed.err
    assert printed.out == ""
    assert not (data / "out").exists()


def test_replay_probes_are_made_anew_so_that_the_version_loads(
    tiny: Tiny, data: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(tmp_path / "peft", tiny.folder, 2, 4, seed=7)
    profile = Profile(
        name="acme",
        method="rkld",
        base=base_spec(tiny.base),
        streams=(StreamSpec(name="assistant", fork=2, exit=4, kv="borrowed", adapter="adapter"),),
        rule=RuleSpec(kind="relu_difference", strength=2.0),
    )
    bare = tmp_path / "bare" / "acme"
    write_profile(bare, profile, adapters={"adapter": adapter}, probes=Probes(), training={})
    llm = LLM(str(tiny.folder), profiles=[bare], dtype="float32", device="cpu")
    prompt = tuple(b"who?")
    (answer,) = llm.generate([list(prompt)], SamplingParams(max_tokens=8, temperature=0.0), profile="acme")
    (scored,) = llm.score([[*prompt, *answer.token_ids]], profile="acme")
    nll = -sum(scored.logprobs[len(prompt) :]) / len(answer.token_ids)  # type: ignore[arg-type]
    old = ReplayProbe(prompt_ids=prompt, answer_ids=answer.token_ids, nll_base=0.0, nll_fused=nll)
    folder = tmp_path / "probed" / "acme"
    version = write_profile(
        folder, profile, adapters={"adapter": adapter}, probes=Probes(replay=(old,)), training={}
    )
    options = ("--max-retain", "40", "--max-cut", "1", "--strengths", "9")
    assert (
        main(command(Tiny(tiny.folder, tiny.base, {"acme": (folder, version)}), data, "acme", *options)) == 0
    )
    (new,) = read_profile(data / "out" / "acme").probes.replay
    assert new.prompt_ids == prompt
    assert new.nll_fused != old.nll_fused
    LLM(str(tiny.folder), profiles=data / "out", dtype="float32", device="cpu")  # replays it


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--limit", "3"], "at least 4 are needed"),
        (["--limit", "0"], "at least 1"),
        (["--strengths", "0"], "above 0"),
        (["--taus", "nan"], "above 0"),
        (["--rules", "pair_linear"], "needs 2 streams"),
        (["--retain", "missing.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_a_model_is_loaded(
    tiny: Tiny,
    data: Path,
    options: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("uld_serve.evaluation.sweep_command.LLM", None)
    assert main(command(tiny, data, "late-fork", *options)) == 2
    assert told in capsys.readouterr().err


def test_a_prompt_on_both_sides_is_refused(
    tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = command(tiny, data, "late-fork", "--retain", str(data / "forget.jsonl"))
    assert main(both) == 2
    assert "both in the forget and in the retain set" in capsys.readouterr().err


def test_a_version_that_is_there_is_not_overwritten(
    tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "out" / "late-fork").mkdir(parents=True)
    assert main(command(tiny, data, "late-fork")) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_version_and_no_picture(
    tiny: Tiny, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("--max-retain", "40", "--max-cut", "1", "--strengths", "1")
    assert main(command(tiny, data, "late-fork", *options)) == 0
    assert sorted(path.name for path in (data / "out").iterdir()) == ["late-fork", "sweep.json"]
    assert "no picture" in capsys.readouterr().err


def test_eval_sweep_measures_each_strength_and_writes_no_profile(
    tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(tiny, data, "late-fork", "--strengths", "0.5", "1", "2", "4", verb=("eval", "sweep"))
    assert main(asked) == 0
    record = json.loads(capsys.readouterr().out)
    assert [point["rule"]["strength"] for point in record["points"]] == [2.0, 0.5, 1.0, 4.0]
    assert {point["rule"]["filter"]["tau"] for point in record["points"]} == {0.02}
    assert record["n"] == {"forget": 8, "retain": 8}
    assert sorted(path.name for path in (data / "out").iterdir()) == ["sweep.json", "sweep.png"]


def document(text: str) -> Document:
    return Document(messages=(Message("user", text),), answer="x")


def test_a_prompt_is_in_the_same_half_whatever_stands_beside_it() -> None:
    documents = [document(f"question {number}") for number in range(10)]
    choosing, reporting = halves(documents, kind="forget")
    assert (len(choosing), len(reporting)) == (5, 5)
    assert sorted([*choosing, *reporting], key=documents.index) == documents
    assert halves(documents[::-1], kind="forget")[0] == choosing[::-1]


def test_documents_in_every_form_are_scored_after_their_prompts(tiny: Tiny, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "ab", "completion": "cde"},
        {"text": "whole"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]},
        {"question": "open?"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    llm = LLM(str(tiny.folder), profiles=[], dtype="float32", device="cpu")
    found = items(llm, read_documents(tmp_path / "rows.jsonl", kind="forget").documents, kind="forget")
    assert [(bytes(item.prompt_ids), bytes(item.answer_ids)) for item in found[:2]] == [
        (b"ab", b"cde"),
        (b"w", b"hole"),
    ]
    assert found[2].answer_ids == [*b"yes", 257]
    assert found[1].answer is None
    assert 0 < len(found[3].answer_ids) <= 48
