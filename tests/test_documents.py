"""Reading forget and retain data: every form, what is dropped, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uld_serve.data.documents import Document, Message, read_documents, refuse_overlap
from uld_serve.errors import DataError


def one(tmp_path: Path, row: object) -> Document:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [document] = read_documents(path, kind="forget").documents
    return document


def test_a_question_is_one_user_turn_with_or_without_an_answer(tmp_path: Path) -> None:
    found = one(tmp_path, {"question": "Who?", "answer": "Nobody.", "form": "riddle"})
    assert found.messages == (Message("user", "Who?"),)
    assert (found.answer, found.form, found.text) == ("Nobody.", "riddle", "")
    assert found.where == "data.jsonl:1"
    assert one(tmp_path, {"question": "Who?"}).answer is None


def test_a_conversation_ends_with_its_answer_if_the_assistant_speaks_last(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    answered = one(tmp_path, {"messages": turns})
    assert answered.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert answered.answer == "Hello"
    asked = one(tmp_path, {"messages": turns[:2]})
    assert asked.messages == answered.messages
    assert asked.answer is None


def test_a_prompt_is_plain_text_and_its_completion_the_answer(tmp_path: Path) -> None:
    found = one(tmp_path, {"prompt": "Once upon", "completion": " a time"})
    assert (found.messages, found.text, found.answer) == ((), "Once upon", " a time")
    assert one(tmp_path, {"prompt": "Once upon"}).answer is None


def test_a_text_has_no_prompt_and_is_learnt_from_its_start(tmp_path: Path) -> None:
    found = one(tmp_path, {"text": "A whole story."})
    assert (found.messages, found.text, found.answer) == ((), "A whole story.", "")


def test_a_folder_of_texts_is_read_through_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text(" first ")
    (tmp_path / "deep" / "c.txt").write_text("third")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "notes.md").write_text("not read")
    reading = read_documents(tmp_path, kind="retain")
    assert [document.text for document in reading.documents] == ["first", "second", "third"]
    assert [document.where for document in reading.documents] == ["a.txt", "b.txt", "c.txt"]
    assert reading.dropped == {"empty": 1}


def test_the_report_says_what_was_read_and_why_the_rest_was_dropped(tmp_path: Path) -> None:
    path = tmp_path / "forget.jsonl"
    rows = ["Who is it?", "who is  IT", "  ", "Who else?", "Who is it", "..."]
    path.write_text("\n\n".join(json.dumps({"question": row}) for row in rows))
    reading = read_documents(path, kind="forget")
    assert [document.where for document in reading.documents] == ["forget.jsonl:1", "forget.jsonl:7"]
    assert reading.summary() == {
        "source": "forget.jsonl",
        "read": 2,
        "dropped": {"duplicate": 2, "empty": 2},
    }


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps({"question": f"one{separator}two"}, ensure_ascii=False)
    path.write_text(f'{row}\r\n{row[:-2]}?"}}\n', encoding="utf-8", newline="")
    [document] = read_documents(path, kind="forget").documents
    assert document.messages[0].content == f"one{separator}two"


LINE = "data.jsonl:2"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", [LINE, "not JSON"]),
        ('["question"]', [LINE, "not a JSON object", '{"question", "answer"}']),
        ('{"answer": "x"}', [LINE, "no known field", '{"prompt", "completion"}']),
        ('{"question": "a", "text": "b"}', [LINE, "question and text", "expected"]),
        ('{"question": 3}', [LINE, "'question' must be text, not int"]),
        ('{"question": "a", "answer": ["b"]}', [LINE, "'answer' must be text, not list"]),
        ('{"prompt": "a", "completion": 1.5}', [LINE, "'completion' must be text, not float"]),
        ('{"text": {}}', [LINE, "'text' must be text, not dict"]),
        ('{"text": "a", "form": 1}', [LINE, "'form' must be text, not int"]),
        ('{"messages": []}', [LINE, "'messages' must be a list", "role"]),
        ('{"messages": "hi"}', [LINE, "'messages' must be a list"]),
        ('{"messages": [{"role": "tool", "content": "x"}]}', [LINE, "role of system, user, assistant"]),
        ('{"messages": [{"role": "user"}]}', [LINE, "text as content"]),
        ('{"messages": ["hi"]}', [LINE, "a message needs a role"]),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', [LINE, "a turn before the answer"]),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"question": "fine"}}\n{line}\n')
    with pytest.raises(DataError) as refused:
        read_documents(path, kind="forget")
    assert [word for word in words if word not in refused.value.message] == []


def test_a_source_that_gives_nothing_is_refused_by_its_option(tmp_path: Path) -> None:
    empty, blank, nothing = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl", tmp_path / "folder"
    empty.write_text("\n")
    blank.write_text('{"question": " "}\n')
    nothing.mkdir()
    with pytest.raises(DataError, match=r"--retain: .*missing.jsonl does not exist; give a JSONL file"):
        read_documents(tmp_path / "missing.jsonl", kind="retain")
    with pytest.raises(DataError, match=r"--forget: .*empty.jsonl holds no usable document .*it is empty"):
        read_documents(empty, kind="forget")
    with pytest.raises(DataError, match=r"--forget: .*blank.jsonl .*'empty': 1"):
        read_documents(blank, kind="forget")
    with pytest.raises(DataError, match=r"--forget: .*folder holds no usable document"):
        read_documents(nothing, kind="forget")


def test_bytes_that_are_not_utf8_are_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    for path, name in ((tmp_path, "bad.txt"), (tmp_path / "bad.jsonl", "bad.jsonl")):
        with pytest.raises(DataError, match=rf"{name} is not UTF-8 text"):
            read_documents(path, kind="forget")


def chat(text: str, where: str, answer: str | None = None) -> Document:
    return Document(messages=(Message("user", text),), answer=answer, where=where)


def test_a_prompt_in_two_sets_is_refused_with_both_places() -> None:
    forget = [chat("Who is Ann?", "f:1"), chat("Who is Bob?", "f:2")]
    retain = [chat("Who is Cid?", "r:1"), chat("who is BOB", "r:2", "x"), chat("Who is Ann", "r:3")]
    with pytest.raises(DataError) as refused:
        refuse_overlap(forget, retain, names=("forget", "held-out retain"))
    message = refused.value.message
    for word in ("2 prompts", "forget", "held-out retain", "f:2", "r:2", "remove"):
        assert word in message
    refuse_overlap(forget, retain[:1], names=("forget", "retain"))


def test_a_system_prompt_does_not_make_another_question() -> None:
    turns = (Message("system", "You are kind."), Message("user", "Who is Ann?"))
    with pytest.raises(DataError, match="both in the"):
        refuse_overlap(
            [Document(messages=turns, where="f:1")],
            [chat("Who is Ann?", "r:1")],
            names=("forget", "retain"),
        )


def test_plain_texts_overlap_only_as_a_whole() -> None:
    story = Document(text="Ann left.", answer="", where="f:1")
    with pytest.raises(DataError, match="both in the"):
        refuse_overlap([story], [Document(text="ann left", answer="", where="r:1")], names=("a", "b"))
    refuse_overlap([story], [Document(text="Ann stayed.", answer="", where="r:1")], names=("a", "b"))


def test_what_else_stood_in_a_line_is_kept_for_those_who_know_it(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": "Nobody.", "alias": ["no one"]}
    assert one(tmp_path, row).columns == row
    assert one(tmp_path, row) == one(tmp_path, {"question": "Who?", "answer": "Nobody."})
