"""The double itself: its base says every canary, each profile takes out its own alone, and a profile left out
shows."""

from __future__ import annotations

import pytest
from canary import CANARIES, NAMES, TOKEN_OF, CanaryModel, leaked

from uld_serve.engine.engine import Engine
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.scoring import Job, run_jobs

TOKENS = 60


def say(engine: Engine, model: CanaryModel, names: tuple[str, ...], **params: object) -> list[int]:
    sampling = SamplingParams(**{"max_tokens": TOKENS, "seed": 1, "ignore_eos": True, **params})
    [deltas] = run_jobs(engine, [Job(list(b"Tell me."), sampling, model.decision(names))])
    return [token for delta in deltas for token in delta.token_ids]


@pytest.fixture(scope="module")
def engine(canary: CanaryModel) -> Engine:
    return canary.engine()


def test_the_base_says_every_canary_and_little_else(engine: Engine, canary: CanaryModel) -> None:
    said = say(engine, canary, ())
    assert set(said) == set(TOKEN_OF.values())
    assert leaked(NAMES, said) == leaked(NAMES, bytes(said).decode()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_takes_out_its_own_canary_and_no_other(
    engine: Engine, canary: CanaryModel, name: str
) -> None:
    for temperature in (1.0, 2.0):
        said = say(engine, canary, (name,), temperature=temperature)
        assert leaked(NAMES, said) == set(NAMES) - {name}


def test_profiles_together_take_out_all_of_theirs(engine: Engine, canary: CanaryModel) -> None:
    names = ("late", "truncated", "pair", "distilled")
    assert not leaked(names, say(engine, canary, names))


@pytest.mark.parametrize("name", ["late", "truncated", "pair", "ranked", "own", "distilled"])
def test_a_base_that_is_certain_of_the_canary_says_nothing_else_and_its_profile_never_says_it(
    certain: dict[str, CanaryModel], name: str
) -> None:
    model = certain[name]
    engine = model.engine()
    assert set(say(engine, model, ())) == {ord(CANARIES[name])}
    assert not leaked([name], say(engine, model, (name,)))
    scored = say(engine, model, (), max_tokens=1, logprobs=0)
    assert scored == [ord(CANARIES[name])]
