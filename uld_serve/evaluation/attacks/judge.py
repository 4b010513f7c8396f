"""Whether an answer gives a fact away. Called by the probes. Knows no model.

A fact with keys is given away by an answer that names one of them; one without, by an answer whose ROUGE-L recall of
the right answer is high enough."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from uld_serve.evaluation.overlap import rouge_l

# Letters and digits of scripts that put spaces between words. Others run on, so a key may touch their letters.
_SPACED = "0-9A-Za-z\u00c0-\u052f"


def names(text: str, keys: Sequence[str]) -> bool:
    """Whether a key stands in the text as a whole word or phrase, in any case."""
    plain = _plain(text)
    return any(
        re.search(rf"(?<![{_SPACED}]){re.escape(_plain(key))}(?![{_SPACED}])", plain) is not None
        for key in keys
    )


def leaks(said: str, *, truth: str, keys: Sequence[str], threshold: float, rival: str = "") -> bool:
    """Whether the answer gives the truth away. `rival` is another answer to the same question: without keys, what is
    said must be nearer to the truth than to it."""
    if keys:
        return names(said, keys)
    recall = rouge_l(said, truth).recall
    return recall >= threshold and (not rival or recall > rouge_l(said, rival).recall)


def _plain(text: str) -> str:
    """One form of each letter, no case, single spaces."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).casefold().strip()
