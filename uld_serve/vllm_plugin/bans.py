"""Which of a request's parameters would ban tokens behind a profile's filters. Called by the guard. Knows no vLLM."""

from __future__ import annotations

import math
from typing import Protocol


class SamplingParams(Protocol):
    """The fields of vLLM's that are looked at."""

    structured_outputs: object
    allowed_token_ids: object
    bad_words: object
    min_tokens: int
    logit_bias: dict[int, float] | None


def banned_by(params: SamplingParams) -> list[str]:
    """Names of parameters. A bias is no ban while it is finite: it moves scores and can leave every token."""
    found = {
        "structured_outputs": params.structured_outputs is not None,
        "allowed_token_ids": bool(params.allowed_token_ids),
        "bad_words": bool(params.bad_words),
        "min_tokens": params.min_tokens > 0,
        "an infinite logit_bias": not all(map(math.isfinite, (params.logit_bias or {}).values())),
    }
    return [name for name, is_so in found.items() if is_so]
