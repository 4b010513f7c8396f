"""Whether two models mean the same by every token id: what a separate assistant's scores are worth depends on it.
Called when a separate model is taken in. Knows no profile."""

from __future__ import annotations

from uld_serve.errors import ProfileMismatch
from uld_serve.model.loading import Base

NUM_SHOWN = 3


def check_same_vocabulary(base: Base, other: Base) -> None:
    """Compare all tokens, id by id. Raises ProfileMismatch that says how many differ, and which first."""
    ours = base.tokenizer.convert_ids_to_tokens(list(range(base.vocab_size)))
    theirs = other.tokenizer.convert_ids_to_tokens(list(range(other.vocab_size)))
    different = [i for i, (our, their) in enumerate(zip(ours, theirs, strict=False)) if our != their]
    shown = ", ".join(f"{i} is {ours[i]!r} here and {theirs[i]!r} there" for i in different[:NUM_SHOWN])
    remedy = "a separate assistant needs the base's vocabulary, token by token"
    if different:
        raise ProfileMismatch(
            f"model {other.id} differs from base {base.id} in {len(different)} of {len(ours)} tokens: {shown}"
            f"{', …' if len(different) > NUM_SHOWN else ''}; {remedy}"
        )
    if len(ours) != len(theirs):
        raise ProfileMismatch(
            f"model {other.id} has {len(theirs)} tokens and base {base.id} has {len(ours)}; {remedy}"
        )
