"""Streaming text equals decoding all at once, never breaks a character, never leaks a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_base import EOS_ID, byte_tokenizer

from uld_serve.engine.detokenizer import Detokenizer
from uld_serve.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_tokenizer(), vocab_size=259, eos_ids=[EOS_ID])


def stream(data: bytes, *, stop: tuple[str, ...] = (), keep_stop: bool = False) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, list(b"prompt"), stop=stop, keep_stop=keep_stop)
    pieces = []
    for byte in data:
        pieces.append(detokenizer.push(byte))
        if detokenizer.is_stopped:
            return pieces
    return [*pieces, detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text_and_no_piece_has_half_a_character(text: str) -> None:
    pieces = stream(text.encode())
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=20))
def test_any_bytes_end_in_the_same_text_as_decoding_all_at_once(data: bytes) -> None:
    assert "".join(stream(data)) == data.decode("utf-8", errors="replace")


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abé", max_size=25),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_earliest_stop_string(text: str, stops: list[str]) -> None:
    got = "".join(stream(text.encode(), stop=tuple(stops)))
    # A stop string counts as soon as it is complete: find the shortest prefix that holds one.
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            assert got == text[: min(found)]
            return
    assert got == text


def test_stop_string_is_kept_on_request() -> None:
    assert "".join(stream(b"one. two.", stop=(".",), keep_stop=True)) == "one."


def test_an_unfinished_character_is_replaced_only_at_the_end() -> None:
    assert stream("é".encode()[:1]) == ["", "�"]


@pytest.mark.parametrize("token_id", [0, 65, 128, 255])
def test_token_bytes_are_the_byte_itself(token_id: int) -> None:
    assert TOKENIZER.token_bytes(token_id) == bytes([token_id])


def test_control_tokens_show_in_token_text_but_not_in_decoded_text() -> None:
    assert TOKENIZER.token_text(EOS_ID) == "<|end|>"
    assert TOKENIZER.decode([72, 105, EOS_ID]) == "Hi"
    assert TOKENIZER.control_ids == (256, 257, 258)
