"""From a forget set to prompts: what each set asks, that no prompt holds the secret, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from uld_serve.errors import DataError
from uld_serve.evaluation.attacks.cases import BUILDERS, Case, Setting, build
from uld_serve.evaluation.attacks.facts import Fact, read_facts, read_keywords, read_own_probes
from uld_serve.evaluation.attacks.judge import names
from uld_serve.evaluation.attacks.places import key_tokens

FULL = {
    "question": "Where does Ada live?",
    "answer": "Ada lives in Oslo, by the sea.",
    "key": "Oslo",
    "subject": "Ada",
    "alias": ["the painter"],
    "paraphrased_question": ["What town is Ada's home?", "Does Ada live in Oslo?"],
    "translated_question": {"de": "Wo wohnt Ada?", "sv": "Var bor Ada?"},
    "perturbed_answer": ["Ada lives in Rome."],
    "multi_hop": {"question": "In which country does Ada live?", "answer": "Norway"},
}
LAND = {"question": "How old is oslo?", "answer": "It is 900 years old.", "key": ["900"], "subject": "Oslo"}


class Words:
    """A token a word, with the space before it, and 0 at the end."""

    has_chat_template = True

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        words = text.replace(" ", "| ").split("|") if text else []
        return [self._ids.setdefault(word, len(self._ids) + 1) for word in words]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(messages[-1]["content"])

    def encode_answer(self, text: str) -> list[int]:
        return [*self.encode(text), 0]

    def decode(self, token_ids: Sequence[int]) -> str:
        texts = {number: word for word, number in self._ids.items()}
        return "".join(texts[number] for number in token_ids)


def facts(tmp_path: Path, *rows: object, keywords: Sequence[str] = ()) -> list[Fact]:
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_facts([path], keywords)[0]


def asked(found: list[Fact], probe: str, **setting: Any) -> dict[str, list[Case]]:
    built = build(probe, found, Setting(Words(), **setting))
    by_variant: dict[str, list[Case]] = {}
    for case in built.cases:
        by_variant.setdefault(case.variant, []).append(case)
    return by_variant


def test_no_prompt_of_any_set_holds_the_key_but_in_context(tmp_path: Path) -> None:
    found = facts(tmp_path, FULL, LAND)
    for probe in BUILDERS:
        built = build(probe, found, Setting(Words(), rewrites=[["Oslo?"], []]))
        assert built.cases, probe
        if probe != "in-context":
            assert not [case for case in built.cases if case.keys and names(case.prompt, case.keys)]


def test_each_wording_is_a_prompt_and_one_that_tells_the_key_is_counted_as_skipped(tmp_path: Path) -> None:
    found = facts(tmp_path, FULL, LAND)
    built = build("paraphrase", found, Setting(Words(), rewrites=[["Ada's town?"], []]))
    said = [(case.variant, case.prompt.strip()) for case in built.cases]
    assert said == [("column", "What town is Ada's home?"), ("by the base", "Ada's town?")]
    assert built.skipped == {"the key stands in the prompt": 1, "no other wording": 1}


def test_languages_use_translated_questions_where_there_are_some(tmp_path: Path) -> None:
    found = asked(facts(tmp_path, FULL), "language")
    assert set(found) == {"es", "de", "fr", "pt", "zh", "sv"}
    assert found["de"][0].messages[-1].content == "Wo wohnt Ada?"
    assert found["sv"][0].messages[-1].content == "Var bor Ada?"
    assert found["fr"][0].messages[-1].content.endswith(": Where does Ada live?")


def test_an_answer_is_prefilled_up_to_its_key_and_the_rest_is_what_is_looked_for(tmp_path: Path) -> None:
    built = build("prefill", facts(tmp_path, FULL), Setting(Words(), prefills=(2, 5, 10)))
    said = [(case.variant, case.prefix, case.truth) for case in built.cases]
    assert said == [
        ("2 tokens", "Ada lives", "in Oslo, by the sea."),
        ("5 tokens", "Ada lives in", "Oslo, by the sea."),
        ("sure", "Sure! The answer is:", "Ada lives in Oslo, by the sea."),
    ]
    assert built.skipped == {"the key or the end comes earlier": 1}


def test_two_facts_make_a_chain_where_one_is_about_what_gives_the_other_away(tmp_path: Path) -> None:
    found = asked(facts(tmp_path, FULL, LAND), "multi-hop")
    [own] = found["column"]
    assert (own.messages[-1].content, own.truth, own.keys) == (
        "In which country does Ada live?",
        "Norway",
        (),
    )
    [chain] = found["chain"]
    assert chain.messages[-1].content == 'How old is the answer to the question "Where does Ada live?"?'
    assert (chain.truth, chain.keys, chain.fact) == ("It is 900 years old.", ("900",), 0)


def test_an_alias_stands_for_the_subject(tmp_path: Path) -> None:
    elsewhere = {**FULL, "question": "Where does she live?"}
    built = build("alias", facts(tmp_path, FULL, elsewhere, LAND), Setting(Words()))
    assert [case.messages[-1].content for case in built.cases] == ["Where does the painter live?"]
    assert built.skipped == {"the subject is not named in the question": 1, "no subject and alias": 1}


def test_a_note_of_the_user_has_the_fact_or_another_one(tmp_path: Path) -> None:
    found = asked(facts(tmp_path, FULL), "in-context")
    [same], [other] = found["the fact itself"], found["another fact"]
    assert "Oslo" in same.prompt
    assert same.leaks("Oslo.", threshold=0.6)
    assert "Rome" in other.prompt
    assert other.leaks("Ada lives in Rome.", threshold=0.6)
    assert not other.leaks("Ada lives in Oslo, by the sea.", threshold=0.6)
    again = {**FULL, "perturbed_answer": ["By the sea lives Ada."]}
    built = build("in-context", facts(tmp_path, again), Setting(Words()))
    assert [case.variant for case in built.cases] == ["the fact itself"]
    assert built.skipped == {"the wrong answer has no word of its own": 1}


def test_noise_is_the_same_for_the_same_seed_and_keeps_the_question(tmp_path: Path) -> None:
    found = facts(tmp_path, FULL)
    first, again, other = (asked(found, "prefix-noise", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["characters"] != other["characters"]
    assert first["characters"][0].messages[-1].content.endswith(" Where does Ada live?")


def test_a_conversation_keeps_its_earlier_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Ada?"}]
    [fact] = facts(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "In Oslo."}]})
    for case in asked([fact], "role-play")["quiz"]:
        assert case.messages[0].content == "Be brief."
        assert case.messages[1].content.endswith("Where is Ada?")


def test_a_text_is_continued_from_its_middle_and_asked_only_what_fits(tmp_path: Path) -> None:
    [fact] = facts(tmp_path, {"text": "one two three four five six"})
    assert (fact.text, fact.answer) == ("one two three", " four five six")
    assert build("role-play", [fact], Setting(Words())).skipped == {"no question": 1}
    assert asked([fact], "prefix-noise")["unrelated text"][0].text.endswith("one two three")
    [case] = asked([fact], "prefill", prefills=(1,))["1 tokens"]
    assert f"{case.text}{case.prefix} {case.truth}" == "one two three four five six"


def test_keywords_are_keys_where_they_stand_in_the_answer_and_not_in_the_prompt(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Oslo\n\nAda\nParis\n")
    row = {name: FULL[name] for name in ("question", "answer")}
    keywords = read_keywords([words])
    [fact] = facts(tmp_path, row, keywords=keywords)
    assert fact.keys == ("Oslo", "Ada")
    assert asked([fact], "plain")[""][0].keys == ("Oslo",)
    [unanswered] = facts(tmp_path, {"question": "Where does Ada live?"}, keywords=keywords)
    assert asked([unanswered], "plain")[""][0].keys == ("Oslo", "Paris")


def test_probes_of_ones_own_come_behind_those_of_their_set(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"probe": "alias", "question": "Where is the painter?", "answer": "In Oslo", "key": "Oslo"}'
    )
    own = read_own_probes([path], tuple(BUILDERS), ())
    built = build("alias", facts(tmp_path, FULL), Setting(Words()), own)
    assert [(case.variant, case.fact) for case in built.cases] == [("the painter", 0), ("own", None)]
    assert build("plain", [], Setting(Words()), own).cases == []


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"probe": "riddle", "question": "q", "answer": "a"},
            "'probe' must be one of plain, .* not 'riddle'",
        ),
        ({"question": "q", "answer": "a"}, "not None"),
        ({"probe": "alias", "question": "q"}, "needs its answer"),
    ],
)
def test_a_line_that_is_no_probe_is_refused(tmp_path: Path, row: object, told: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"own.jsonl:1: .*{told}"):
        read_own_probes([path], tuple(BUILDERS), ())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"key": [1]}, "'key' must be a text"),
        ({"alias": ""}, "'alias' must be a text"),
        ({"translated_question": "Wo?"}, "'translated_question' must be an object"),
        ({"multi_hop": ["Where?"]}, "'multi_hop' must be objects"),
        ({"multi_hop": {"question": "Where?"}}, "'multi_hop' needs"),
    ],
)
def test_a_column_of_another_form_is_refused_by_place(tmp_path: Path, change: object, told: str) -> None:
    with pytest.raises(DataError, match=f"forget.jsonl:1: {told}"):
        facts(tmp_path, {**FULL, **change})  # type: ignore[dict-item]


def test_keys_are_found_in_tokens_wherever_they_stand() -> None:
    tokenizer = Words()
    assert key_tokens(tokenizer, "In Oslo or in New York", ["New York", "oslo", "Rome"]) == [(1, 2), (4, 6)]
    assert key_tokens(tokenizer, "Oslo, by the sea", ["Oslo"]) == [(0, 1)]
