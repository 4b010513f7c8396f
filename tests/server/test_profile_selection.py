"""Profiles chosen over HTTP, all three ways, on both routes, whole and streamed; and what a key may see."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from live_server import MODEL, LiveServer

from uld_serve.server.policy import KeyPolicy

ROUTES = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
}
WAYS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "body": ({"forget_profile": "harry-potter"}, {}),
    "body list": ({"forget_profile": ["harry-potter"]}, {}),
    "suffix": ({"model": f"{MODEL}:harry-potter"}, {}),
    "header": ({}, {"X-Forget-Profile": "harry-potter"}),
    "all three": (
        {"forget_profile": "harry-potter", "model": f"{MODEL}:harry-potter"},
        {"x-forget-profile": "harry-potter"},
    ),
}
RECEIPT = "harry-potter@" + "b" * 12


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [False, True])
def test_profile_is_applied_and_receipted(server: LiveServer, path: str, way: str, stream: bool) -> None:
    fields, headers = WAYS[way]
    body = {"model": MODEL, **ROUTES[path], "stream": stream, **fields}
    response = server.post(path, body, headers=headers)
    assert response.status_code == 200, response.text
    assert server.engine.calls[-1].profiles == {"harry-potter": 1.0}
    assert response.headers["x-forget-profile"] == RECEIPT
    receipt = '"forget":{"profiles":[{"name":"harry-potter","digest":"sha256:' + "b" * 64
    assert receipt in response.text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"forget_profile": ["acme", "harry-potter"]}, {}),
        ({"forget_profile": ["harry-potter", "acme", "acme"]}, {}),
        ({"model": f"{MODEL}:acme+harry-potter"}, {}),
        ({}, {"X-Forget-Profile": "acme, harry-potter"}),
        ({}, {"X-Forget-Profile": "harry-potter+acme"}),
    ],
)
def test_several_profiles(
    server: LiveServer, path: str, fields: dict[str, object], headers: dict[str, str]
) -> None:
    response = server.post(path, {"model": MODEL, **ROUTES[path], **fields}, headers=headers)
    assert response.status_code == 200
    assert server.engine.calls[-1].profiles == {"acme": 1.0, "harry-potter": 1.0}
    assert response.headers["x-forget-profile"] == "acme@" + "a" * 12 + "," + RECEIPT


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "fields", [{"forget_profile": None}, {"forget_profile": "none"}, {}, {"model": f"{MODEL}:none"}]
)
def test_base_in_development(server: LiveServer, path: str, fields: dict[str, object]) -> None:
    response = server.post(path, {"model": MODEL, **ROUTES[path], **fields})
    assert response.headers["x-forget-profile"] == "none"
    assert server.engine.calls[-1].profiles == {}


@pytest.mark.parametrize("path", ROUTES)
def test_strength_scales(server: LiveServer, path: str) -> None:
    body = {"model": f"{MODEL}:acme", **ROUTES[path], "forget_strength": 1.5}
    response = server.post(path, body)
    assert server.engine.calls[-1].profiles == {"acme": 1.5}
    assert response.json()["forget"]["profiles"][0]["strength"] == 1.5


REFUSALS: list[tuple[dict[str, object], dict[str, str], int, str]] = [
    ({"forget_profile": "unheard-of"}, {}, 404, "profile_not_found"),
    ({"model": f"{MODEL}:unheard-of"}, {}, 404, "profile_not_found"),
    ({}, {"X-Forget-Profile": "unheard-of"}, 404, "profile_not_found"),
    ({"model": "gpt-4"}, {}, 404, "model_not_found"),
    ({"model": f"{MODEL}:"}, {}, 404, "model_not_found"),
    ({"model": f"{MODEL}x:acme"}, {}, 404, "model_not_found"),
    ({"model": f"{MODEL}:acme+"}, {}, 400, ""),
    ({"forget_profile": "acme"}, {"X-Forget-Profile": "harry-potter"}, 400, "profile_conflict"),
    ({"forget_profile": None}, {"X-Forget-Profile": "harry-potter"}, 400, "profile_conflict"),
    ({"forget_profile": "acme", "model": f"{MODEL}:harry-potter"}, {}, 400, "profile_conflict"),
    ({"forget_profile": []}, {}, 400, ""),
    ({"forget_profile": ["acme", "none"]}, {}, 400, ""),
    ({"forget_profile": ["acme", 1]}, {}, 400, ""),
    ({"forget_profile": {"name": "acme"}}, {}, 400, ""),
    ({"forget_profile": ""}, {}, 400, ""),
    ({}, {"X-Forget-Profile": ""}, 400, ""),
    ({}, {"X-Forget-Profile": "none,acme"}, 400, ""),
    ({}, {"X-Forget-Profiles": "acme"}, 400, ""),
    ({}, {"X-Forget_Profile": "acme"}, 400, ""),
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("fields", "headers", "status", "code"), REFUSALS)
def test_refused_and_nothing_generated(
    server: LiveServer, path: str, fields: dict[str, object], headers: dict[str, str], status: int, code: str
) -> None:
    response = server.post(path, {"model": MODEL, **ROUTES[path], **fields}, headers=headers)
    assert response.status_code == status, response.text
    assert (response.json()["error"]["code"] or "") == code
    assert server.engine.calls == []


def test_header_given_twice_is_400(server: LiveServer) -> None:
    headers = [("X-Forget-Profile", "acme"), ("X-Forget-Profile", "acme")]
    response = server.post("/v1/completions", {"model": MODEL, "prompt": "Hi"}, headers=headers)
    assert response.status_code == 400


def test_query_parameter_is_400(server: LiveServer) -> None:
    response = server.post("/v1/completions?forget_profile=acme", {"model": MODEL, "prompt": "Hi"})
    assert response.status_code == 400
    assert server.engine.calls == []


KEYS = {
    "key-free": KeyPolicy(name="free", allow_base=True, logprobs=True),
    "key-bound": KeyPolicy(name="bound", mandatory=frozenset({"secret"}), allowed=frozenset({"acme"})),
}


@pytest.fixture
def guarded(start_server: Callable[..., LiveServer]) -> LiveServer:
    return start_server(keys=KEYS)


@pytest.mark.parametrize("path", ROUTES)
def test_keys_decide(guarded: LiveServer, path: str) -> None:
    def ask(key: str | None, **fields: object) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return guarded.post(path, {"model": MODEL, **ROUTES[path], **fields}, headers=headers).status_code

    assert ask(None) == 401
    assert ask("wrong") == 401
    assert guarded.engine.calls == []
    assert ask("key-free") == 200
    assert guarded.engine.calls[-1].profiles == {}
    assert ask("key-bound") == 200
    assert guarded.engine.calls[-1].profiles == {"secret": 1.0}
    assert ask("key-bound", forget_profile="acme") == 200
    assert guarded.engine.calls[-1].profiles == {"acme": 1.0, "secret": 1.0}
    assert ask("key-bound", forget_profile=None) == 403
    assert ask("key-bound", forget_profile="harry-potter") == 404
    assert ask("key-bound", prompt_logprobs=1) == 403
    assert ask("key-bound", logprobs=1 if path == "/v1/completions" else True) == 403
    assert ask("key-free", prompt_logprobs=1) == 200
    assert len(guarded.engine.calls) == 4


def test_no_route_but_the_status_ones_answers_without_a_key(guarded: LiveServer) -> None:
    statuses = {path: guarded.get(path).status_code for path in ("/health", "/ready", "/version")}
    assert set(statuses.values()) == {200}
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/forget_profiles"):
        response = guarded.get(path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/tokenize", "/v1/detokenize", *ROUTES):
        assert guarded.post(path, {}).status_code == 401


@pytest.mark.parametrize("value", ["key-free", "Basic key-free", "Bearer", "Bearer key-free x", "Bearer ké"])
def test_malformed_authorization_is_401(guarded: LiveServer, value: str) -> None:
    assert guarded.get("/v1/models", headers={"Authorization": value.encode("latin-1")}).status_code == 401


def test_lists_show_what_the_key_may_use(guarded: LiveServer) -> None:
    with guarded.client("key-free") as client:
        models = list(client.models.list())
        assert [model.id for model in models] == [MODEL] + [
            f"{MODEL}:{n}" for n in ("acme", "harry-potter", "secret")
        ]
        assert [model.model_extra["parent"] for model in models] == [None] + [MODEL] * 3
        assert client.models.retrieve(f"{MODEL}:acme").id == f"{MODEL}:acme"
    with guarded.client("key-bound") as client:
        assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}:acme", f"{MODEL}:secret"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(f"{MODEL}:harry-potter")
    listed = guarded.get("/v1/forget_profiles", headers={"Authorization": "Bearer key-bound"}).json()
    assert listed["key"] == {"allow_base": False, "logprobs": False}
    free = guarded.get("/v1/forget_profiles", headers={"Authorization": "Bearer key-free"}).json()
    assert free["key"] == {"allow_base": True, "logprobs": True}
    cards = listed["data"]
    assert [(card["name"], card["is_mandatory"]) for card in cards] == [("acme", False), ("secret", True)]
    assert cards[0]["digest"] == "sha256:" + "a" * 64
    assert cards[0]["model"] == f"{MODEL}:acme"


def test_key_limit_is_429_until_its_requests_end(start_server: Callable[..., LiveServer]) -> None:
    keys = {
        "one": KeyPolicy(name="one", allow_base=True, max_concurrency=1),
        "two": KeyPolicy(name="two", allow_base=True),
    }
    server = start_server(keys=keys)
    server.engine.hang_after = 1
    with server.client("one") as client, server.client("two") as other:
        ask = {"model": MODEL, "prompt": "Hi", "stream": True}
        first = client.completions.create(**ask)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**ask)
        assert caught.value.response.headers["retry-after"] == "1"
        other.completions.create(**ask).close()
        first.close()
        server.engine.hang_after = None
        for _ in range(100):
            try:
                assert client.completions.create(model=MODEL, prompt="Hi").choices[0].text
                break
            except openai.RateLimitError:
                pass
        else:
            pytest.fail("the slot was never given back")
