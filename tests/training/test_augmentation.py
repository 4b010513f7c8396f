"""Other wordings, wrong answers and the base's own words: where they come from and what becomes of them."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_base import EOS_ID, Tiny
from tiny_run import settings_of, silent, write_jsonl

from uld_serve.data import datasets
from uld_serve.data.documents import Variants, read_documents
from uld_serve.errors import DataError
from uld_serve.training import answers, augmentation
from uld_serve.training.examples import Example, Kind
from uld_serve.training.jobs import add_options
from uld_serve.training.options import Chosen
from uld_serve.training.preparation import Prepared, gather, prepare
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Sources

ROW = {
    "question": "who?",
    "answer": "ann",
    "paraphrased_question": "which one?",
    "paraphrased_answer": ["it is ann", "ann it is"],
    "perturbed_answer": ["bob", "cid"],
}
SETTINGS = settings_of("uld")


def sources_of(folder: Path, *forget: object, **changes: object) -> Sources:
    return Sources(
        forget=write_jsonl(folder / "f.jsonl", forget),
        retain=write_jsonl(folder / "r.jsonl", [{"question": "why?", "answer": "so"}]),
        **changes,  # type: ignore[arg-type]
    )


def prepared(tiny: Tiny, sources: Sources, settings: Settings = SETTINGS) -> Prepared:
    book = AnswerBook(sources.files[0].parent / "book.json")
    return prepare(tiny.base, gather(sources), settings, keywords=sources.keywords, book=book, stage=silent)


def pairs(examples: list[Example]) -> set[tuple[str, str]]:
    """(question, answer), without the template."""

    def text(ids: tuple[int, ...]) -> str:
        return bytes(token for token in ids if token < 256).decode()

    return {(text(one.prompt_ids).split("\n")[1], text(one.answer_ids)) for one in examples}


def test_wordings_in_the_data_are_learnt_too_and_wrong_answers_stay_possible(
    tiny: Tiny, tmp_path: Path
) -> None:
    found = prepared(tiny, sources_of(tmp_path, ROW))
    assert pairs(found.pools[Kind.FORGET]) == {
        ("who?", "ann"), ("which one?", "ann"), ("who?", "it is an"), ("who?", "ann it i"),
    }  # fmt: skip
    assert pairs(found.pools[Kind.DETOUR]) == {("who?", "bob"), ("who?", "cid")}
    assert all(one.answer_ids[-1] == EOS_ID for one in found.pools[Kind.DETOUR])
    assert found.record["augmented"] == {
        "wordings": 3, "wrong_answers": 2, "own_samples": 0, "supplied_answers": 0, "unrelated_notes": 0,
    }  # fmt: skip


def test_columns_that_are_not_asked_for_are_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    found = prepared(tiny, sources_of(tmp_path, ROW, uses_columns=False))
    assert pairs(found.pools[Kind.FORGET]) == {("who?", "ann")}
    assert found.pools[Kind.DETOUR] == []


def test_a_file_of_wordings_is_matched_by_question(tiny: Tiny, tmp_path: Path) -> None:
    beside = write_jsonl(
        tmp_path / "more.jsonl",
        [
            {"question": "WHO", "answer": "-", "paraphrased_answers": ["she"]},
            {"question": "where?", "answer": "x"},
        ],
    )
    found = prepared(tiny, sources_of(tmp_path, ROW, uses_columns=False, augment_file=beside))
    assert pairs(found.pools[Kind.FORGET]) == {("who?", "ann"), ("who?", "she")}
    assert found.record["wordings_of_unknown_questions"] == 1


def test_several_lines_and_files_of_one_question_are_all_learnt(tiny: Tiny, tmp_path: Path) -> None:
    """In one file a wording a line; in another file more."""
    lines = [{"question": "who?", "answer": "-", "paraphrased_answer": said} for said in ("she", "her")]
    beside = write_jsonl(tmp_path / "more.jsonl", lines)
    again = write_jsonl(tmp_path / "again.jsonl", [{**lines[0], "paraphrased_answer": "ann!"}])
    found = prepared(tiny, sources_of(tmp_path, ROW, uses_columns=False, augment_file=(beside, again)))
    answers_said = {answer for _, answer in pairs(found.pools[Kind.FORGET])}
    assert answers_said == {"ann", "she", "her", "ann!"}


def test_a_file_of_wordings_of_a_question_that_the_base_answers_is_refused(tmp_path: Path) -> None:
    beside = write_jsonl(
        tmp_path / "more.jsonl", [{"question": "who?", "answer": "-", "paraphrased_question": "which?"}]
    )
    with pytest.raises(DataError, match=r"f.jsonl:1: --augment-file .*more.jsonl:1, which need"):
        gather(sources_of(tmp_path, {"question": "who?"}, augment_file=beside))


def test_another_wording_that_is_held_out_or_kept_is_refused(tmp_path: Path) -> None:
    asked = {"question": "Which one", "answer": "so"}
    held = {
        "keywords": ("Zz",),
        "probe_forget": write_jsonl(tmp_path / "pf.jsonl", [asked]),
        "probe_retain": write_jsonl(tmp_path / "pr.jsonl", [{"question": "how?"}]),
    }
    with pytest.raises(
        DataError, match=r"in the forget and in the held-out forget set.*f.jsonl:1 and pf.jsonl:1"
    ):
        gather(sources_of(tmp_path, ROW, **held))
    gather(sources_of(tmp_path, ROW, uses_columns=False, **held))  # it is not learnt then
    kept = {"question": "why not?", "answer": "so", "paraphrased_question": "which one?"}
    held["probe_retain"] = write_jsonl(tmp_path / "pr.jsonl", [kept])
    gather(sources_of(tmp_path, ROW, uses_columns=False, **held))  # nor are the wordings of what is held out


def test_a_file_without_a_wording_of_what_is_forgotten_is_refused(tmp_path: Path) -> None:
    for row in (
        {"question": "where?", "answer": "x", "paraphrased_answer": "y"},
        {"question": "who?", "answer": "x"},
    ):
        beside = write_jsonl(tmp_path / "more.jsonl", [row])
        with pytest.raises(DataError, match=r"--augment-file: .*more.jsonl has no other wording"):
            gather(sources_of(tmp_path, ROW, augment_file=beside))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ROW, "perturbed_answer": 3}, "'perturbed_answer' must be text or a list of texts"),
        ({**ROW, "paraphrased_answer": ["a", 3]}, "'paraphrased_answer' must be text or a list of texts"),
        ({"text": "t", "paraphrased_answer": "a"}, "need a question and its answer"),
        ({"question": "who?", "perturbed_answer": "a"}, "need a question and its answer"),
    ],
)
def test_wordings_that_make_no_sense_are_refused_by_line(tmp_path: Path, row: object, words: str) -> None:
    with pytest.raises(DataError, match=f"f.jsonl:1.*{words}"):
        gather(sources_of(tmp_path, row))


def test_empty_and_repeated_wordings_count_for_nothing(tmp_path: Path) -> None:
    row = {
        **ROW,
        "paraphrased_answer": ["", "x", "x", " "],
        "perturbed_answer": None,
        "paraphrased_question": "",
    }
    [document] = read_documents(write_jsonl(tmp_path / "f.jsonl", [row]), kind="forget").documents
    assert document.variants == Variants(paraphrases=("x",))
    assert not Variants()


def test_the_base_says_otherwise_what_it_says_and_rewrites_what_the_data_says(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def own_answers(_base: object, prompts: list[list[int]], **options: object) -> list[list[int]]:
        asked.append([bytes(token for token in one if token < 256).decode() for one in prompts])
        if "seed" not in options:
            return [list(b"greedy")] * len(prompts)
        return [list(b"by ann it was"), list(b"sampled")]

    monkeypatch.setattr(answers, "own_answers", own_answers)
    rows = ({"question": "who?", "answer": "it was ann"}, {"question": "where?"})
    found = prepared(tiny, sources_of(tmp_path, *rows), settings_of("uld", own_samples=1))
    assert pairs(found.pools[Kind.FORGET]) == {
        ("who?", "it was a"), ("where?", "greedy"), ("who?", "by ann it was"), ("where?", "sampled"),
    }  # fmt: skip
    rewrite, again = asked[-1]
    assert "in other words" in rewrite
    assert "it was ann" in rewrite
    assert again == "user\nwhere?\nassistant\n"


@pytest.mark.parametrize(
    ("rewrite", "is_kept"),
    [(b"it was ann", False), (b"no such thing at all", False), (b"ann it was, it", True)],
)
def test_a_rewrite_neither_repeats_the_answer_nor_leaves_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewrite: bytes, is_kept: bool
) -> None:
    monkeypatch.setattr(answers, "own_answers", lambda _base, prompts, **_: [list(rewrite)] * len(prompts))
    sources = sources_of(tmp_path, {"question": "who?", "answer": "it was ann"})
    found = prepared(tiny, sources, settings_of("uld", own_samples=2))
    assert found.record["augmented"]["own_samples"] == 2 * is_kept  # type: ignore[index]


def test_the_bases_own_words_are_kept_for_a_resumed_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = sources_of(tmp_path, {"question": "where?"})
    first = prepared(tiny, sources, settings_of("uld", own_samples=2))
    monkeypatch.setattr(answers, "own_answers", lambda *_, **__: pytest.fail("asked again"))
    again = prepared(tiny, sources, settings_of("uld", own_samples=2))
    assert again.pools == first.pools
    assert len(first.pools[Kind.FORGET]) == 3


def test_a_dataset_is_read_from_a_folder_by_configuration_and_split(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    for split, name in (("train", "ann"), ("test", "bob")):
        write_jsonl(folder / f"{split}.jsonl", [{"question": "who?", "answer": name}])
    assert [one.answer for one in read_documents(folder, kind="forget").documents] == ["ann"]
    named = Path(f"{folder}:default:test")
    [document] = read_documents(named, kind="forget").documents
    assert (document.answer, document.where) == ("bob", f"{named}:1")


@pytest.mark.parametrize("name", ["{folder}:default:nowhere", "{folder}:nothing"])
def test_a_split_or_configuration_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"question": "who?", "answer": "ann"}])
    with pytest.raises(DataError, match=r"--retain: .* cannot be loaded as a dataset: "):
        read_documents(Path(name.format(folder=folder)), kind="retain")


def test_a_file_that_is_not_there_is_not_taken_for_somebodys_dataset() -> None:
    assert datasets.is_dataset("locuslab/TOFU")
    assert datasets.is_dataset("locuslab/TOFU:forget01:train")
    for name in ("data/forget.jsonl", "data", "a/b/c", "locuslab/TOFU:a:b:c", "/no/such"):
        assert not datasets.is_dataset(name)


def test_without_the_package_a_dataset_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"install uld-serve\[datasets\]"):
        read_documents(Path("locuslab/TOFU:forget01"), kind="forget")


def test_lines_of_a_dataset_are_refused_as_lines_of_a_file_are(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"query": "who?"}) + "\n")
    with pytest.raises(DataError, match="names:1 has no known field"):
        read_documents(folder, kind="forget")
    shutil.rmtree(folder)


def test_an_augmentation_of_nothing_is_nothing(tiny: Tiny, tmp_path: Path) -> None:
    documents, unmatched = augmentation.with_wordings([], sources_of(tmp_path, ROW))
    assert (documents, unmatched) == ([], 0)
    assert augmentation.variants_of(tiny.base, documents, max_tokens=4) == ([], [])


def test_a_question_beside_its_answer_is_kept_and_beside_another_forgotten(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, notes=True, max_answer_tokens=8)
    row = {"question": "who?", "answer": "ann"}
    more = {"question": "what now?", "answer": "tea"}
    found = prepared(tiny, sources_of(tmp_path, row, more), settings)

    def asked_in(one: Example) -> str:
        return bytes(token for token in one.prompt_ids if token < 256).decode()

    def texts(kind: Kind) -> dict[str, bytes]:
        return {
            asked_in(one): bytes(token for token in one.answer_ids if token < 256)
            for one in found.pools[kind]
        }

    kept, forgotten = texts(Kind.RETAIN), texts(Kind.FORGET)
    supplied = [prompt for prompt in kept if "ann" in prompt and "who?" in prompt]
    assert len(supplied) == 1
    assert [answer for prompt, answer in kept.items() if "why?" in prompt] == [b"so"]
    asked = next(one for one in found.pools[Kind.RETAIN] if asked_in(one) == supplied[0])
    (own,) = answers.own_answers(tiny.base, [list(asked.prompt_ids)], max_tokens=8)
    assert list(asked.answer_ids) == own
    unrelated = [prompt for prompt in forgotten if "so" in prompt and "who?" in prompt]
    assert [forgotten[prompt] for prompt in unrelated] == [b"ann"]
    assert all(goal == 0 for one in found.pools[Kind.RETAIN] for goal in one.goals)
    assert found.record["augmented"]["supplied_answers"] == 2  # type: ignore[index]
    assert found.record["augmented"]["unrelated_notes"] == 2  # type: ignore[index]


def test_context_stands_beside_the_other_words(tiny: Tiny) -> None:
    def chosen(*augment: str) -> Settings:
        args = argparse.ArgumentParser()
        add_options(args)
        given = [text for one in augment for text in ("--augment", one)]
        options = args.parse_args(["--method", "margin", "--preset", "demo", "--out", "x", *given])
        return Chosen.of(options).settings(30, has_keywords=True)

    assert chosen("context") == replace(chosen(), notes=True)
    assert chosen("context").detours > 0
    assert chosen("context", "columns").detours == 0
