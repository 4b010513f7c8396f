"""The operators' listener: its keys, profiles that come and go under running requests, draining, metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from fake_engine import FakeEngine
from fastapi.routing import APIRoute
from live_server import MODEL, LiveServer, wait_until
from tiny_profile import PROBES, PROFILE, peft_config, peft_tensors, write_adapter

from uld_serve.errors import Overloaded, ProfileMismatch, UldError
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.store import write_profile
from uld_serve.server.admin import Body, operator_of, reader_of
from uld_serve.server.audit import AuditLog
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.telemetry import Telemetry

ASK = {"model": MODEL, "prompt": "Hi"}
KEYS = {
    "key-admin": KeyPolicy(name="admin", allowed=frozenset(), is_admin=True, may_read_metrics=True),
    "key-metrics": KeyPolicy(name="metrics", allowed=frozenset(), may_read_metrics=True),
    "key-free": KeyPolicy(name="free", allow_base=True, logprobs=True),
    "key-bound": KeyPolicy(name="bound", mandatory=frozenset({"secret"})),
}


@dataclass
class FakeHost:
    """Takes every version, or refuses with `error`; remembers what it was given."""

    error: UldError | None = None
    admitted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    async def admit(self, version: ProfileVersion) -> None:
        if self.error is not None:
            raise self.error
        self.admitted.append(version.digest)

    async def drop(self, version: ProfileVersion) -> None:
        self.dropped.append(version.digest)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two versions of "acme", and a new profile."""
    folder = tmp_path / "profiles"
    adapter = write_adapter(tmp_path / "peft", peft_config(layers_to_transform=[2, 3]), peft_tensors())
    for directory, name, strength in (
        ("acme", "acme", 2.0),
        ("acme-v2", "acme", 3.0),
        ("fresh", "fresh", 1.0),
    ):
        profile = PROFILE.model_copy(
            update={"name": name, "rule": PROFILE.rule.model_copy(update={"strength": strength})}
        )
        write_profile(
            folder / directory, profile, adapters={"adapter": adapter}, probes=PROBES, training={"seed": 0}
        )
    return folder


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def served(start_server: Callable[..., LiveServer], host: FakeHost, root: Path) -> LiveServer:
    return start_server(host=host, roots=(root,), engine=FakeEngine(), unload_wait_s=5.0)


def load(server: LiveServer, name: str, key: str | None = None, **body: object) -> dict[str, object]:
    answer = server.admin("POST", f"/admin/forget_profiles/{name}/load", key, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, (401, 401, 401, 401, 401)),
        ("wrong", (401, 401, 401, 401, 401)),
        ("key-free", (403, 403, 403, 403, 403)),
        ("key-bound", (403, 403, 403, 403, 403)),
        ("key-metrics", (403, 403, 403, 403, 200)),
        ("key-admin", (200, 200, 200, 200, 200)),
    ],
)
def test_only_admin_keys_open_the_admin_listener(
    start_server: Callable[..., LiveServer],
    host: FakeHost,
    root: Path,
    key: str | None,
    expected: tuple[int, ...],
) -> None:
    server = start_server(host=host, roots=(root,), keys=KEYS)
    calls = [
        ("GET", "/admin/forget_profiles", {}),
        ("POST", "/admin/forget_profiles/fresh/load", {"json": {}}),
        ("DELETE", "/admin/forget_profiles/acme", {}),
        ("POST", "/admin/drain", {"json": {}}),
        ("GET", "/metrics", {}),
    ]
    found = tuple(server.admin(method, path, key, **kwargs).status_code for method, path, kwargs in calls)
    assert found == expected
    assert bool(host.admitted) == (key == "key-admin")


def test_admin_key_generates_nothing_and_admin_routes_are_nowhere_else(
    start_server: Callable[..., LiveServer], host: FakeHost
) -> None:
    server = start_server(host=host, keys=KEYS)
    headers = {"Authorization": "Bearer key-admin"}
    assert server.post("/v1/completions", ASK, headers=headers).status_code == 403
    for path in ("/metrics", "/admin/drain", "/admin/forget_profiles"):
        assert server.get(path, headers=headers).status_code == 404
    assert server.admin("POST", "/v1/completions", "key-admin", json=ASK).status_code == 404


def test_every_admin_route_asks_for_its_key(served: LiveServer) -> None:
    routes = [route for route in served.apps[1].routes if isinstance(route, APIRoute)]
    assert len(routes) == len(served.apps[1].routes) == 5
    for route in routes:
        assert route.dependant.request_param_name is None
        calls = [inner.call for inner in route.dependant.dependencies]
        assert operator_of in calls or reader_of in calls
        assert all(call in (operator_of, reader_of) or isinstance(call, Body) for call in calls)


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("unheard-of", {}, 404, "not_found"),
        ("acme", {"directory": "../profiles/acme"}, 400, None),
        ("acme", {"directory": "/etc"}, 400, None),
        ("acme", {"directory": ".."}, 400, None),
        ("acme", {"path": "acme"}, 400, "unknown_parameter"),
        ("acme", {"directory": "fresh"}, 409, "profile_mismatch"),
        ("fresh", {"digest": "sha256:" + "0" * 64}, 409, "profile_mismatch"),
        ("..%2Facme", {}, 404, "not_found"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(
    served: LiveServer, host: FakeHost, name: str, body: dict[str, object], status: int, code: str | None
) -> None:
    before = served.admin("GET", "/admin/forget_profiles").json()
    answer = served.admin("POST", f"/admin/forget_profiles/{name}/load", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert host.admitted == []
    assert served.admin("GET", "/admin/forget_profiles").json() == before


def test_a_web_page_cannot_post_here(served: LiveServer) -> None:
    for headers in ({"Content-Type": "text/plain"}, {}):
        url = f"http://127.0.0.1:{served.admin_port}/admin/drain"
        assert served.http.post(url, content=b"{}", headers=headers).status_code == 415
    assert not served.backend.is_draining


@pytest.mark.parametrize(
    ("error", "status"), [(ProfileMismatch("other base"), 409), (Overloaded("no room just now"), 429)]
)
def test_version_that_does_not_pass_changes_nothing(
    served: LiveServer, host: FakeHost, error: UldError, status: int
) -> None:
    host.error = error
    answer = served.admin("POST", "/admin/forget_profiles/acme/load", json={"directory": "acme-v2"})
    assert answer.status_code == status
    served.post("/v1/completions", ASK | {"forget_profile": "acme"})
    assert served.engine.calls[-1].decision.applied[0].version.digest == "sha256:" + "a" * 64
    assert len(host.dropped) == 1


def test_damaged_version_is_refused_and_the_old_one_serves_on(
    served: LiveServer, host: FakeHost, root: Path
) -> None:
    weights = root / "acme-v2" / "adapter" / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    answer = served.admin("POST", "/admin/forget_profiles/acme/load", json={"directory": "acme-v2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "profile_corrupt")
    assert served.post("/v1/completions", ASK | {"forget_profile": "acme"}).status_code == 200
    assert host.admitted == []


def test_new_profile_is_there_for_the_next_request(served: LiveServer) -> None:
    assert served.post("/v1/completions", ASK | {"forget_profile": "fresh"}).status_code == 404
    state = load(served, "fresh")
    assert (state["previous"], state["num_leases"]) == (None, 0)
    answer = served.post("/v1/completions", ASK | {"forget_profile": "fresh"})
    assert answer.json()["forget"]["profiles"][0]["digest"] == state["digest"]
    assert f"{MODEL}:fresh" in served.get("/v1/models").text


def test_request_in_flight_keeps_its_version_and_the_next_gets_the_new_one(
    served: LiveServer, host: FakeHost
) -> None:
    first = load(served, "acme")
    served.engine.step_s = 0.05
    with served.client() as client:
        running = client.completions.create(**ASK, stream=True, extra_body={"forget_profile": "acme"})
        chunks = iter(running)
        assert next(chunks).model_extra["forget"]["profiles"][0]["digest"] == first["digest"]
        second = load(served, "acme", directory="acme-v2")
        assert (second["previous"], second["num_leases"]) == (first["digest"], 1)
        assert second["digest"] != first["digest"]
        answer = served.post("/v1/completions", ASK | {"forget_profile": "acme", "max_tokens": 1})
        assert answer.json()["forget"]["profiles"][0]["digest"] == second["digest"]
        assert first["digest"] not in host.dropped
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == "ORGOT ['acme']"
    wait_until(lambda: first["digest"] in host.dropped)
    assert served.backend.leases.total == 0


def test_loading_what_is_loaded_changes_nothing(served: LiveServer, host: FakeHost) -> None:
    first = load(served, "acme")
    again = load(served, "acme", digest=first["digest"])
    assert again["digest"] == again["previous"] == first["digest"]
    assert host.admitted == [first["digest"]]
    assert first["digest"] not in host.dropped


def test_unloading_waits_for_those_who_hold_it(served: LiveServer, host: FakeHost) -> None:
    served.engine.step_s = 0.05
    with served.client() as client, ThreadPoolExecutor(1) as pool:
        running = client.completions.create(**ASK, stream=True, extra_body={"forget_profile": "acme"})
        next(iter(running))
        unloading = pool.submit(served.admin, "DELETE", "/admin/forget_profiles/acme")
        wait_until(lambda: "acme" not in served.loader.registry.names())
        refused = served.post("/v1/completions", ASK | {"forget_profile": "acme"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "profile_not_found")
        assert not unloading.done()
        assert host.dropped == []
        assert "".join(chunk.choices[0].text for chunk in running).endswith("acme']")
        state = unloading.result(5).json()
    assert (state["digest"], state["num_leases"], state["num_ended"]) == (None, 1, 0)
    assert host.dropped == ["sha256:" + "a" * 64]


def test_who_holds_an_unloaded_profile_for_too_long_ends_with_an_error(
    start_server: Callable[..., LiveServer], host: FakeHost
) -> None:
    server = start_server(host=host, engine=FakeEngine(hang_after=2), unload_wait_s=0.1)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        held = client.completions.create(**ASK, stream=True, extra_body={"forget_profile": "acme"})
        other = client.completions.create(**ASK, stream=True, extra_body={"forget_profile": "secret"})
        next(iter(held)), next(iter(other))
        unloading = pool.submit(server.admin, "DELETE", "/admin/forget_profiles/acme")
        with pytest.raises(openai.APIError, match="unloaded"):
            list(held)
        assert unloading.result(5).json()["num_ended"] >= 1
        assert server.engine.num_running == 1
        other.close()
    wait_until(lambda: server.backend.leases.total == 0)


def test_profile_that_a_key_applies_is_not_unloaded(
    start_server: Callable[..., LiveServer], host: FakeHost
) -> None:
    server = start_server(host=host, keys=KEYS)
    answer = server.admin("DELETE", "/admin/forget_profiles/secret", "key-admin")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "profile_needed")
    assert (
        server.post("/v1/completions", ASK, headers={"Authorization": "Bearer key-bound"}).status_code == 200
    )
    assert server.admin("DELETE", "/admin/forget_profiles/unheard-of", "key-admin").status_code == 404


def test_hot_swaps_under_streams_drop_and_mix_nothing(served: LiveServer) -> None:
    """Each stream's text names the version that it began with; so does its receipt."""
    served.engine.text_of = lambda call: call.decision.applied[0].version.digest[7:19] * 2
    served.engine.step_s = 0.001
    digests = {
        load(served, "acme")["digest"][7:19],
        load(served, "acme", directory="acme-v2")["digest"][7:19],
    }
    is_over, found = threading.Event(), []

    def ask() -> None:
        with served.client() as client:
            while not is_over.is_set():
                stream = client.completions.create(
                    **ASK, stream=True, max_tokens=24, extra_body={"forget_profile": "acme"}
                )
                chunks = list(stream)
                told = chunks[0].model_extra["forget"]["profiles"][0]["digest"][7:19]
                found.append((told, "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)))

    with ThreadPoolExecutor(8) as pool:
        askers = [pool.submit(ask) for _ in range(8)]
        for number in range(30):
            load(served, "acme", directory=("acme", "acme-v2")[number % 2])
        is_over.set()
        for asker in askers:
            asker.result(10)
    assert {told for told, _ in found} == digests
    assert all(text == told * 2 for told, text in found)
    wait_until(lambda: served.backend.leases.total == 0)


def test_draining_finishes_what_runs_and_takes_no_more(served: LiveServer) -> None:
    served.engine.step_s = 0.03
    with served.client() as client:
        running = client.completions.create(**ASK, stream=True, max_tokens=100)
        first = next(iter(running)).choices[0].text
        assert served.admin("POST", "/admin/drain", json={}).json() == {"is_draining": True, "num_running": 1}
        refused = served.post("/v1/completions", ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert (served.get("/ready").status_code, served.get("/health").status_code) == (503, 200)
        text = first + "".join(chunk.choices[0].text for chunk in running)
    assert text == "The capital is Paris."
    started = time.monotonic()
    assert served.admin("POST", "/admin/drain", json={"wait_s": 5}).json()["num_running"] == 0
    assert time.monotonic() - started < 3


def test_what_operators_do_is_recorded_first(
    start_server: Callable[..., LiveServer], host: FakeHost, root: Path, tmp_path: Path
) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    server = start_server(host=host, roots=(root,), keys=KEYS, telemetry=Telemetry(audit=log))
    load(server, "fresh", "key-admin")
    server.admin("DELETE", "/admin/forget_profiles/fresh", "key-admin")
    text = log.path.read_text()
    assert [f'"event": "{event}"' in text for event in ("loading", "loaded", "unloading", "unloaded")] == [
        True
    ] * 4
    assert '"key": "admin"' in text
    log.close()
    log.path.unlink()
    log.path.mkdir()
    assert server.admin("POST", "/admin/drain", "key-admin", json={}).status_code == 503
    assert not server.backend.is_draining
