"""The probes that a profile carries: held-out prompts with the base's answers, and its own answers to be replayed at
load. Called by run. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from uld_serve.errors import DataError
from uld_serve.profiles.probes import Message, Probe, Probes, ReplayProbe
from uld_serve.training.examples import Example, Kind
from uld_serve.training.measure import Fusion, generate, likelihood
from uld_serve.training.preparation import Prepared
from uld_serve.training.sources import Answered

NUM_REPLAY = 2
NUM_REPLAY_TRIED = 6
REPLAY_TOKENS = 32


def held_out(prepared: Prepared, keywords: tuple[str, ...]) -> Probes:
    """The held-out prompts with the base's answers; replays come after training. Raises DataError."""
    try:
        return Probes(
            keywords=keywords,
            forget=tuple(_probe(one) for one in prepared.probe_forget),
            retain=tuple(_probe(one) for one in prepared.probe_retain),
        )
    except ValidationError as error:
        raise DataError(f"the held-out prompts cannot be put into a profile: {first_of(error)}") from error


def replays(fusion: Fusion, prepared: Prepared, *, end_ids: Sequence[int]) -> tuple[ReplayProbe, ...]:
    """The profile's own greedy answers: never filtered, so their likelihood is finite. Of some forget prompts, those
    whose answers the base finds least likely: without the adapter, or with another, they would stand out."""
    forget = _replays_of(prepared.pools[Kind.FORGET][:NUM_REPLAY_TRIED], fusion, end_ids)
    telling = sorted(forget, key=lambda probe: probe.nll_fused - probe.nll_base)
    return (
        *telling[:NUM_REPLAY],
        *_replays_of(prepared.pools[Kind.RETAIN][:NUM_REPLAY], fusion, end_ids),
    )


def first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _probe(one: Answered) -> Probe:
    if not one.document.messages:
        raise DataError(f"{one.document.where}: a held-out prompt must be a question or messages")
    messages = tuple(Message.model_validate(message.as_dict()) for message in one.document.messages)
    return Probe(messages=messages, answer_ids=tuple(one.answer_ids), form=one.document.form)


def _replays_of(examples: Sequence[Example], fusion: Fusion, end_ids: Sequence[int]) -> list[ReplayProbe]:
    prompts = [list(one.prompt_ids) for one in examples]
    answers = generate(fusion, prompts, end_ids=end_ids, max_tokens=REPLAY_TOKENS)
    probes = []
    for pair in zip(prompts, answers, strict=True):
        found = likelihood(fusion, [pair])
        if found.removed == 0:
            nlls = {"nll_base": max(found.nll_base, 0.0), "nll_fused": max(found.nll_served, 0.0)}
            probes.append(ReplayProbe(prompt_ids=tuple(pair[0]), answer_ids=tuple(pair[1]), **nlls))
    return probes
