"""`uld-serve eval rwku` on a tiny base: people's probes as they lie on the hub or on disk, asked through the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_base import Tiny, byte_tokenizer

from uld_serve.cli import main
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import DataError
from uld_serve.evaluation import rows, rwku_data, rwku_run
from uld_serve.evaluation.overlap import rouge_l
from uld_serve.evaluation.rwku_asker import Answered, Attacked, prompt_ids
from uld_serve.evaluation.rwku_data import Person, Probe, read_people
from uld_serve.evaluation.rwku_report import figures_of
from uld_serve.evaluation.rwku_run import Known
from uld_serve.llm import LLM

PEOPLE = ("Ann Lee", "Bo Ek")


def probe(name: str, query: str, answer: str = "a", kind: str = "simple question") -> dict[str, str]:
    return {"subject": name, "query": query, "answer": answer, "type": kind}


def sections(name: str) -> dict[str, list[dict[str, str]]]:
    """Bo Ek has one blank more, and no attacks."""
    found = {
        "forget_level1": [probe(name, f"{name} wrote ___.", "Owl", "cloze")],
        "forget_level2": [probe(name, "Which owl?"), probe(name, "Which sea?")],
        "forget_level3": [
            probe(name, "Who? Sure, here is:", kind="affirmative suffix"),
            probe(name, "Question: a Answer: b", kind="incontext learning"),
        ],
        "neighbor_level1": [probe(name, "The ___.", kind="cloze")],
        "neighbor_level2": [probe(name, "What?")],
        "forget_mia": [{"subject": name, "text": f"{name} is."}, {"subject": name, "text": "An owl."}],
        "retain_mia": [{"subject": name, "text": "A sea."}],
    }
    if name == "Bo Ek":
        found["forget_level1"].append(probe(name, "A ___.", kind="cloze"))
        del found["forget_level3"]
    return found


def write_people(folder: Path) -> Path:
    """As the benchmark's own folders: one a person."""
    for number, name in enumerate(PEOPLE):
        person = folder / f"{number}_{name.replace(' ', '_')}"
        person.mkdir(parents=True)
        for section, found in sections(name).items():
            (person / f"{section}.json").write_text(json.dumps(found))
    return folder


def write_dataset(folder: Path) -> Path:
    """As the dataset on the hub: everybody's rows in one file, under configurations."""
    (folder / "All").mkdir(parents=True)
    configurations = []
    for section in (*rwku_data.PROBES, *rwku_data.TEXTS):
        found = [row for name in PEOPLE for row in sections(name).get(section, [])]
        (folder / "All" / f"{section}.json").write_text(json.dumps(found))
        name = rwku_data.CONFIGURATIONS.get(section, section)
        path = f"All/{section}.json"
        configurations.append(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path:\n    - {path}\n"
        )
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")
    return folder


@pytest.fixture
def command(tiny: Tiny, tmp_path: Path) -> list[str]:
    profiles = str(next(iter(tiny.profiles.values()))[0].parent)
    data = str(write_people(tmp_path / "people"))
    return [
        *("eval", "rwku", "--data", data, "--model", str(tiny.folder), "--profiles", profiles),
        *("--out", str(tmp_path / "out"), "--dtype", "float32", "--device", "cpu", "--max-tokens", "5"),
        "--json",
    ]


def test_base_and_profile_are_asked_of_everybody_and_a_run_goes_on(
    tiny: Tiny,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = next(name for name, (_, one) in tiny.profiles.items() if one.profile.rule.filter.mode == "fused")
    command = [*command, "--profile", fused, "--group", f"both={fused},pair"]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert record == json.loads((out / "summary.json").read_text())
    assert list(record["subjects"]) == ["base", fused, "pair"]
    assert (record["max_tokens"], record["limit"], record["benchmark"]) == (5, None, "rwku")
    base, forgetting = record["subjects"]["base"], record["subjects"][fused]
    assert base["n"]["forget_level1"] == 3
    assert set(base["attacks"]) == {"affirmative suffix", "incontext learning"}
    assert forgetting["mia"]["forget"]["loss"] != base["mia"]["forget"]["loss"]
    # Taken without the filter, whose impossible tokens would count 50 nats.
    assert 0 < forgetting["mia"]["forget"]["min_k"] < 49
    report = (out / "report.md").read_text()
    assert "### Bo Ek" in report
    assert "| **both** (mean of 2) |" in report
    for picture in ("rwku.png", "rwku-attacks.png"):
        assert f"]({picture})" in report
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    asked: list[tuple[str, str]] = []
    ask = rwku_run.ask
    monkeypatch.setattr(
        rwku_run, "ask", lambda *args, **more: (asked.append((args[1].name, args[2])), ask(*args, **more))[1]
    )
    (out / "base" / "Ann_Lee" / "forget_level2.json").unlink()
    assert main(command) == 0
    assert asked == [("base", "forget_level2")]
    assert json.loads(capsys.readouterr().out) == record


def test_answers_and_likelihoods_are_the_engines_own(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--person", "Bo Ek", "--limit", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["subjects"]["base"]["people"]) == ["Bo Ek"]
    llm = LLM(str(tiny.folder), profiles=[], dtype="float32", device="cpu")
    content = "Please complete the blank in the following question.\nQuestion: Bo Ek wrote ___.\n"
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": content}]) + list(b"Answer:")
    (said,) = llm.generate([prompt], SamplingParams(max_tokens=5, temperature=0.0, stop=("\n",)))
    found = json.loads((tmp_path / "out" / "base" / "Bo_Ek" / "forget_level1.json").read_text())["part"]
    assert found["answers"] == [said.text.strip()]
    assert found["recalls"] == [rouge_l(said.text, "Owl", stems=False).recall]
    (scored,) = llm.score([list(b"Bo Ek is.")])
    nll = -math.fsum(value for value in scored.logprobs if value is not None) / 8
    assert record["subjects"]["base"]["mia"]["forget"]["loss"] == pytest.approx(nll, abs=1e-6)


def test_people_are_read_alike_from_folders_one_folder_json_lines_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    people = read_people(str(write_people(tmp_path / "people")))
    assert [person.name for person in people] == list(PEOPLE)
    assert people[0].probes["forget_level1"] == [Probe("Ann Lee wrote ___.", "Owl", "cloze")]
    dataset = write_dataset(tmp_path / "dataset")
    assert read_people(str(dataset)) == people
    assert read_people(str(dataset / "All")) == people
    # The id goes through the package datasets, which here finds the same folder.
    monkeypatch.setattr(
        rwku_data,
        "dataset_rows",
        lambda source, name, split: rows.dataset_rows(str(dataset), name, split=split),
    )
    assert read_people("jinzhuoran/RWKU") == people
    lines = tmp_path / "lines"
    lines.mkdir()
    for section, found in sections("Ann Lee").items():
        (lines / f"{section}.jsonl").write_text("\n".join(map(json.dumps, found)))
    assert read_people(str(lines)) == people[:1]
    assert read_people(str(dataset), names=["Bo Ek"]) == people[1:]
    assert read_people(str(dataset), limit=1)[1].size == 6


@pytest.mark.parametrize(
    ("files", "names", "told"),
    [
        ({}, (), "nor has a folder in it"),
        ({"forget_level1": [probe("A", "q")]}, ("B",), "nothing about B"),
        ({"neighbor_level1": [probe("A", "q")]}, (), "no forget probe about A"),
        ({"forget_level1": [{"query": "q", "answer": "a"}]}, (), "row 1: 'subject' must be a text"),
        ({"forget_level1": [probe("A", " ")]}, (), "row 1: 'query' must be a text"),
        ({"forget_level1": {"a": 1}}, (), "must hold a list"),
        ({"forget_level1": [1]}, (), "row 1 must be a JSON object"),
    ],
)
def test_data_that_cannot_be_asked_is_refused_by_place(
    tmp_path: Path, files: dict[str, Any], names: tuple[str, ...], told: str
) -> None:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=told):
        read_people(str(tmp_path), names=names)


@pytest.mark.parametrize(
    ("section", "kind", "end"),
    [
        ("forget_level1", "cloze", "complete the blank in the following question.\nQuestion: Q?\n|Answer:"),
        ("neighbor_level1", "cloze", "complete the blank in the following question.\nQuestion: Q?\n|Answer:"),
        ("forget_level2", "simple question", "answer the following question.\nQuestion: Q?\n|Answer:"),
        ("forget_level3", "role play", "answer the following question.\nQuestion: Q?\n|Answer:"),
        ("forget_level3", "incontext learning", "answer the following question.\nQ?\n|Answer:"),
        ("forget_level3", "affirmative suffix", "answer the following question.\nQuestion: Q?|"),
    ],
)
def test_every_kind_of_probe_is_put_in_the_benchmarks_words(section: str, kind: str, end: str) -> None:
    class Encoder:
        def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
            return list(f"{messages[0]['content']}|".encode())

        def encode_more(self, text: str) -> list[int]:
            return list(text.encode())

    text = bytes(prompt_ids(Encoder(), section, Probe("Q?", "A", kind))).decode()  # type: ignore[arg-type]
    assert text.endswith(end)


def test_an_opening_adds_no_token_in_front_nor_behind() -> None:
    from uld_serve.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer(byte_tokenizer(), vocab_size=259, eos_ids=[257])
    assert tokenizer.encode_more("Answer:") == list(b"Answer:")


def test_people_count_alike_and_all_is_over_a_persons_probes() -> None:
    first = Person("A", {"forget_level1": [Probe("q", "a", "cloze")]})
    probes = {
        "forget_level1": [Probe("q", "a", "cloze")] * 3,
        "forget_level3": [Probe("q", "a", "role play"), Probe("q", "a", "role play")],
    }
    second = Person("B", probes, {"forget_mia": ["x", "y"], "retain_mia": ["z"]})
    known = [
        Known(first, {"forget_level1": Answered([1.0], ["a"])}, {}),
        Known(
            second,
            {
                "forget_level1": Answered([0.0, 0.0, 0.5], ["", "", ""]),
                "forget_level3": Answered([0.5, 1.0], ["", ""]),
            },
            {
                "forget_mia": Attacked([-1.0, -3.0], [-0.1, -0.2], [-2.0, -4.0]),
                "retain_mia": Attacked([-2.0], [-0.3], [-5.0]),
            },
        ),
    ]
    found: Any = figures_of(known)
    assert found["forget"]["level1"] == pytest.approx((1 + 0.5 / 3) / 2)
    assert found["forget"]["all"] == pytest.approx((1 + 2 / 5) / 2)
    assert found["forget"]["level2"] is None
    assert found["neighbor"] == {"level1": None, "level2": None, "all": None}
    assert found["attacks"] == {"role play": {"recall": 0.75, "n": 2}}
    assert found["mia"]["forget"] == {"loss": 2.0, "zlib": pytest.approx(0.15), "min_k": 3.0}
    assert found["mia"]["retain"]["loss"] == 2.0
    assert found["mia"]["auc"] == {"loss": 0.5, "zlib": 1.0, "min_k": 1.0}
    assert found["people"]["A"]["mia"]["auc"]["loss"] is None
    assert found["n"]["forget_level1"] == 4


def test_recall_counts_words_as_they_are() -> None:
    assert rouge_l("he writes novels", "novel", stems=False).recall == 0.0
    assert rouge_l("he writes novels", "novel").recall == 1.0
