"""resolve's truth table: every kind of key against every kind of request, with the expected Decision written out by
rules of its own, not by the code under test."""

from __future__ import annotations

import itertools

import pytest
from fake_engine import profile_version, registry

from uld_serve.errors import Forbidden, InvalidRequest, ProfileError, UldError, UnknownProfile
from uld_serve.profiles.registry import Registry
from uld_serve.server.policy import (
    DEVELOPMENT,
    KeyPolicy,
    Selection,
    profile_set,
    require_logprobs_allowed,
    resolve,
    select,
)

KEYS = {
    "development": DEVELOPMENT,
    "free": KeyPolicy(name="free", allow_base=True),
    "must-forget-something": KeyPolicy(name="k"),
    "bound": KeyPolicy(name="k", mandatory=frozenset({"secret"})),
    "bound-to-two": KeyPolicy(name="k", mandatory=frozenset({"secret", "acme"})),
    "bound-and-closed": KeyPolicy(name="k", mandatory=frozenset({"secret"}), allowed=frozenset()),
    "default": KeyPolicy(name="k", default=frozenset({"acme"})),
    "default-and-base": KeyPolicy(name="k", default=frozenset({"acme"}), allow_base=True),
    "bound-with-default": KeyPolicy(name="k", mandatory=frozenset({"secret"}), default=frozenset({"acme"})),
    "some": KeyPolicy(name="k", allowed=frozenset({"acme", "harry-potter"})),
    "some-and-base": KeyPolicy(name="k", allowed=frozenset({"acme"}), allow_base=True),
}
NAMES = [
    None,
    frozenset(),
    frozenset({"acme"}),
    frozenset({"secret"}),
    frozenset({"harry-potter", "acme"}),
    frozenset({"unheard-of"}),
    frozenset({"acme", "unheard-of"}),
]
STRENGTHS = [None, 0.0, 0.01, 0.5, 1.0, 2.0]


def outcome(policy: KeyPolicy, selection: Selection) -> dict[str, float] | type[UldError]:
    try:
        decision = resolve(policy, selection, registry())
    except UldError as error:
        return type(error)
    return {applied.version.name: applied.scale for applied in decision.applied}


@pytest.mark.parametrize(("key", "names", "strength"), list(itertools.product(KEYS, NAMES, STRENGTHS)))
def test_never_weaker_than_the_key_demands(
    key: str, names: frozenset[str] | None, strength: float | None
) -> None:
    policy = KEYS[key]
    result = outcome(policy, Selection(names, strength))
    if not isinstance(result, dict):
        return
    assert policy.mandatory <= result.keys()
    assert all(result[name] >= 1 for name in policy.mandatory)
    if not policy.allow_base:
        assert any(scale >= 1 for scale in result.values())
    if names and strength != 0:
        assert names <= result.keys()
    if names is None and strength != 0:
        assert policy.default <= result.keys()
    assert result.keys() <= policy.mandatory | policy.default | (names or frozenset())


ACME, SECRET = {"acme": 1.0}, {"secret": 1.0}
CELLS: list[tuple[str, frozenset[str] | None, float | None, dict[str, float] | type[UldError]]] = [
    ("development", None, None, {}),
    ("development", frozenset(), None, {}),
    ("development", frozenset({"acme"}), None, ACME),
    ("development", frozenset({"acme"}), 0.5, {"acme": 0.5}),
    ("development", frozenset({"acme"}), 0.0, {}),
    ("development", frozenset({"acme"}), 2.5, InvalidRequest),
    ("development", None, 0.5, InvalidRequest),
    ("development", frozenset(), 0.5, InvalidRequest),
    ("development", frozenset({"harry-potter", "acme"}), 2.0, {"acme": 2.0, "harry-potter": 2.0}),
    ("development", frozenset({"unheard-of"}), None, UnknownProfile),
    ("must-forget-something", None, None, Forbidden),
    ("must-forget-something", frozenset(), None, Forbidden),
    ("must-forget-something", frozenset({"acme"}), None, ACME),
    ("must-forget-something", frozenset({"acme"}), 0.99, Forbidden),
    ("must-forget-something", frozenset({"acme"}), 0.0, Forbidden),
    ("must-forget-something", frozenset({"acme"}), 1.5, {"acme": 1.5}),
    ("bound", None, None, SECRET),
    ("bound", frozenset(), None, Forbidden),
    ("bound", frozenset({"acme"}), None, {"acme": 1.0, "secret": 1.0}),
    ("bound", frozenset({"acme"}), 0.5, {"acme": 0.5, "secret": 1.0}),
    ("bound", frozenset({"acme"}), 0.0, Forbidden),
    ("bound", None, 0.5, SECRET),
    ("bound", frozenset({"secret"}), 0.5, SECRET),
    ("bound", None, 2.0, {"secret": 2.0}),
    ("bound", None, 0.0, Forbidden),
    ("bound-to-two", None, None, {"acme": 1.0, "secret": 1.0}),
    ("bound-to-two", frozenset({"acme"}), 0.5, {"acme": 1.0, "secret": 1.0}),
    ("bound-and-closed", None, None, SECRET),
    ("bound-and-closed", frozenset({"secret"}), None, SECRET),
    ("bound-and-closed", frozenset({"acme"}), None, UnknownProfile),
    ("default", None, None, ACME),
    ("default", frozenset(), None, Forbidden),
    ("default", frozenset({"secret"}), None, SECRET),
    ("default", None, 0.5, Forbidden),
    ("default-and-base", None, None, ACME),
    ("default-and-base", frozenset(), None, {}),
    ("default-and-base", None, 0.5, {"acme": 0.5}),
    ("bound-with-default", None, None, {"acme": 1.0, "secret": 1.0}),
    ("bound-with-default", frozenset({"harry-potter"}), None, {"harry-potter": 1.0, "secret": 1.0}),
    ("some", frozenset({"secret"}), None, UnknownProfile),
    ("some", frozenset({"acme"}), None, ACME),
    ("some", frozenset({"acme", "secret"}), None, UnknownProfile),
    ("some-and-base", None, None, {}),
    ("some-and-base", frozenset({"harry-potter"}), None, UnknownProfile),
]


@pytest.mark.parametrize(("key", "names", "strength", "expected"), CELLS)
def test_truth_table(
    key: str,
    names: frozenset[str] | None,
    strength: float | None,
    expected: dict[str, float] | type[UldError],
) -> None:
    assert outcome(KEYS[key], Selection(names, strength)) == expected


def test_missing_mandatory_profile_fails_instead_of_weakening() -> None:
    without = Registry([profile_version("acme")])
    with pytest.raises(ProfileError) as caught:
        resolve(KEYS["bound"], Selection(frozenset({"acme"}), None), without)
    assert caught.value.code == "mandatory_profile_missing"


def test_hidden_and_unknown_profiles_read_the_same() -> None:
    messages = set()
    for name in ("secret", "unheard-of"):
        with pytest.raises(UnknownProfile) as caught:
            resolve(KEYS["some"], Selection(frozenset({name})), registry())
        messages.add(caught.value.message)
    assert len(messages) == 1


def test_places_that_agree_are_one_selection() -> None:
    acme = frozenset({"acme"})
    assert select(body=[acme], suffix=[acme], header=[acme], strength=0.5) == Selection(acme, 0.5)
    assert select() == Selection(None, None)
    assert select(header=[frozenset()]) == Selection(frozenset(), None)


@pytest.mark.parametrize("other", [frozenset({"secret"}), frozenset(), frozenset({"acme", "secret"})])
@pytest.mark.parametrize("places", list(itertools.permutations(("body", "suffix", "header"), 2)))
def test_places_that_disagree_are_refused(other: frozenset[str], places: tuple[str, str]) -> None:
    named = {places[0]: [frozenset({"acme"})], places[1]: [other]}
    with pytest.raises(InvalidRequest) as caught:
        select(**named)
    assert caught.value.code == "profile_conflict"


def test_none_is_a_word_of_its_own() -> None:
    assert profile_set(None, param="p") == profile_set(["none"], param="p") == frozenset()
    for names in (["none", "acme"], [""], ["acme", ""]):
        with pytest.raises(InvalidRequest):
            profile_set(names, param="p")


def test_a_key_sees_what_it_may_ask_for_or_must_forget() -> None:
    key = KeyPolicy(name="k", allowed=frozenset({"a"}), mandatory=frozenset({"m"}), default=frozenset({"d"}))
    assert [name for name in ("a", "d", "m", "x") if key.may_see(name)] == ["a", "d", "m"]
    assert KeyPolicy(name="k").may_see("x")


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("free", True),
        ("must-forget-something", False),
        ("bound", True),
        ("default", True),
        ("some", False),
    ],
)
def test_who_names_nothing_has_an_answer_where_something_stands_for_it(key: str, may: bool) -> None:
    assert KEYS[key].may_name_nothing is may
    assert (outcome(KEYS[key], Selection()) is Forbidden) is not may


def test_log_probabilities_are_for_keys_that_may_have_them() -> None:
    key = KeyPolicy(name="k")
    rights = (key.logprobs, key.allow_base, key.is_admin, key.may_read_metrics, key.may_fine_tune)
    assert rights == (False,) * 5
    require_logprobs_allowed(key, [])
    require_logprobs_allowed(DEVELOPMENT, ["logprobs", "top_logprobs"])
    with pytest.raises(Forbidden, match="leave out top_logprobs") as caught:
        require_logprobs_allowed(key, ["top_logprobs"])
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize("names", [["none", "acme"], ["acme", ""], [""], ["none", "none"]])
def test_none_stands_alone_and_no_name_is_empty(names: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="X-Forget-Profile: 'none' stands alone") as caught:
        profile_set(names, param="X-Forget-Profile")
    assert caught.value.param == "X-Forget-Profile"


def test_none_and_nothing_are_the_empty_set() -> None:
    assert profile_set(None, param="p") == profile_set(["none"], param="p") == frozenset()
    assert profile_set(["a", "b", "a"], param="p") == frozenset({"a", "b"})
