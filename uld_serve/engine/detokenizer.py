"""Token ids to text, piece by piece: never half a character, never the beginning of a stop string. One per
request, called by the engine as tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from uld_serve.engine.tokenizer import REPLACEMENT, Tokenizer

# Tokens before the first new one that decide how it is spaced (SentencePiece drops a leading space).
CONTEXT_TOKENS = 6


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
        self._tokenizer = tokenizer
        self._stop = stop
        self._keep_stop = keep_stop
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._read = len(self._ids)  # ids whose text has been taken
        self._pending = ""  # text taken but held back: it may be the beginning of a stop string
        self.is_stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text that is now certain. After a stop string nothing more comes."""
        self._ids.append(token_id)
        return self._release(self._take(is_last=False), may_stop=may_stop, is_last=False)

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        return self._release(self._take(is_last=True), may_stop=True, is_last=True)

    def _take(self, *, is_last: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._read])
        now = self._tokenizer.decode(self._ids)
        if now.endswith(REPLACEMENT) and not is_last:
            return ""
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._read = len(self._ids)
        return now[len(before) :]

    def _release(self, text: str, *, may_stop: bool, is_last: bool) -> str:
        if self.is_stopped:
            return ""
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
