"""Whatever a request's bytes are: if it is answered, every profile that it names anywhere was applied. Misspelt,
doubled, escaped, nested or contradicting names end in a refusal, never in less forgetting."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import MODEL, LiveServer
from scale import scaled

NUM_BODIES = scaled(fast=150, gate=5000, aim=100_000)
NAMES = ["acme", "secret", "harry-potter"]
KEYS = ["forget_profile"] * 4 + [
    "\\u0066orget_profile",
    "forget_profiles",
    "Forget_Profile",
    "forget-profile",
    "forget_profile ",
    "forget_profile\\u0000",
    "extra_body",
    "metadata",
    "user",
]
name = st.sampled_from(NAMES)
value = st.one_of(
    name,
    st.lists(name, max_size=3),
    name.map(str.upper),
    name.map(lambda n: f" {n}"),
    name.map(lambda n: {"name": n}),
    name.map(lambda n: {"forget_profile": n}),
    name.map(lambda n: [[n]]),
    name.map(lambda n: f"{n},acme"),
    st.sampled_from([None, "none", [], "", 0, False, ["none"], {}]),
)
fields = st.lists(st.tuples(st.sampled_from(KEYS), value), max_size=3)
suffix = st.one_of(
    st.just(""), st.lists(name, min_size=1, max_size=2).map("+".join), st.sampled_from(["none", "Acme"])
)
headers = st.lists(
    st.tuples(
        st.sampled_from(["X-Forget-Profile", "x-forget-profile", "X-Forget-Profiles"]),
        st.one_of(name, st.just("none"), st.just("acme+secret"), st.just("acme, secret")),
    ),
    max_size=2,
)
path = st.sampled_from(["/v1/completions", "/v1/chat/completions"])


def mentioned(*texts: str) -> set[str]:
    everything = " ".join(texts).lower()
    return {name for name in NAMES if name in everything}


@pytest.mark.row("JSON semantics", count=NUM_BODIES)
@pytest.mark.timeout(36000)
@given(fields=fields, suffix=suffix, headers=headers, path=path, data=st.data())
@settings(max_examples=NUM_BODIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_profile_that_is_named_is_applied_or_the_request_refused(
    server: LiveServer,
    fields: list[tuple[str, object]],
    suffix: str,
    headers: list[tuple[str, str]],
    path: str,
    data: st.DataObject,
) -> None:
    server.engine.calls.clear()
    model = f"{MODEL}:{suffix}" if suffix else MODEL
    prompt = (
        '"prompt": "Hi"' if path == "/v1/completions" else '"messages": [{"role": "user", "content": "Hi"}]'
    )
    pairs = [f'"model": "{model}"', prompt] + [f'"{key}": {json.dumps(item)}' for key, item in fields]
    body = "{" + ", ".join(data.draw(st.permutations(pairs))) + "}"
    response = server.post(
        path, content=body.encode(), headers=[("Content-Type", "application/json"), *headers]
    )
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        assert server.engine.calls == []
        return
    profiles = set(server.engine.calls[-1].profiles)
    # "user" is a label for the log: the one field whose text is not a choice.
    labels = {str(item) for key, item in fields if key == "user"}
    chosen = mentioned(
        suffix, *(text for _, text in headers), *(str(i) for k, i in fields if str(i) not in labels)
    )
    assert chosen <= profiles
    assert len(profiles) == response.text.count('"digest"')


@pytest.mark.parametrize("key", ["forget_profile\x00", "FORGET_PROFILE", "forgetProfile"])
def test_key_that_only_looks_right_is_refused(server: LiveServer, key: str) -> None:
    assert server.post("/v1/completions", {"model": MODEL, "prompt": "Hi", key: "acme"}).status_code == 400
