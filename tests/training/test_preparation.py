"""From files to lessons: the base's own answers, what is dropped, detours, goals, held-out sets and the answer book."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_base import EOS_ID, Tiny
from tiny_run import FORGET, RETAIN, settings_of, silent, write_jsonl, write_questions, write_sources

from uld_serve.errors import DataError
from uld_serve.training import answers
from uld_serve.training.examples import Goals, Kind, common_tokens
from uld_serve.training.preparation import Prepared, gather, prepare
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Sources

PLAIN = settings_of("rkld")


def prepared(
    tiny: Tiny, sources: Sources, book: Path, settings: Settings = PLAIN, *, heard: list[str] | None = None
) -> Prepared:
    def stage(what: str, total: int) -> Callable[[int], None]:
        if heard is not None:
            heard.append(f"{what} ({total})")
        return silent(what, total)

    return prepare(
        tiny.base,
        gather(sources),
        settings,
        keywords=sources.keywords,
        book=AnswerBook(book),
        stage=stage,
    )


@torch.no_grad()
def greedy(tiny: Tiny, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """One token at a time through the model's own forward."""
    answer: list[int] = []
    while len(answer) < num_tokens and (not answer or answer[-1] != EOS_ID):
        logits = tiny.base.model(torch.tensor([[*prompt, *answer]])).logits
        answer.append(int(logits[0, -1, : tiny.base.vocab_size].argmax()))
    return answer


def test_prompts_without_an_answer_get_the_bases_own(tiny: Tiny, tmp_path: Path) -> None:
    sources = Sources(
        forget=write_jsonl(
            tmp_path / "f.jsonl",
            [{"question": "who?"}, {"question": "a much longer question is this one?"}, {"prompt": "once"}],
        ),
        retain=write_jsonl(tmp_path / "r.jsonl", [{"question": "why?", "answer": "so"}]),
    )
    found = prepared(tiny, sources, tmp_path / "book.json").pools
    first, _, plain = found[Kind.FORGET]
    assert bytes(i for i in first.prompt_ids if i < 256) == b"user\nwho?\nassistant\n"
    assert plain.prompt_ids == tuple(b"once")
    for example in found[Kind.FORGET]:
        assert list(example.answer_ids) == greedy(tiny, example.prompt_ids, PLAIN.max_answer_tokens)
    assert found[Kind.RETAIN][0].answer_ids == (*b"so", EOS_ID)


def test_own_answers_never_name_a_padded_row_and_stop_at_the_end_token(tiny: Tiny) -> None:
    prompts = [list(b"padding"), list(b"a")]
    sampled = answers.own_answers(tiny.base, prompts, max_tokens=60, temperature=50.0, seed=1)
    assert max(max(answer) for answer in sampled) < tiny.base.vocab_size
    assert all(EOS_ID not in answer[:-1] for answer in sampled)
    assert sampled == answers.own_answers(tiny.base, prompts, max_tokens=60, temperature=50.0, seed=1)
    assert sampled != answers.own_answers(tiny.base, prompts, max_tokens=60, temperature=50.0, seed=2)


def test_answers_are_cut_and_texts_are_learnt_piece_by_piece(tiny: Tiny, tmp_path: Path) -> None:
    sources = Sources(
        forget=write_jsonl(tmp_path / "f.jsonl", [{"text": "0123456789abcdefghij"}, {"text": "x"}]),
        retain=write_jsonl(
            tmp_path / "r.jsonl",
            [{"question": "why?", "answer": "abcdefghijkl"}, {"prompt": "p", "completion": "c"}],
        ),
    )
    found = prepared(tiny, sources, tmp_path / "book.json").pools
    pieces = [(bytes(one.prompt_ids), bytes(one.answer_ids)) for one in found[Kind.FORGET]]
    assert pieces == [
        (b"0", b"12345678"),
        (b"12345678", b"9abcdefg"),
        (b"9abcdefg", b"hij"),
    ]  # "x": nothing to predict
    assert [bytes(one.answer_ids) for one in found[Kind.RETAIN]] == [b"abcdefgh", b"c"]


def test_retain_answers_that_name_an_unasked_keyword_are_dropped_and_counted(
    tiny: Tiny, tmp_path: Path
) -> None:
    rows = [
        {"question": "who came?", "answer": "it was HARRY."},  # tells
        {"question": "who is Prince Harry?", "answer": "harry is"},  # asked for
        {"question": "who is Harry?", "answer": "ron"},  # another one than asked for
        {"question": "what now?", "answer": "Harrying"},  # not the word
        {"question": "what then?", "answer": "the end"},
    ]
    sources = Sources(
        forget=write_jsonl(tmp_path / "f.jsonl", [{"question": "who?", "answer": "Harry"}]),
        retain=write_jsonl(tmp_path / "r.jsonl", rows),
        keywords=("Harry", "Ron"),
    )
    settings = settings_of("rkld", max_answer_tokens=20)
    found = prepared(tiny, sources, tmp_path / "book.json", settings)
    kept = [bytes(one.answer_ids[:-1]).decode() for one in found.pools[Kind.RETAIN]]
    assert kept == ["harry is", "Harrying", "the end"]
    assert found.record["retain_dropped_for_naming_a_keyword"] == 2
    assert found.record["examples"] == {"forget": 1, "retain": 3, "detour": 0}
    assert found.record["answer_tokens"] == {"forget": 6, "retain": 9 + 9 + 8, "detour": 0}


def test_avoided_openings_are_never_generated(tiny: Tiny) -> None:
    prompts = [list(question.encode()) for question in FORGET]
    free = answers.own_answers(tiny.base, prompts, max_tokens=12, temperature=0.8, seed=3)
    said = [token for answer in free for token in answer if token != EOS_ID]
    common = max(set(said), key=said.count)
    bound = answers.own_answers(tiny.base, prompts, max_tokens=12, temperature=0.8, seed=3, avoid=[[common]])
    assert said.count(common) > 2
    assert not any(common in answer for answer in bound)


def test_openings_are_as_keywords_are_commonly_written(tiny: Tiny) -> None:
    found = answers.openings(["Ab"], tiny.base.tokenizer)
    # A byte tokenizer's first token is always shorter than three characters, so two are taken.
    assert {bytes(ids) for ids in found} == {b"Ab", b"ab", b"AB", b" A", b" a", b'"A', b'"a'}


def test_detours_that_name_a_keyword_all_the_same_are_dropped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def own_answers(_base: object, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
        asked.append(options)
        return [list(b"it is Bo"), list(b"nobody")][: len(prompts)]

    monkeypatch.setattr(answers, "own_answers", own_answers)
    rows = [{"question": "one?", "answer": "x"}, {"question": "two?", "answer": "y"}]
    sources = Sources(
        forget=write_jsonl(tmp_path / "f.jsonl", rows),
        retain=write_jsonl(tmp_path / "r.jsonl", [{"question": "why?", "answer": "z"}]),
        keywords=("Bo",),
    )
    found = prepared(tiny, sources, tmp_path / "book.json", settings_of("margin", detours=2))
    assert [bytes(one.answer_ids) for one in found.pools[Kind.DETOUR]] == [b"nobody"] * 2
    sampled = [options for options in asked if options.get("temperature")]
    assert [options["seed"] for options in sampled] == [1, 2]
    assert all(options["avoid"] == answers.openings(["Bo"], tiny.base.tokenizer) for options in sampled)


def test_goals_follow_what_a_token_carries() -> None:
    goals = Goals(
        content=15, common=5, common_ids=frozenset({1}), named_ids=frozenset({2}), end_ids=frozenset({9})
    )
    ids = [1, 2, 3, 9]  # common, named, content, end
    assert goals.example([0], ids, Kind.FORGET).goals == (5, 15, 15, 0)
    assert goals.example([0], ids, Kind.DETOUR).goals == (0, 15, 0, 0)
    assert goals.example([0], ids, Kind.RETAIN).goals == (0, 0, 0, 0)


def test_a_token_is_common_by_the_share_of_answers_that_have_it() -> None:
    answered = [[1, 1, 1, 2], [1, 3], [3, 4], [5]]
    assert common_tokens(answered, share=0.5) == {1, 3}
    assert common_tokens(answered, share=0.25) == {1, 2, 3, 4, 5}


def test_a_keyword_of_one_token_is_named_unless_retain_answers_are_made_of_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    sources = Sources(
        forget=write_jsonl(tmp_path / "f.jsonl", [{"question": "who?", "answer": "Q"}]),
        retain=write_jsonl(tmp_path / "r.jsonl", [{"question": "why q?", "answer": "q"}]),
        keywords=("Q", "Zz"),
    )
    assert prepared(tiny, sources, tmp_path / "book.json").named_ids == {ord("Q")}


def test_split_holds_out_every_sixth_prompt_of_each_side(tiny: Tiny, tmp_path: Path) -> None:
    found = prepared(tiny, write_sources(tmp_path), tmp_path / "book.json")
    assert [one.document.messages[0].content for one in found.probe_forget] == FORGET[::6]
    assert [one.document.messages[0].content for one in found.probe_retain] == RETAIN[::6]
    assert found.record["documents"] == {
        "forget": 10,
        "retain": 10,
        "held-out forget": 2,
        "held-out retain": 2,
    }
    for kind, probes in ((Kind.FORGET, found.probe_forget), (Kind.RETAIN, found.probe_retain)):
        taught = {one.prompt_ids for one in found.pools[kind]}
        assert len(taught) == 10
        assert taught.isdisjoint(tuple(one.prompt_ids) for one in probes)


def test_too_few_prompts_to_split_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    sources = Sources(
        forget=write_questions(tmp_path / "f.jsonl", FORGET[:11]),
        retain=write_questions(tmp_path / "r.jsonl", RETAIN),
        keywords=("Zz",),
        split=True,
    )
    with pytest.raises(DataError, match=r"forget set has 11 questions, too few .*--probes none"):
        prepared(tiny, sources, tmp_path / "book.json")


NAMES = ("forget", "retain", "probe_forget", "probe_retain")


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(NAMES, 2)))
def test_a_prompt_in_any_two_sets_is_refused(tiny: Tiny, tmp_path: Path, first: str, second: str) -> None:
    questions = {name: [f"{name}?"] for name in NAMES}
    questions[second].append(questions[first][0].upper())
    files = {name: write_questions(tmp_path / f"{name}.jsonl", asked) for name, asked in questions.items()}
    with pytest.raises(DataError, match="1 prompts are both") as refused:
        prepared(tiny, Sources(keywords=("Zz",), **files), tmp_path / "book.json")
    assert f"{first}.jsonl:1" in refused.value.message
    assert f"{second}.jsonl:2" in refused.value.message


def test_the_record_reports_what_was_read_and_dropped(tiny: Tiny, tmp_path: Path) -> None:
    sources = Sources(
        forget=write_questions(tmp_path / "f.jsonl", ["a?", "A", " "]),
        retain=write_questions(tmp_path / "r.jsonl", ["b?"]),
    )
    heard: list[str] = []
    found = prepared(tiny, sources, tmp_path / "book.json", heard=heard)
    assert found.record["read"] == {
        "forget": {"source": "f.jsonl", "read": 1, "dropped": {"duplicate": 1, "empty": 1}},
        "retain": {"source": "r.jsonl", "read": 1, "dropped": {}},
    }
    assert heard == ["the base answers: forget (1)", "the base answers: retain (1)"]


def test_a_second_preparation_takes_every_answer_from_the_book(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, book, settings = write_sources(tmp_path), tmp_path / "book.json", settings_of("margin")
    first = prepared(tiny, sources, book, settings)
    assert first.pools[Kind.DETOUR]

    def refuse(*_args: object, **_options: object) -> list[list[int]]:
        raise AssertionError("asked the base again")

    monkeypatch.setattr(answers, "own_answers", refuse)
    assert prepared(tiny, sources, book, settings) == first
    with pytest.raises(AssertionError, match="asked the base again"):
        prepared(tiny, sources, book, settings_of("margin", seed=7))
    with pytest.raises(AssertionError, match="asked the base again"):
        prepared(tiny, sources, book, settings_of("margin", max_answer_tokens=9))
