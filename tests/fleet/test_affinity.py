"""Which replica a request prefers: stable for what shares a prefix, even over many, and bounded by load."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uld_serve.fleet.affinity import preference, route_key

BOUND = [(b"authorization", b"Bearer one")]


def key(body: object, headers: list[tuple[bytes, bytes]] = BOUND, prefix_chars: int = 32) -> str:
    return route_key(headers, json.dumps(body).encode(), prefix_chars=prefix_chars)


LONG = "You are a librarian. Answer in one sentence. "


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": LONG + "Who?"}, {"prompt": LONG + "When?", "max_tokens": 3, "temperature": 1.0}),
        ({"prompt": [LONG + "Who?"]}, {"prompt": LONG + "When?"}),
        ({"prompt": list(range(40))}, {"prompt": [*range(32), 99]}),
        (
            {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "Who?"}]},
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": LONG}]},
                    {"role": "user", "content": "When?"},
                ]
            },
        ),
    ],
)
def test_what_begins_alike_has_one_key(one: dict[str, object], other: dict[str, object]) -> None:
    assert key({"model": "m", **one}) == key({"model": "m", **other})


@pytest.mark.parametrize(
    "other",
    [
        {"model": "m", "prompt": "Bye " + LONG},
        {"model": "m:hp", "prompt": LONG},
        {"model": "m", "prompt": LONG, "forget_profile": "hp"},
        {"model": "m", "prompt": LONG, "forget_profile": ["hp"]},
    ],
)
def test_another_prefix_model_or_profile_has_another_key(other: dict[str, object]) -> None:
    assert key(other) != key({"model": "m", "prompt": LONG})


def test_keys_that_share_no_cache_share_no_route() -> None:
    body = {"model": "m", "prompt": LONG}
    assert key(body) != key(body, [(b"authorization", b"Bearer two")])
    assert key(body) != key(body, [*BOUND, (b"x-forget-profile", b"hp")])


def test_the_key_itself_does_not_show() -> None:
    assert "one" not in key({"model": "m", "prompt": "p"})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"prompt": {"a": 1}}', b'{"prompt": null}']
)
def test_a_body_that_the_replica_will_refuse_is_routed_too(body: bytes) -> None:
    assert len(route_key(BOUND, body, prefix_chars=32)) == 32


@given(st.binary(max_size=200))
def test_any_bytes_have_a_key(body: bytes) -> None:
    assert route_key([], body, prefix_chars=8) == route_key([], body, prefix_chars=8)


IDLE = dict.fromkeys(("r1", "r2", "r3", "r4"), 0)


def test_keys_spread_over_replicas() -> None:
    chosen = Counter(preference(f"key {number}", IDLE, slack=4)[0] for number in range(4000))
    assert set(chosen) == set(IDLE)
    assert max(chosen.values()) < 1.15 * min(chosen.values())


def test_a_replica_that_goes_moves_only_its_own_keys() -> None:
    rest = {name: 0 for name in IDLE if name != "r3"}
    for number in range(500):
        before, after = preference(f"{number}", IDLE, slack=4), preference(f"{number}", rest, slack=4)
        assert after == [name for name in before if name != "r3"]


def test_every_replica_is_tried_once() -> None:
    assert sorted(preference("k", {"a": 3, "b": 90, "c": 0}, slack=2)) == ["a", "b", "c"]


def test_much_busier_than_the_least_busy_is_preferred_no_more() -> None:
    first = preference("k", IDLE, slack=4)[0]
    assert preference("k", IDLE | {first: 4}, slack=4)[0] == first
    assert preference("k", IDLE | {first: 5}, slack=4)[-1] == first
    busy_everywhere = dict.fromkeys(IDLE, 40)
    assert preference("k", busy_everywhere, slack=4)[0] == first


def test_no_replica_no_preference() -> None:
    assert preference("k", {}, slack=1) == []
