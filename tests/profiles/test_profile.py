"""The schema of profile.json and probes.json: what is derived, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_profile import BASE, PROBES, PROFILE

from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import FilterSpec, Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.strict_json import parse_model, parse_object

ONE = StreamSpec(name="one", fork=0, exit=2, kv="borrowed", adapter="one")
TWO = StreamSpec(name="two", fork=0, exit=2, kv="borrowed", adapter="two")


def _profile(**changes: object) -> Profile:
    fields = {
        "name": "p",
        "method": "uld",
        "base": BASE,
        "streams": (ONE,),
        "rule": RuleSpec(kind="subtract"),
    }
    return Profile.model_validate({**fields, **changes})


def test_json_round_trip() -> None:
    assert parse_model(Profile, PROFILE.model_dump_json().encode()) == PROFILE
    assert parse_model(Probes, PROBES.model_dump_json().encode()) == PROBES


@pytest.mark.parametrize(
    ("kind", "mode", "tau", "protect"),
    [
        ("subtract", "plausibility", 0.01, True),
        ("relu_difference", "fused", 0.02, False),
        ("pair_linear", "fused", 0.02, True),
        ("identity", "none", 0.0, False),
    ],
)
def test_filter_and_protect_default_by_rule(kind: str, mode: str, tau: float, protect: bool) -> None:
    rule = RuleSpec.model_validate({"kind": kind})
    assert (rule.filter.mode, rule.filter.tau, rule.protect) == (mode, tau, protect)
    assert rule.filter.min_keep == 256


def test_one_stream_needs_no_roles_and_two_do() -> None:
    assert _profile().roles == {"a": "one"}
    pair = {"kind": "pair_linear", "strength": 1.0}
    with pytest.raises(ValidationError, match="needs roles"):
        _profile(streams=(ONE, TWO), rule=pair)
    rule = {**pair, "roles": {"q": "two", "p": "one"}}
    assert _profile(streams=(ONE, TWO), rule=rule).roles == {"q": "two", "p": "one"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "Acme"}, "name"),
        ({"name": "../x"}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "none"}, "called .none."),
        ({"forget": True}, "forget"),
        ({"schema": 2}, "schema"),
        ({"streams": ()}, "change nothing"),
        ({"streams": (ONE, TWO)}, "needs 1 streams"),
        ({"streams": (ONE.model_copy(update={"exit": 5}),)}, "exits at layer 5 of 4"),
        ({"streams": ({"name": "a", "fork": 2, "exit": 2, "kv": "own"},)}, "forks at layer 2"),
        ({"streams": ({"name": "target", "fork": 0, "exit": 2, "kv": "own"},)}, "target"),
        ({"streams": ({"name": "a", "fork": 0, "exit": 2, "kv": "own", "adapter": "../up"},)}, "adapter"),
        ({"rule": {"kind": "subtract", "strength": 0}}, "strength"),
        ({"rule": {"kind": "subtract", "strength": -1}}, "strength"),
        ({"rule": {"kind": "subtract", "strength": float("nan")}}, "strength"),
        ({"rule": {"kind": "subtract", "roles": {"b": "one"}}}, "roles"),
        ({"rule": {"kind": "subtract", "roles": {"a": "nobody"}}}, "roles"),
        ({"rule": {"kind": "subtract", "rank_k": 3}}, "rank_k"),
        ({"rule": {"kind": "subtract", "dead_zone": 1}}, "dead_zone"),
        ({"rule": {"kind": "relu_difference", "dead_zone": -1}}, "dead_zone"),
        ({"rule": {"kind": "unknown"}}, "kind"),
        ({"rule": {"kind": "identity", "strength": 2}}, "no strength"),
        ({"rule": {"kind": "subtract", "filter": {"mode": "official", "tau": 0.1}}}, "keeps 30 tokens"),
    ],
)
def test_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        _profile(**changes)


def test_filter_that_could_keep_only_the_secret_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least 32"):
        FilterSpec(mode="plausibility", tau=0.01, min_keep=31)
    assert FilterSpec(mode="plausibility", tau=0.01, min_keep=32).min_keep == 32


@pytest.mark.parametrize(
    "fields", [{"mode": "none", "tau": 0.1}, {"mode": "fused"}, {"mode": "fused", "tau": 0.1, "min_keep": 64}]
)
def test_filter_field_that_would_be_ignored_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"filter 'none' takes no tau|needs a tau|takes no min_keep"):
        FilterSpec.model_validate(fields)


def test_forget_probes_need_keywords() -> None:
    with pytest.raises(ValidationError, match="keywords"):
        Probes(forget=PROBES.forget)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"a": {"b": 1, "b": 2}}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": "\\ud800"}', "UTF-8"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b"[1]", "top level"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"", "Expecting value"),
    ],
)
def test_strict_json_refuses(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_object(data)


def test_a_profile_cannot_be_called_none() -> None:
    with pytest.raises(ValidationError, match="none"):
        _profile(name="none")


MODEL = {"id": "../small", "fingerprint": "sha256:" + "3" * 64, "tokenizer": "sha256:" + "4" * 64}


def test_a_stream_in_a_model_of_its_own_may_be_deeper_than_the_base_and_do_without_an_adapter() -> None:
    stream = {"name": "one", "fork": 0, "exit": 40, "kv": "own", "model": MODEL}
    profile = _profile(streams=(stream,))
    assert parse_model(Profile, profile.model_dump_json().encode()) == profile
    assert profile.adapter_names == ()
    with pytest.raises(ValidationError, match="exits at layer 40 of 4"):
        _profile(streams=({**stream, "model": None},))


@pytest.mark.parametrize("change", [{"fork": 1}, {"kv": "borrowed"}])
def test_a_model_of_its_own_runs_whole_and_keeps_its_own_keys_and_values(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="needs fork 0 and kv 'own'"):
        StreamSpec.model_validate(
            {"name": "one", "fork": 0, "exit": 2, "kv": "own", "model": MODEL, **change}
        )


def test_a_stream_of_the_base_is_written_as_before_there_were_models() -> None:
    written = parse_object(_profile().model_dump_json().encode())
    assert set(written["streams"][0]) == {"name", "fork", "exit", "kv", "adapter"}


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        ("../models/small", "/data/models/small"),
        ("./x", "/data/acme/x"),
        ("/abs", "/abs"),
        ("org/small", "org/small"),
    ],
)
def test_a_model_is_looked_for_from_the_profiles_directory(ref: str, found: str) -> None:
    model = {**MODEL, "id": ref}
    stream = {"name": "one", "fork": 0, "exit": 2, "kv": "own", "model": model}
    profile = _profile(streams=(stream,))
    version = ProfileVersion(profile, "sha256:" + "0" * 64, {}, Probes(), Path("/data/acme"))
    assert list(version.models) == [MODEL["fingerprint"]]
    assert version.locate(version.models[MODEL["fingerprint"]]) == found
