"""`return_token_ids`: the ids of what was drawn, which can be sent back to be scored in another view."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from real_server import BASE, CHAT, COMPLETIONS, LEAST, Answer, RealServer, real_server
from tiny_base import Tiny

from uld_serve.engine.engine import Engine

PROFILE = "late-fork"
ASK = {"forget_profile": PROFILE, "seed": 5, "max_tokens": 12, "return_token_ids": True}
LOGPROBS: dict[str, dict[str, object]] = {
    COMPLETIONS: {"logprobs": 1},
    CHAT: {"logprobs": True, "top_logprobs": 1},
}


@pytest.fixture(scope="module")
def real(
    tiny: Tiny, make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    with real_server(tiny, make_engine(), tmp_path_factory.mktemp("audit") / "audit.jsonl") as server:
        yield server


def ids_of(answer: Answer) -> tuple[list[list[int]], list[int]]:
    """Those of the prompt wherever they are given, and of the first choice's answer."""
    prompts, drawn = [], []
    for body in answer.events if answer.is_stream else [answer.json]:
        prompts += [body["prompt_token_ids"]] if "prompt_token_ids" in body else []
        for choice in body["choices"]:
            prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
            drawn += choice.get("token_ids") or []
    return prompts, drawn


def logprobs_of(answer: Answer) -> list[float]:
    rows = answer.choices[0]["logprobs"]
    return rows.get("token_logprobs") or [row["logprob"] for row in rows["content"]]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_streamed_and_whole_answers_have_the_same_ids(real: RealServer, path: str) -> None:
    no_control = {"logit_bias": {str(token): -100 for token in (256, 257, 258)}}  # texts leave them out
    whole, streamed = (
        real.ask(path, {**LEAST[path], **ASK, **no_control, "stream": stream}) for stream in (False, True)
    )
    prompts, drawn = ids_of(whole)
    assert ids_of(streamed) == (prompts, drawn)
    assert len(prompts) == 1
    assert len(drawn) == whole.usage["completion_tokens"] > 0
    tokens = {"model": BASE, "tokens": drawn}
    assert real.live.post("/v1/detokenize", tokens).json()["text"] == whole.text
    asked = {name: LEAST[path][name] for name in ("prompt", "messages") if name in LEAST[path]}
    assert real.live.post("/v1/tokenize", {"model": BASE, **asked}).json()["tokens"] == prompts[0]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_ids_are_left_out_unless_asked_for(real: RealServer, path: str) -> None:
    for stream in (False, True):
        text = real.ask(path, {**LEAST[path], "stream": stream}).response.text
        assert "token_ids" not in text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_answer_sent_back_is_scored_as_it_was_drawn_and_otherwise_in_another_view(
    real: RealServer, path: str
) -> None:
    """What the playground's shading is made of: one answer in two views, each under its own Decision."""
    answer = real.ask(path, {**LEAST[path], **ASK, **LOGPROBS[path]})
    (prompt,), drawn = ids_of(answer)
    scores = {"prompt": prompt + drawn, "max_tokens": 0, "echo": True, "logprobs": 1}
    views = {
        profile: real.ask(COMPLETIONS, {"model": BASE, **scores, "forget_profile": profile})
        for profile in (PROFILE, None)
    }
    assert views[PROFILE].profiles.keys() == {PROFILE}
    assert views[None].profiles == {}
    same, base = (logprobs_of(views[profile])[len(prompt) :] for profile in (PROFILE, None))
    assert same == pytest.approx(logprobs_of(answer), abs=1e-3)
    assert base != pytest.approx(same, abs=1e-3)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_choice_has_its_own_ids(real: RealServer, path: str) -> None:
    answer = real.ask(path, {**LEAST[path], **ASK, "n": 3})
    assert len({tuple(choice["token_ids"]) for choice in answer.choices}) == 3
