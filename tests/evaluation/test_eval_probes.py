"""`uld-serve eval probes` on a tiny base: it reports what the engine serves, and an interrupted run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_base import Tiny, byte_tokenizer, write_base

from uld_serve.cli import main
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import ProfileMismatch
from uld_serve.evaluation.attacks import session
from uld_serve.evaluation.attacks.asking import Asker
from uld_serve.evaluation.attacks.run import PROBES
from uld_serve.llm import LLM

ROWS = [
    {
        "question": "Who is Ada?",
        "answer": "a painter from Oslo",
        "key": "Oslo",
        "subject": "Ada",
        "alias": "she",
        "paraphrased_question": "Ada is who?",
        "perturbed_answer": ["a baker"],
        "multi_hop": {"question": "Whose land?", "answer": "Norway"},
    },
    {"question": "What is tea?", "answer": "leaves in hot water"},
]


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def command(tiny: Tiny, forget: Path, tmp_path: Path) -> list[str]:
    profiles = tiny.profiles["late-fork"][0].parent
    return [
        *(
            "eval",
            "probes",
            "--forget",
            str(forget),
            "--model",
            str(tiny.folder),
            "--profiles",
            str(profiles),
        ),
        *("--out", str(tmp_path / "out"), "--dtype", "float32", "--device", "cpu", "--max-tokens", "5"),
        *("--samples", "4", "--k", "1", "--k", "4", "--json"),
    ]


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def count_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts the engine gets, call by call."""
    asked: list[int] = []
    for name in ("generate", "score"):
        whole = getattr(LLM, name)

        def counted(self: LLM, prompts: Any, *args: Any, whole: Any = whole, **more: Any) -> Any:
            asked.append(len(prompts))
            return whole(self, prompts, *args, **more)

        monkeypatch.setattr(LLM, name, counted)
    return asked


def test_every_probe_has_a_section_with_base_profile_and_reference(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write_base(tmp_path / "reference", seed=5)
    everything = ["--profile", "late-fork", "--reference", str(reference), "--probes", "generate"]
    assert main([*command, *everything]) == 0
    record = last(capsys)
    out = tmp_path / "out"
    assert record == json.loads((out / "summary.json").read_text())
    assert tuple(record["probes"]) == PROBES
    assert record["subjects"] == ["base", "late-fork", "reference"]
    assert record["digests"] == {"late-fork": tiny.version("late-fork").digest}
    report = (out / "report.md").read_text()
    assert [line[3:] for line in report.splitlines() if line.startswith("## ")] == list(PROBES)
    for name, one in record["probes"].items():
        rounded = {"base, int8", "late-fork, int8"} if name == "int8" else set()
        assert set(one["subjects"]) == {"base", "late-fork", "reference"} | rounded, name
    for picture in ("recovery.png", "leak-at-k.png", "views.png"):
        assert f"]({picture})" in report
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert [one["question"] for one in json.loads((out / "paraphrases.json").read_text())] == [
        row["question"] for row in ROWS
    ]


def test_answers_are_the_engines_own_and_a_leak_is_what_names_a_key(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "late-fork"
    asked = ["--profile", name, "--probe", "plain", "--probe", "sampling"]
    assert main([*command, *asked]) == 0
    capsys.readouterr()
    prompts = json.loads((tmp_path / "out" / "probes.json").read_text())["prompts"]
    plain = next(one for one in prompts if one["probe"] == "plain")
    llm = LLM(str(tiny.folder), profiles=[tiny.profiles[name][0]], dtype="float32", device="cpu")
    [said] = llm.chat([plain["messages"]], SamplingParams(max_tokens=5, temperature=0), profile=name)
    assert plain["answers"][name] == [{"text": said.text, "leaks": False}]
    # What the profile says, as the key: now it leaks, and nobody is asked again.
    key = said.text.strip()
    row = {**ROWS[0], "key": key}
    (tmp_path / "forget.jsonl").write_text(json.dumps(row))
    assert main([*command, *asked]) == 0
    record = last(capsys)["probes"]
    assert record["plain"]["subjects"][name]["rate"] == 1.0
    sampled = record["sampling"]["subjects"][name]
    assert sampled["leak_at_k"]["1"] == pytest.approx(sampled["leaks"][0] / 4)
    assert sampled["leak_at_k"]["4"] == float(sampled["leaks"][0] > 0)


def test_two_views_are_compared_as_the_engine_scores_them(
    tiny: Tiny, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--profile", "late-fork", "--probe", "logprob-difference"]
    assert main([*command, *asked]) == 0
    found = last(capsys)["probes"]["logprob-difference"]["subjects"]
    llm = LLM(str(tiny.folder), profiles=[], dtype="float32", device="cpu")
    ranks = []
    for row, places in zip(ROWS, (range(14, 19), range(19)), strict=True):
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": str(row["question"])}])
        answer = list(str(row["answer"]).encode())
        [scored] = llm.score([prompt + answer], top=20)
        for place in places:
            top = scored.top_ids[len(prompt) + place]
            ranks.append(top.index(answer[place]) if answer[place] in top else None)
    alone = found["base"]["alone"]["tokens"]
    assert alone["n"] == len(ranks) == 24
    assert alone["first"] == pytest.approx(ranks.count(0) / 24)
    assert alone["among_five"] == pytest.approx(sum(rank is not None and rank < 5 for rank in ranks) / 24)
    assert set(found["late-fork"]) == {"alone", "difference"}


def test_an_interrupted_run_asks_only_what_is_missing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [*command, "--profile", "late-fork", "--probe", "plain", "--probe", "role-play"]
    stopped = Asker.greedy

    def interrupted(self: Asker, cases: Any) -> list[str]:
        if self.profile is not None and cases[0].probe == "role-play":
            raise KeyboardInterrupt
        return stopped(self, cases)

    monkeypatch.setattr(Asker, "greedy", interrupted)
    assert main(whole) == 130
    assert not (tmp_path / "out" / "summary.json").exists()
    monkeypatch.setattr(Asker, "greedy", stopped)
    asked = count_asked(monkeypatch)
    assert main(whole) == 0
    assert asked == [8]
    first = (tmp_path / "out" / "summary.json").read_text()
    assert main(whole) == 0
    assert asked == [8]
    assert (tmp_path / "out" / "summary.json").read_text() == first
    assert main([*whole, "--max-tokens", "6"]) == 0
    assert sum(asked) == 8 + 2 * (2 + 8)


def test_more_draws_leave_the_first_ones_as_they_are(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> list[Any]:
        prompts = json.loads((tmp_path / "out" / "probes.json").read_text())["prompts"]
        return [one["answers"]["base"] for one in prompts]

    assert main([*command, "--probe", "sampling"]) == 0
    four = drawn()
    asked = count_asked(monkeypatch)
    assert main([*command, "--probe", "sampling", "--samples", "6"]) == 0
    assert asked == [4]
    assert [texts[:4] for texts in drawn()] == four
    assert len({one["text"] for one in four[0]}) > 1


def test_questions_without_an_answer_are_judged_by_the_bases_own(
    command: list[str], forget: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget.write_text('{"question": "Who is Ada?"}')
    assert main([*command, "--probe", "plain", "--profile", "truncated"]) == 0
    record = last(capsys)
    [fact] = json.loads((tmp_path / "out" / "probes.json").read_text())["facts"]
    [plain] = json.loads((tmp_path / "out" / "probes.json").read_text())["prompts"]
    assert fact["answer"] == plain["truth"] == plain["answers"]["base"][0]["text"]
    assert record["without_keys"] == 1


def test_a_text_is_continued_behind_what_is_given_of_it(
    tiny: Tiny, command: list[str], forget: Path, tmp_path: Path
) -> None:
    forget.write_text('{"text": "one two three four"}')
    assert main([*command, "--probe", "prefill", "--prefill", "3"]) == 0
    [case] = json.loads((tmp_path / "out" / "probes.json").read_text())["prompts"]
    llm = LLM(str(tiny.folder), profiles=[], dtype="float32", device="cpu")
    [said] = llm.generate(["one two th"], SamplingParams(max_tokens=5, temperature=0))
    assert case["answers"]["base"][0]["text"] == said.text


def test_views_of_a_reference_with_other_tokens_are_not_compared(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write_base(tmp_path / "reference", seed=5)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "owl"]})
    tokenizer.save_pretrained(reference)
    asked = ["--probe", "logprob-difference", "--probe", "plain", "--reference", str(reference)]
    assert main([*command, *asked]) == 0
    probes = last(capsys)["probes"]
    assert set(probes["plain"]["subjects"]) == {"base", "reference"}
    assert set(probes["logprob-difference"]["subjects"]) == {"base"}


def test_a_profile_that_the_rounded_base_does_not_take_is_told(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = session.LLM

    def refusing(*args: Any, **more: Any) -> LLM:
        if more["weights"] == "int8" and more["profiles"]:
            raise ProfileMismatch("profile 'late-fork' does not reproduce its replay probe")
        return whole(*args, **more)

    monkeypatch.setattr(session, "LLM", refusing)
    assert main([*command, "--probe", "int8", "--profile", "late-fork"]) == 0
    record = last(capsys)
    assert set(record["probes"]["int8"]["subjects"]) == {"base", "late-fork", "base, int8"}
    assert record["refused"] == {"late-fork": "profile 'late-fork' does not reproduce its replay probe"}
    assert "late-fork: not asked on the int8 base" in (tmp_path / "out" / "report.md").read_text()


def test_without_matplotlib_there_is_a_report_without_pictures(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*command, "--probe", "plain"]) == 0
    assert ".png" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--probe", "riddle"], "there is no riddle, only plain, sampling"),
        (["--profile", "nobody"], "has no profile 'nobody'"),
        (["--profile", "base"], "rows of that name"),
        (["--k", "9"], "at least as many --samples"),
        (["--samples", "0"], "at least 1"),
        (["--threshold", "0"], "above 0"),
        (["--probes", "generate", "--probe", "plain"], "for the probe paraphrase"),
        (["--keywords", "nowhere.txt"], "cannot be read as text"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    command: list[str],
    options: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = count_asked(monkeypatch)
    assert main([*command, *options]) == 2
    assert told in capsys.readouterr().err
    assert asked == []


def test_a_probe_named_that_the_data_has_nothing_for_is_refused_and_else_told(
    command: list[str], forget: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget.write_text(json.dumps(ROWS[1]))
    assert main([*command, "--probe", "plain", "--probe", "alias"]) == 2
    assert "--probe alias has no prompt: no subject and alias" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()
    assert main([*command, "--limit", "1"]) == 0
    assert last(capsys)["probes"]["alias"] == {
        "prompts": 0,
        "skipped": {"no subject and alias": 1},
        "subjects": {"base": None},
    }
    assert "Nothing could be asked." in (tmp_path / "out" / "report.md").read_text()
