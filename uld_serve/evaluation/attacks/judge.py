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
    said must have so large a share of the words that only the truth has."""
    if keys:
        return names(said, keys)
    if rival:
        own = only_in(truth, rival)
        return len(own & _words(said)) >= threshold * max(1, len(own))
    return rouge_l(said, truth).recall >= threshold


def only_in(text: str, other: str) -> set[str]:
    """Words of the one and not of the other."""
    return _words(text) - _words(other)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", _plain(text)))


def _plain(text: str) -> str:
    """One form of each letter, no case, single spaces."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).casefold().strip()
