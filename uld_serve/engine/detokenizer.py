"""Token ids to text, piece by piece: never half a character, never the beginning of a stop string. One per
request, called by the engine as tokens are drawn. Costs the same for every token, whatever came before."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from uld_serve.engine.tokenizer import REPLACEMENT, Tokenizer

# Tokens before the first new one that decide how it is spaced (SentencePiece drops a leading space).
CONTEXT_TOKENS = 6
# A character is four bytes, each a token at most; more tokens without text are no beginning of one.
MAX_HELD_TOKENS = 16


class Detokenizer:
    """`push` each drawn token, then `flush` once. `is_stopped` turns true when a stop string has come."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        keep_stop: bool = False,
    ) -> None:
        context = list(prompt_ids[-CONTEXT_TOKENS:])
        self._text = _Joined(tokenizer, context) if tokenizer.is_bytes_joined else _Window(tokenizer, context)
        self._stop = stop
        self._keep_stop = keep_stop
        self._pending = ""  # text taken but held back: it may be the beginning of a stop string
        self.is_stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text that is now certain. After a stop string nothing more comes."""
        return self._release(self._text.take(token_id), may_stop=may_stop, is_last=False)

    def flush(self) -> str:
        """What was held back; a character that the text was cut in becomes U+FFFD, as in a decode of the whole."""
        return self._release(self._text.rest(), may_stop=True, is_last=True)

    def _release(self, text: str, *, may_stop: bool, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        if not (self._stop or self._pending):
            return text
        self._pending += text
        end = self._stop_end() if may_stop else None
        if end is not None:
            self.is_stopped = True
            out, self._pending = self._pending[:end], ""
            return out
        held = 0 if is_last else self._held_back()
        out = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(self._pending) - held :]
        return out

    def _stop_end(self) -> int | None:
        """Where the text ends if a stop string is in it: before the earliest one, or after if it is kept."""
        found = [(self._pending.find(stop), len(stop)) for stop in self._stop if stop in self._pending]
        if not found:
            return None
        start, length = min(found)
        return start + length if self._keep_stop else start

    def _held_back(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for size in range(min(longest - 1, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stop):
                return size
        return 0


class _Joined:
    """Text of tokens that stand for bytes: what is no UTF-8 becomes U+FFFD at once, up to three bytes wait."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._bytes_of = tokenizer.text_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in context:  # a prompt may end within a character
            self.take(token_id)

    def take(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Text of any tokens: what decoding some last ones gives more than decoding those before."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context
        self._num_read = len(context)

    def take(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._new_text(holds=len(self._ids) - self._num_read < MAX_HELD_TOKENS)

    def rest(self) -> str:
        return self._new_text(holds=False)

    def _new_text(self, *, holds: bool) -> str:
        before, now = (self._tokenizer.decode(ids) for ids in (self._ids[: self._num_read], self._ids))
        # Bytes given out as U+FFFD may turn out to begin a character after all.
        text = now.removeprefix(before if now.startswith(before) else before.rstrip(REPLACEMENT))
        if holds and (not text or now.endswith(REPLACEMENT)):
            return ""
        # What was read last begins and ends with a character, so that decoding it alone gives the same text. Tokens
        # without text cannot take its place.
        self._ids = self._ids[self._num_read :] if text else self._ids[: self._num_read]
        self._num_read = len(self._ids)
        return text
