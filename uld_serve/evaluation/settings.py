"""The decode parameters that a profile could have: which rules, strengths and filters its streams allow, and the
profile with one of them, in memory. Called by tune and `eval sweep`. Knows no model and no figure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import get_args

from pydantic import ValidationError

from uld_serve.errors import DataError
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import (
    DEFAULT_FILTERS,
    ROLES,
    FilterMode,
    FilterSpec,
    Profile,
    ProfileVersion,
    RuleKind,
    RuleSpec,
)

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the profile's own strength: what is tried by default."""
TAUS = (0.01, 0.02, 0.05)
WITHOUT_STRENGTH = ("identity", "pair_rank")
WITH_DEAD_ZONE: RuleKind = "relu_difference"


def grid(
    profile: Profile,
    *,
    rules: Sequence[str] = (),
    strengths: Sequence[float] = (),
    taus: Sequence[float] = (),
    dead_zones: Sequence[float] = (),
) -> list[RuleSpec]:
    """Every rule to try, the profile's own first. `rules` are KIND or KIND:FILTER, by default the profile's own.

    Raises DataError: a profile without a strength, a rule for other streams, a value that no profile may have, taus
    where no filter takes one, dead zones where no rule has one.
    """
    own = profile.rule
    if own.kind in WITHOUT_STRENGTH:
        raise DataError(f"profile '{profile.name}' has rule '{own.kind}', which has no strength to choose")
    named = [_parsed(profile, word) for word in rules] or [(own.kind, own.filter.mode)]
    if taus and all(mode == "none" for _, mode in named):
        raise DataError("--taus would change nothing: filter 'none' takes no tau")
    if dead_zones and all(kind != WITH_DEAD_ZONE for kind, _ in named):
        raise DataError(f"--dead-zones would change nothing: only {WITH_DEAD_ZONE} has one")
    strengths = strengths or [own.strength * share for share in SHARES if own.strength * share <= 100]
    taus = taus or sorted({*TAUS, *((own.filter.tau,) if own.filter.tau > 0 else ())})
    found = [own]
    for (kind, mode), strength in product(named, strengths):
        zones = (dead_zones or (own.dead_zone,)) if kind == WITH_DEAD_ZONE else (0.0,)
        for zone, tau in product(zones, (0.0,) if mode == "none" else taus):
            rule = _rule(profile, kind, mode, strength, tau, zone)
            if rule not in found:
                found.append(rule)
    return found


def variant(version: ProfileVersion, rule: RuleSpec, *, name: str) -> ProfileVersion:
    """The same streams and adapters with another rule: what an engine is asked with, never written. Without replay
    probes, which were measured with the profile's own rule."""
    profile = _with_rule(version.profile, rule).model_copy(update={"name": name})
    digest = hashlib.sha256(f"{version.digest} {rule.model_dump_json()}".encode()).hexdigest()
    return replace(version, profile=profile, digest=f"sha256:{digest}", probes=Probes())


def without_fused_filter(rule: RuleSpec) -> RuleSpec:
    """That filter gives what it drops probability 0; what the rule does to it is finite and tells how much."""
    if rule.filter.mode != "fused":
        return rule
    return RuleSpec.model_validate({**rule.model_dump(), "filter": FilterSpec(mode="none")})


def told(rule: RuleSpec) -> str:
    """A rule as people read it."""
    mode, tau = rule.filter.mode, rule.filter.tau
    zone = f" beyond {rule.dead_zone:g}" if rule.dead_zone else ""
    return f"{rule.kind}{zone} x {rule.strength:g}, " + ("no filter" if mode == "none" else f"{mode} {tau:g}")


def _parsed(profile: Profile, word: str) -> tuple[RuleKind, FilterMode]:
    name, _, filter_name = word.partition(":")
    kind: RuleKind | None = next((one for one in get_args(RuleKind) if one == name), None)
    if kind is None or kind in WITHOUT_STRENGTH:
        tunable = [one for one in ROLES if one not in WITHOUT_STRENGTH]
        raise DataError(f"--rules: '{name}' is no rule with a strength; there is {', '.join(tunable)}")
    if ROLES[kind] != ROLES[profile.rule.kind]:
        raise DataError(
            f"--rules: '{kind}' needs {len(ROLES[kind])} streams; profile '{profile.name}' has {len(profile.streams)}"
        )
    usual = profile.rule if kind == profile.rule.kind else None
    default = DEFAULT_FILTERS[kind].mode if usual is None else usual.filter.mode
    mode: FilterMode | None = next(
        (one for one in get_args(FilterMode) if one == (filter_name or default)), None
    )
    if mode is None:
        raise DataError(
            f"--rules: '{filter_name}' is no filter; there is {', '.join(_words(get_args(FilterMode)))}"
        )
    return kind, mode


def _words(values: Iterable[object]) -> list[str]:
    return [str(value) for value in values]


def _rule(
    profile: Profile, kind: RuleKind, mode: FilterMode, strength: float, tau: float, dead_zone: float
) -> RuleSpec:
    own = profile.rule
    fields: dict[str, object] = {
        "kind": kind,
        "strength": strength,
        "dead_zone": dead_zone,
        "roles": own.roles,
    }
    if kind == own.kind:
        fields["protect"] = own.protect
    fields["filter"] = {"mode": mode, "tau": tau}
    if mode == "plausibility":
        fields["filter"] = {"mode": mode, "tau": tau, "min_keep": own.filter.min_keep}
    try:
        rule = RuleSpec.model_validate(fields)
        _with_rule(profile, rule)
    except ValidationError as error:
        raise DataError(
            f"no profile may have {kind} x {strength:g} with {mode} {tau:g}: {error.errors()[0]['msg']}"
        ) from error
    return rule


def _with_rule(profile: Profile, rule: RuleSpec) -> Profile:
    """Checked as one that is read from a file."""
    return Profile.model_validate({**profile.model_dump(), "rule": rule.model_dump()})
