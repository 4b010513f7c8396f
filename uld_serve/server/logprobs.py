"""Log-probabilities in the two shapes that OpenAI gives them, and vLLM's for prompts. Used by completions and chat.
Values are the served distribution's; a filtered token's -inf prints as -9999.0, which JSON can hold."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from uld_serve.engine.request import TokenLogprob
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

LOWEST = -9999.0


def printable(logprob: float) -> float:
    return max(logprob, LOWEST)


class CompletionLogprobRows:
    """Rows for one choice, chunk after chunk; `text_offset` counts the characters before each token."""

    def __init__(self, tokenizer: Tokenizer, *, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        # A token may end inside a character: count the characters that are complete before it.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def prompt(self, prompt_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """The first token has no predecessor, so its entries are None."""
        first = prompt_ids[0]
        opening = TokenLogprob(
            first, self._tokenizer.token_text(first), self._tokenizer.token_bytes(first), 0.0
        )
        rows = self.drawn([opening, *(entry for entry in entries[1:] if entry is not None)])
        rows.token_logprobs[0] = None
        rows.top_logprobs[0] = None
        return rows

    def drawn(self, entries: Iterable[TokenLogprob]) -> CompletionLogprobs:
        rows = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            rows.tokens.append(entry.text)
            rows.token_logprobs.append(printable(entry.logprob))
            rows.top_logprobs.append(_top_by_text(entry, self._top))
            rows.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(entry.bytes))
        return rows


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _top_by_text(entry: TokenLogprob, top: int) -> dict[str, float]:
    """By text, the drawn token always among them. Of two tokens that read the same the likelier one stays, so that
    the largest value is always the argmax's: lm-eval decides "greedy" by comparing floats."""
    best: dict[str, float] = {}
    for _, text, logprob in (*entry.top[:top], (entry.token_id, entry.text, entry.logprob)):
        best[text] = max(best.get(text, LOWEST), printable(logprob))
    return best


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer, *, top: int) -> ChatLogprobs:
    content = [
        ChatLogprob(
            token=entry.text,
            logprob=printable(entry.logprob),
            bytes=list(entry.bytes),
            top_logprobs=[
                TopLogprob(
                    token=text, logprob=printable(logprob), bytes=list(tokenizer.token_bytes(token_id))
                )
                for token_id, text, logprob in entry.top[:top]
            ],
        )
        for entry in entries
    ]
    return ChatLogprobs(content=content, refusal=None)


def prompt_logprobs(entries: Sequence[TokenLogprob | None], *, top: int) -> PromptLogprobs:
    """vLLM's shape: for each prompt token its candidates by token id, null for the first."""
    return [None if entry is None else _by_token_id(entry, top) for entry in entries]


def _by_token_id(entry: TokenLogprob, top: int) -> dict[str, PromptLogprob]:
    ranks = {token_id: rank for rank, (token_id, _, _) in enumerate(entry.top, start=1)}
    candidates = ((entry.token_id, entry.text, entry.logprob), *entry.top[:top])
    return {
        str(token_id): PromptLogprob(logprob=printable(logprob), rank=ranks.get(token_id), decoded_token=text)
        for token_id, text, logprob in candidates
    }
