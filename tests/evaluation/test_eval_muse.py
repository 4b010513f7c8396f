"""`uld-serve eval muse` on a tiny base: texts and questions from files or a dataset, asked through the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import Tiny, write_base

from uld_serve.cli import main
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import DataError
from uld_serve.evaluation import muse_run
from uld_serve.evaluation.membership import min_k_score
from uld_serve.evaluation.muse_asker import Familiar, Said, question_text
from uld_serve.evaluation.muse_data import Pair, read_muse
from uld_serve.evaluation.muse_run import Measured, area_of, figures_of
from uld_serve.evaluation.overlap import rouge_l
from uld_serve.llm import LLM

DATA: dict[str, list[dict[str, str]]] = {
    "verbmem/forget": [
        {"prompt": "Once an owl", "gt": " went to sea."},
        {"prompt": "A map", "gt": " of ink."},
    ],
    "knowmem/forget_qa": [{"question": "Who went?", "answer": "an owl"}],
    "knowmem/forget_qa_icl": [{"question": "What?", "answer": "ink"}, {"question": "When?", "answer": "now"}],
    "knowmem/retain_qa": [{"question": "Which?", "answer": "tea"}, {"question": "Why?", "answer": "so"}],
    "privleak/forget": [{"text": "An owl went."}, {"text": "Ink on maps."}, {"text": "Tea."}],
    "privleak/holdout": [{"text": "Some sea."}, {"text": "No word of it."}],
}


def write_files(folder: Path, ending: str, data: dict[str, Any] = DATA) -> Path:
    for name, found in data.items():
        path = folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) if ending == ".json" else "\n".join(map(json.dumps, found)))
    return folder


def write_dataset(folder: Path) -> Path:
    """As the dataset on the hub: splits of configurations, in files of other names."""
    data = {**DATA, "knowmem/retain_qa_icl": DATA["knowmem/forget_qa_icl"]}
    write_files(folder, "-00000-of-00001.jsonl", data)
    lines = ["---", "configs:"]
    for config in ("verbmem", "knowmem", "privleak"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for name in data:
            if name.startswith(config):
                lines += [f"  - split: {name.split('/')[1]}", f"    path: {name}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture
def command(tiny: Tiny, tmp_path: Path) -> list[str]:
    profiles = str(next(iter(tiny.profiles.values()))[0].parent)
    data = str(write_files(tmp_path / "muse", ".jsonl"))
    return [
        *("eval", "muse", "--data", data, "--model", str(tiny.folder), "--profiles", profiles),
        *("--out", str(tmp_path / "out"), "--dtype", "float32", "--device", "cpu"),
        *("--verbmem-tokens", "6", "--knowmem-tokens", "5", "--json"),
    ]


def test_base_profiles_and_retrained_model_are_asked_and_a_run_goes_on(
    tiny: Tiny,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = write_base(tmp_path / "reference", seed=5)
    command = [*command, "--group", "both=late-fork,pair", "--reference", str(reference)]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert record == json.loads((out / "summary.json").read_text())
    assert list(record["subjects"]) == ["base", "late-fork", "pair", "reference"]
    assert record["max_tokens"] == {"verbmem": 6, "knowmem": 5}
    area = record["subjects"]["reference"]["privleak"]["area"]
    assert record["retrained_area"] == area
    base = record["subjects"]["base"]
    assert base["privleak"]["leak"] == pytest.approx(100 * (base["privleak"]["area"] - area) / area)
    assert record["subjects"]["reference"]["privleak"]["leak"] == 0.0
    report = (out / "report.md").read_text()
    assert "| **both** (mean of 2) |" in report
    assert "KnowMem forget 1 with 2 examples in front, KnowMem retain 2 with 0 examples" in report
    assert "](muse.png)" in report
    assert (out / "muse.png").read_bytes().startswith(b"\x89PNG")
    asked: list[str] = []
    answer = muse_run.answer
    monkeypatch.setattr(
        muse_run, "answer", lambda *args, **more: (asked.append(args[1].name), answer(*args, **more))[1]
    )
    (out / "pair" / "knowmem_forget.json").unlink()
    assert main(command) == 0
    assert asked == ["pair"]
    assert json.loads(capsys.readouterr().out) == record


def test_texts_and_likelihoods_are_the_engines_own(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--min-k", "0.3", "--reference-area", "0.5"]) == 0
    base = json.loads(capsys.readouterr().out)["subjects"]["base"]
    llm = LLM(str(tiny.folder), profiles=[], dtype="float32", device="cpu")
    params = SamplingParams(max_tokens=6, temperature=0.0)
    said = [one.text for one in llm.generate(["Once an owl", "A map"], params)]
    part = json.loads((tmp_path / "out" / "base" / "verbmem.json").read_text())["part"]
    assert part["texts"] == said
    # A byte a token: six of each text are compared.
    f1 = [
        rouge_l(text, truth, stems=False).f1 for text, truth in zip(said, (" went ", " of in"), strict=True)
    ]
    assert part["f1"] == f1
    question = "Question: What?\nAnswer: ink\n\nQuestion: When?\nAnswer: now\n\nQuestion: Who went?\nAnswer:"
    params = SamplingParams(max_tokens=5, temperature=0.0, stop=("\n\n", "\nQuestion", "Question:"))
    (answered,) = llm.generate([question], params)
    part = json.loads((tmp_path / "out" / "base" / "knowmem_forget.json").read_text())["part"]
    assert part["texts"] == [answered.text]
    (scored,) = llm.score([list(b"Tea.")])
    logprobs = [value for value in scored.logprobs if value is not None]
    part = json.loads((tmp_path / "out" / "base" / "privleak_forget.json").read_text())["part"]
    assert part["min_k"][2] == pytest.approx(min_k_score(logprobs, share=0.3), abs=1e-6)
    assert base["privleak"]["leak"] == pytest.approx(100 * (base["privleak"]["area"] - 0.5) / 0.5)


def test_data_is_read_alike_from_lists_lines_and_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = read_muse(str(write_files(tmp_path / "lines", ".jsonl")))
    assert lines.verbmem[0] == Pair("Once an owl", " went to sea.")
    assert lines.knowmem["forget"] == [Pair("Who went?", "an owl")]
    assert list(lines.examples) == ["forget"]
    assert lines.size == 2 + 1 + 2 + 3 + 2
    assert read_muse(str(write_files(tmp_path / "list", ".json"))) == lines
    # No file of ours is there: the folder is read by the package datasets, as an id would be.
    dataset = read_muse(str(write_dataset(tmp_path / "dataset")))
    assert list(dataset.examples) == ["forget", "retain"]
    assert (dataset.verbmem, dataset.knowmem, dataset.privleak) == (
        lines.verbmem,
        lines.knowmem,
        lines.privleak,
    )
    limited = read_muse(str(tmp_path / "lines"), limit=1)
    assert limited.size == 5
    assert len(limited.examples["forget"]) == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"knowmem/forget_qa_icl": DATA["knowmem/forget_qa_icl"]}, "has none of verbmem/forget"),
        ({"privleak/forget": DATA["privleak/forget"]}, "needs both splits"),
        ({"verbmem/forget": [{"prompt": "a"}]}, "verbmem/forget, row 1: 'gt' must be a text"),
        ({"privleak/forget": [{"text": "a"}], "privleak/holdout": [{}]}, "row 1: 'text' must be a text"),
    ],
)
def test_data_that_cannot_be_asked_is_refused_by_place(
    tmp_path: Path, data: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read_muse(str(write_files(tmp_path, ".json", data)))


def test_a_folder_without_any_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match="cannot be loaded as a dataset"):
        read_muse(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--min-k", "0"], "--min-k"),
        (["--verbmem-tokens", "0"], "at least 1"),
        (["--reference-area", "1.5"], "--reference-area"),
        (["--reference-area", "0.5", "--reference", "x"], "give one of them"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(
    command: list[str], options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *options]) == 2
    assert told in capsys.readouterr().err


def test_a_text_of_one_token_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(command[command.index("--data") + 1])
    (data / "privleak" / "holdout.jsonl").write_text('{"text": "a"}')
    assert main([*command, "--limit", "1"]) == 2
    assert "fewer than two tokens" in capsys.readouterr().err


def test_a_memorised_forget_set_leaks_all_and_a_retrained_model_nothing() -> None:
    memorised = Measured(None, {}, {"forget": Familiar([-1.0, -2.0]), "holdout": Familiar([-3.0, -4.0])})
    assert area_of(memorised) == 0.0
    found: Any = figures_of(memorised, 0.5)
    assert found["privleak"] == {"leak": -100.0, "area": 0.0}
    assert found["verbmem"] == {"f1": None, "recall": None, "n": 0}
    found = figures_of(memorised, None)
    assert found["privleak"]["leak"] is None
    # Relative to nothing.
    found = figures_of(memorised, 0.0)
    assert found["privleak"]["leak"] is None


def test_figures_are_means_of_f1_and_of_recall() -> None:
    measured = Measured(Said([0.5, 1.0], [0.0, 1.0], ["", ""]), {"retain": Said([0.2], [0.4], [""])}, {})
    found: Any = figures_of(measured, 0.5)
    assert found["verbmem"] == {"f1": 0.75, "recall": 0.5, "n": 2}
    assert found["knowmem"]["retain"] == {"f1": 0.2, "recall": 0.4, "n": 1}
    assert found["knowmem"]["forget"]["f1"] is None
    assert found["privleak"] == {"leak": None, "area": None}


def test_examples_come_before_the_question() -> None:
    assert question_text("Q?", [Pair("P?", "A")]) == "Question: P?\nAnswer: A\n\nQuestion: Q?\nAnswer:"
