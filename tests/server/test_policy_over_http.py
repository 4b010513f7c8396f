"""Every key, against every way to ask, on every route, streamed and whole, with the profile in every state: what a key
must forget is forgotten, or nothing is answered. The expectations are the test's own, not resolve's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
from fake_engine import Call, FakeEngine, profile_version, registry
from fastapi.routing import APIRoute
from live_server import MODEL, LiveServer, make_catalog

from uld_serve.errors import ProfileCorrupt
from uld_serve.profiles.registry import Registry
from uld_serve.server.policy import KeyPolicy

SECRET = frozenset({"secret"})
KEYS = {
    "free": KeyPolicy(name="free", allow_base=True, logprobs=True),
    "bound": KeyPolicy(name="bound", mandatory=SECRET),
    "bound-open-logprobs": KeyPolicy(name="bound-open-logprobs", mandatory=SECRET, logprobs=True),
    "bound-closed": KeyPolicy(name="bound-closed", mandatory=SECRET, allowed=frozenset()),
    "bound-default": KeyPolicy(name="bound-default", mandatory=SECRET, default=frozenset({"acme"})),
    "bound-admin": KeyPolicy(name="bound-admin", mandatory=SECRET, is_admin=True, may_read_metrics=True),
    "default": KeyPolicy(name="default", default=SECRET),
    "no-base": KeyPolicy(name="no-base"),
}
MUST = {name: policy.mandatory for name, policy in KEYS.items()}
GENERATING = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
}
# (fields, headers, names asked for, whether the base is asked for)
FORMS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "nothing": ({}, {}),
    "null": ({"forget_profile": None}, {}),
    "none": ({"forget_profile": "none"}, {}),
    "none in a list": ({"forget_profile": ["none"]}, {}),
    "none as suffix": ({"model": f"{MODEL}:none"}, {}),
    "none as header": ({}, {"X-Forget-Profile": "none"}),
    "other": ({"forget_profile": "acme"}, {}),
    "other as suffix": ({"model": f"{MODEL}:acme"}, {}),
    "other as header": ({}, {"X-Forget-Profile": "acme"}),
    "itself": ({"forget_profile": "secret"}, {}),
    "both": ({"forget_profile": ["acme", "secret"]}, {}),
    "itself, weakly": ({"forget_profile": "secret", "forget_strength": 0.01}, {}),
    "itself, not at all": ({"forget_profile": "secret", "forget_strength": 0}, {}),
    "other, not at all": ({"forget_profile": "acme", "forget_strength": 0}, {}),
    "nothing, weakly": ({"forget_strength": 0.01}, {}),
    "two that disagree": ({"forget_profile": None, "model": f"{MODEL}:acme"}, {}),
    "twice": ({"forget_profile": "acme"}, {"X-Forget-Profile": "none"}),
    "unheard of": ({"forget_profile": "unheard-of"}, {}),
}
STATES = ("loaded", "replaced", "unloaded", "damaged", "wrongly applied")
NEW = profile_version("secret", strength=5.0, digit="d")


def set_state(server: LiveServer, state: str) -> None:
    known: Registry = server.apps[0].state.catalog.registry
    known.replace(NEW if state == "replaced" else registry().get("secret"))
    if state == "unloaded":
        known.remove("secret")
    engine: FakeEngine = server.engine
    engine.refuse = ProfileCorrupt("its bytes differ") if state == "damaged" else None
    engine.receipt_of = unforgetting if state == "wrongly applied" else None


def unforgetting(call: Call) -> object:
    """A sampler that says it forgot nothing."""
    from uld_serve.engine.request import Receipt

    return Receipt((), "fake-1")


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    server = LiveServer.start(make_catalog(keys=KEYS))
    yield server
    server.stop()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("key", KEYS)
def test_no_cell_with_a_mandatory_profile_reaches_the_base(guarded: LiveServer, key: str, state: str) -> None:
    guarded.reset()
    set_state(guarded, state)
    answered = 0
    for (path, fields), (form, (more, headers)), stream in itertools.product(
        GENERATING.items(), FORMS.items(), (False, True)
    ):
        guarded.engine.calls.clear()
        body = {"model": MODEL, **fields, **more, "stream": stream}
        answer = guarded.post(path, body, headers={"Authorization": f"Bearer {key}", **headers})
        cell = (key, form, path, stream, state)
        assert answer.status_code < 500 or state == "wrongly applied", cell
        for call in guarded.engine.calls:
            # What reaches the engine carries the key's profiles, at their own strength or more.
            assert MUST[key] <= call.profiles.keys(), cell
            assert all(call.profiles[name] >= 1 for name in MUST[key]), cell
            assert KEYS[key].allow_base or call.profiles, cell
            assert key != "default" or "acme" in form or form.startswith("other") or "secret" in call.profiles
        if MUST[key] and state in ("unloaded", "damaged", "wrongly applied"):
            assert answer.status_code >= 400, cell
            assert "The capital" not in answer.text, cell
            assert "FORGOT" not in answer.text, cell
        elif answer.status_code == 200:
            answered += 1
            shown = re.findall(r'"name":"([a-z-]+)"', answer.text)
            assert MUST[key] <= set(shown), cell
            digest = NEW.digest if state == "replaced" else "sha256:" + "c" * 64
            assert "secret" not in shown or digest in answer.text, cell
    assert answered > 0 or state not in ("loaded", "replaced"), (
        "a table that refuses everything shows nothing"
    )


LOGPROB_FIELDS = {
    "/v1/completions": [
        {"logprobs": 0},
        {"logprobs": 1},
        {"logprobs": 1, "echo": True},
        {"prompt_logprobs": 0},
    ],
    "/v1/chat/completions": [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"prompt_logprobs": 1},
    ],
}


@pytest.mark.parametrize("key", [name for name, policy in KEYS.items() if not policy.logprobs])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_off_is_off_on_every_route(guarded: LiveServer, key: str, stream: bool) -> None:
    guarded.reset()
    set_state(guarded, "loaded")
    headers = {"Authorization": f"Bearer {key}", "X-Forget-Profile": "secret"}
    for path, fields in LOGPROB_FIELDS.items():
        for asked in fields:
            answer = guarded.post(
                path, {"model": MODEL, **GENERATING[path], **asked, "stream": stream}, headers=headers
            )
            assert answer.status_code == 403, (path, asked)
        plain = guarded.post(path, {"model": MODEL, **GENERATING[path], "stream": stream}, headers=headers)
        assert plain.status_code == 200
        assert "-0.5" not in plain.text, "the fake engine's log-probability"
    assert all(call.params.logprobs is call.params.prompt_logprobs is None for call in guarded.engine.calls)


def test_the_tables_know_every_route_that_generates(guarded: LiveServer) -> None:
    from test_routes import admitting

    routes = [route for route in guarded.apps[0].routes if isinstance(route, APIRoute)]
    assert admitting(routes) == set(GENERATING) == set(LOGPROB_FIELDS)
