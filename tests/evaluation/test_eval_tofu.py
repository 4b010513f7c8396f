"""`uld-serve eval tofu` on a tiny base: it writes what the engine serves, and an interrupted run goes on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_base import CHAT_TEMPLATE, Tiny, byte_tokenizer, write_base, write_tiny_profile

import uld_serve
from uld_serve.cli import main
from uld_serve.errors import DataError
from uld_serve.evaluation import identity, tofu_run
from uld_serve.evaluation.questions import Question, read_questions, section_files
from uld_serve.llm import LLM

WORDS = ("ink", "owl", "tea", "map", "sea")


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Real authors and world facts have no paraphrase, as in TOFU."""
    found = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        row: dict[str, Any] = {
            "question": f"{name} {number}?",
            "answer": f"the {word}",
            "perturbed_answer": [f"no {word}", f"a {word}s"],
        }
        if name in ("retain", "forget"):
            row["paraphrased_answer"] = f"{word}, that is"
        found.append(row)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tofu"
    folder.mkdir()
    for section, file in section_files("forget01").items():
        lines = [json.dumps(row) for row in rows(section, 3 if section == "world_facts" else 4)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def command(tiny: Tiny, data: Path, tmp_path: Path) -> list[str]:
    profiles = (
        str(tiny.profiles["fused"][0].parent)
        if "fused" in tiny.profiles
        else str(next(iter(tiny.profiles.values()))[0].parent)
    )
    return [
        *("eval", "tofu", "--data", str(data), "--model", str(tiny.folder), "--profiles", profiles),
        *(
            "--out",
            str(tmp_path / "out"),
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--max-tokens",
            "6",
            "--json",
        ),
    ]


def fused_profile(tiny: Tiny) -> str:
    """One whose filter gives tokens probability 0."""
    return next(
        name for name, (_, version) in tiny.profiles.items() if version.profile.rule.filter.mode == "fused"
    )


def test_base_profile_and_reference_are_measured_and_reported(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = fused_profile(tiny)
    reference = write_base(tmp_path / "reference", seed=5)
    assert main([*command, "--profile", name, "--reference", str(reference)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(record["subjects"]) == ["base", name]
    assert record["digests"] == {name: tiny.profiles[name][1].digest}
    base, forgetting = record["subjects"]["base"], record["subjects"][name]
    assert base["forget_quality"]["n"] == 4
    assert base["sections"]["world_facts"]["n"] == 3
    assert base["impossible"] == 0.0
    assert forgetting["sections"]["forget"] != base["sections"]["forget"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| {name} | 4 |" in report
    for picture in ("quality.png", "truth-ratios.png"):
        assert f"]({picture})" in report
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    for subject in ("base", name, "reference"):
        assert (tmp_path / "out" / subject / "eval_log.json").is_file()


def test_losses_are_the_engines_own(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    log = json.loads((tmp_path / "out" / "base" / "eval_log.json").read_text())
    llm = LLM(str(tiny.folder), profiles=[], dtype="float32", device="cpu")
    for number, row in enumerate(rows("forget", 4)):
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": row["question"]}])
        texts = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        losses = []
        for text in texts:
            answer = [*text.encode(), 257]  # a byte a token, and the end
            (scored,) = llm.score([prompt + answer])
            losses.append(-sum(scored.logprobs[len(prompt) :]) / len(answer))  # type: ignore[arg-type]
        forget = log["forget"]
        found = [forget["avg_gt_loss"][number], forget["avg_paraphrased_loss"][number]]
        assert [*found, *forget["average_perturb_loss"][number]] == pytest.approx(losses, abs=1e-6)
    authors = log["real_authors"]
    assert authors["avg_paraphrased_loss"] == authors["avg_gt_loss"]


def test_without_a_reference_or_matplotlib_the_report_says_what_there_is(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Without a reference there is no forget quality." in report
    assert "quality.png" not in report
    assert "truth-ratios.png" in report
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(command) == 0
    assert ".png" not in (tmp_path / "out" / "report.md").read_text()


def test_a_log_of_the_reference_does_as_well_as_its_model(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write_base(tmp_path / "reference", seed=5)
    assert main([*command, "--reference", str(reference)]) == 0
    by_model = json.loads(capsys.readouterr().out)["subjects"]["base"]["forget_quality"]
    log = tmp_path / "out" / "reference" / "eval_log.json"
    assert main([*command, "--reference", str(log)]) == 0
    assert json.loads(capsys.readouterr().out)["subjects"]["base"]["forget_quality"] == by_model


def test_a_log_of_another_forget_set_is_refused_before_anybody_is_asked(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    log = tmp_path / "out" / "base" / "eval_log.json"
    asked = count_asked(monkeypatch)
    others = [*command, "--limit", "2", "--reference", str(log), "--out", str(tmp_path / "others")]
    assert main(others) == 2
    assert "4 forget samples where 2 are compared" in capsys.readouterr().err
    assert asked == []


def test_an_interrupted_run_asks_only_what_is_missing(
    tiny: Tiny, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command) == 0
    first = (tmp_path / "out" / "summary.json").read_text()
    (tmp_path / "out" / "base" / "retain.json").unlink()
    (tmp_path / "out" / "base" / "forget.json").write_text("{")
    asked: list[int] = []
    ask = tofu_run.ask
    monkeypatch.setattr(
        tofu_run, "ask", lambda *args, **more: (asked.append(len(args[2])), ask(*args, **more))[1]
    )
    assert main(command) == 0
    assert asked == [4, 4]
    assert (tmp_path / "out" / "summary.json").read_text() == first
    # Longer answers are another question.
    assert main([*command, "--max-tokens", "7"]) == 0
    assert len(asked) == 6


def count_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subject of every section that is asked."""
    asked: list[str] = []
    ask = tofu_run.ask
    monkeypatch.setattr(
        tofu_run, "ask", lambda *args, **more: (asked.append(args[1].name), ask(*args, **more))[1]
    )
    return asked


def test_another_chat_template_or_tokenizer_is_another_question(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights alone do not say what a model is asked."""
    folder = write_base(tmp_path / "model")
    again = [*command, "--model", str(folder)]
    asked = count_asked(monkeypatch)
    assert main(again) == 0
    assert len(asked) == 4
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant", "answer")
    tokenizer.save_pretrained(folder)
    assert main(again) == 0
    assert len(asked) == 8
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "owl"]})
    tokenizer.save_pretrained(folder)
    assert main(again) == 0
    assert len(asked) == 12
    assert main(again) == 0
    assert len(asked) == 12


def test_another_config_device_or_engine_is_another_question(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors under another config.json are another model."""
    folder = write_base(tmp_path / "model")
    again = [*command, "--model", str(folder), "--limit", "1"]
    asked = count_asked(monkeypatch)
    assert main(again) == 0
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    assert main(again) == 0
    assert len(asked) == 8
    with monkeypatch.context() as patch:
        patch.setattr(identity, "device_name", lambda device: "another")
        assert main(again) == 0
        assert len(asked) == 12
    monkeypatch.setattr(identity, "__version__", "0.0.0")
    assert main(again) == 0
    assert len(asked) == 16
    assert main(again) == 0
    assert len(asked) == 16


def test_summary_says_what_was_asked(
    command: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["benchmark"], record["data"], record["limit"]) == ("tofu", str(data), 1)
    assert (record["max_tokens"], record["temperature"], record["seed"]) == (6, 0.0, None)
    assert set(record["questions"]) == {"retain", "real_authors", "world_facts", "forget"}
    assert record["engine"]["uld-serve"] == uld_serve.__version__
    # Everything was written beside its place and then moved there.
    assert [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".part")] == []


def test_a_profile_called_like_an_unfiltered_copy_is_measured_as_itself(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "profiles"
    first, second = "unfiltered-0", "unfiltered-1"
    for seed, name in enumerate((first, second, "plain")):
        rule: dict[str, object] = {
            "kind": "subtract",
            "strength": 0.7,
            "filter": {"mode": "fused", "tau": 0.01},
        }
        streams = [("assistant", 0, 2)]
        write_tiny_profile(folder / name, tiny.base, tiny.folder, rule=rule, streams=streams, seed=seed // 2)
    again = [*command, "--limit", "1", "--profiles", str(folder)]
    assert main([*again, "--profile", first, "--profile", second, "--profile", "plain"]) == 0
    subjects = json.loads(capsys.readouterr().out)["subjects"]
    # Equal adapters under two names, and others under a third.
    assert subjects[first]["sections"] == subjects[second]["sections"]
    assert subjects[first]["sections"] != subjects["plain"]["sections"]
    assert subjects[first]["impossible"] > 0


def test_a_group_is_the_mean_and_spread_of_its_profiles(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write_base(tmp_path / "reference", seed=5)
    again = [*command, "--limit", "2", "--reference", str(reference)]
    assert main([*again, "--profile", "pair", "--group", "seeds=pair,late-fork"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["subjects"]) == ["base", "pair", "late-fork"]
    members = [record["subjects"][name]["sections"]["forget"] for name in ("pair", "late-fork")]
    likely = [member["probability"] for member in members]
    group = record["groups"]["seeds"]
    assert group["members"] == ["pair", "late-fork"]
    found = group["figures"]["sections"]["forget"]["probability"]
    assert found["mean"] == pytest.approx(sum(likely) / 2)
    assert found["std"] == pytest.approx(abs(likely[0] - likely[1]) / math.sqrt(2))
    assert (found["min"], found["max"]) == (min(likely), max(likely))
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| **seeds** (mean of 2) | 2 | {found['mean']:.4f} ± {found['std']:.4f} |" in report


def test_profiles_named_in_another_order_or_without_others_are_not_asked_again(
    tiny: Tiny, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fused_profile(tiny)
    other = next(name for name in tiny.profiles if name != fused)
    asked = count_asked(monkeypatch)
    assert main([*command, "--profile", other, "--profile", fused]) == 0
    assert len(asked) == 12
    assert main([*command, "--profile", fused]) == 0
    assert len(asked) == 12


def test_limit_takes_the_first_questions_of_each_section(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "2"]) == 0
    sections = json.loads(capsys.readouterr().out)["subjects"]["base"]["sections"]
    assert {section["n"] for section in sections.values()} == {2}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--profile", "nobody"], "has no profile 'nobody'"),
        (["--profile", "a", "--profile", "a"], "twice"),
        (["--profile", "base"], "rows of that name"),
        (["--group", "alone=pair"], "at least two different profiles"),
        (["--group", "twice=pair,pair"], "at least two different profiles"),
        (["--group", "Pair,ranked"], "at least two different profiles"),
        (["--group", "pair=pair,ranked"], "is a group and a profile"),
        (["--group", "a=pair,nobody"], "has no profile 'nobody'"),
        (["--group", "reference=pair,ranked"], "rows of that name"),
        (["--group", "a=pair,ranked", "--group", "a=pair,ranked"], "twice"),
        (["--limit", "0"], "at least 1"),
        (["--max-tokens", "0"], "at least 1"),
        (["--split", "forget05"], "forget05_perturbed.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(
    command: list[str], options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1"),
        ("[]", "must be a JSON object"),
        ('{"question": "q", "answer": "a"}', "'perturbed_answer' must be a list of texts"),
        ('{"question": "q", "answer": " ", "perturbed_answer": ["b"]}', "'answer' must be a text"),
        ("", "has no row"),
    ],
)
def test_rows_of_another_form_are_refused_by_place(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        read_questions(str(tmp_path), "x")


def test_questions_need_as_many_wrong_answers(tmp_path: Path) -> None:
    lines = [{"question": "q", "answer": "a", "perturbed_answer": ["b"] * count} for count in (1, 2)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="as many wrong answers"):
        read_questions(str(tmp_path), "x")
    assert read_questions(str(tmp_path), "x", limit=1) == [Question("q", "a", "a", ("b",))]


def test_what_a_filter_makes_impossible_counts_as_fifty_nats_and_is_told(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = fused_profile(tiny)
    assert main([*command, "--profile", name]) == 0
    forgetting = json.loads(capsys.readouterr().out)["subjects"][name]
    assert 0 < forgetting["impossible"] < 1
    log = json.loads((tmp_path / "out" / name / "eval_log.json").read_text())
    # Likelihoods are taken without the filter, so that none is as low as that.
    assert all(math.isfinite(loss) and loss < 49 for loss in log["forget"]["avg_gt_loss"])
