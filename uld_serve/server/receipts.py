"""The receipt and the token counts as parts of an answer's body. Used by completions and chat."""

from __future__ import annotations

from uld_serve.engine.request import Receipt
from uld_serve.server.generation import Totals
from uld_serve.server.responses import Forget, ForgetEntry, UsageBody


def forget_body(receipt: Receipt) -> Forget:
    return Forget(
        profiles=[
            ForgetEntry(name=entry.name, digest=entry.digest, rule=entry.rule, strength=entry.strength)
            for entry in receipt.profiles
        ],
        engine=receipt.engine,
    )


def usage_body(totals: Totals) -> UsageBody:
    return UsageBody(
        prompt_tokens=totals.prompt_tokens,
        completion_tokens=totals.completion_tokens,
        total_tokens=totals.prompt_tokens + totals.completion_tokens,
    )
