"""Streaming text equals decoding all at once, never breaks a character, never leaks a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_base import EOS_ID, byte_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from uld_serve.engine.detokenizer import Detokenizer
from uld_serve.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_tokenizer(), vocab_size=259, eos_ids=[EOS_ID])
NUM_BYTES, WORDS = 256, ["\u2581a", "\u2581bc", "d", "\u00e9", "\u2581"]


def fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models are: words with their space in front, and bytes for what they do not know."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(NUM_BYTES)}
    vocab |= {word: NUM_BYTES + number for number, word in enumerate(WORDS)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    return Tokenizer(fast, vocab_size=len(fast), eos_ids=[FALLBACK_END])


FALLBACK_END = NUM_BYTES + len(WORDS)
FALLBACK = fallback_tokenizer()


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


def stream_ids(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*"\u4f60\u20ac\U0001f600", *range(NUM_BYTES, FALLBACK_END + 1)]), max_size=30)
)
def test_words_and_characters_spelt_in_bytes_join_to_the_decoded_whole(parts: list[str | int]) -> None:
    prompt = [NUM_BYTES, NUM_BYTES + 2]
    ids = [i for part in parts for i in (part.encode() if isinstance(part, str) else [part])]
    pieces = stream_ids(FALLBACK, prompt, ids)
    assert "".join(pieces) == FALLBACK.decode([*prompt, *ids])[len(FALLBACK.decode(prompt)) :]
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_endless_bytes_that_are_no_text_come_out_bit_by_bit_at_the_same_cost(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **how: decoded.append(len(ids)) or decode(ids, **how)
    )
    pieces = stream_ids(tokenizer, [256], [0x80] * 500)
    assert "".join(pieces) == "\ufffd" * 500
    assert max(len(piece) for piece in pieces) <= 16
    assert max(decoded, default=0) <= 48


def test_control_tokens_without_end_cost_the_same_and_leave_the_next_word_its_space() -> None:
    assert stream_ids(FALLBACK, [NUM_BYTES], [FALLBACK_END] * 100 + [NUM_BYTES + 1])[-2:] == [" bc", ""]


def test_a_character_that_the_prompt_begins_is_completed() -> None:
    first, *others = "\u20ac".encode()
    assert "".join(stream_ids(TOKENIZER, [65, first], others)) == "\u20ac"


def test_text_cut_within_a_character_ends_as_the_decoded_whole_does() -> None:
    for cut in range(1, 4):
        ids = [*b"ok ", *"\U0001f600".encode()[:cut]]
        assert "".join(stream_ids(TOKENIZER, [65], ids)) == TOKENIZER.decode(ids) == "ok \ufffd"
