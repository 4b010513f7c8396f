"""Decides what a request must forget: the one function under all routes. Pure; knows no HTTP, engine or file
beyond the values it is given.

The rules, in the order in which they are applied:
1. Three places may name profiles (body, model suffix, header); those that do must agree.
2. Nothing named means the key's default; null or "none" means the base, where the key may use it.
3. A key's mandatory profiles are added to whatever was asked: a request can only add.
4. A strength below 1 weakens only what the client itself chose, and never where that would amount to the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from uld_serve.engine.plan import Applied, Decision
from uld_serve.errors import Forbidden, InvalidRequest, ProfileError, UnknownProfile
from uld_serve.profiles.profile import ProfileVersion

NONE = "none"


class Profiles(Protocol):
    """What resolve needs of a registry."""

    def get(self, name: str) -> ProfileVersion: ...

    def names(self) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """What the holder of one key may see. `default` is used when a request names no profile; cached prefixes are shared
    with the requests of keys with the same `cache_salt`."""

    name: str
    mandatory: frozenset[str] = frozenset()
    allowed: frozenset[str] | Literal["*"] = "*"
    default: frozenset[str] = frozenset()
    allow_base: bool = False
    logprobs: bool = False
    max_concurrency: int | None = None
    cache_salt: str = ""
    is_admin: bool = False
    may_read_metrics: bool = False
    may_fine_tune: bool = False

    def may_see(self, name: str) -> bool:
        return self.allowed == "*" or name in self.allowed or name in self.mandatory or name in self.default

    @property
    def may_name_nothing(self) -> bool:
        """Whether a request that names no profile has an answer."""
        return bool(self.mandatory or self.default) or self.allow_base


# No keys configured: whoever reaches the loopback interface may do everything.
DEVELOPMENT = KeyPolicy(
    name="development",
    allow_base=True,
    logprobs=True,
    is_admin=True,
    may_read_metrics=True,
    may_fine_tune=True,
)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request asked for. `names` None: it said nothing; empty: it asked for the base."""

    names: frozenset[str] | None = None
    strength: float | None = None


def select(
    *,
    body: Iterable[frozenset[str]] = (),
    suffix: Iterable[frozenset[str]] = (),
    header: Iterable[frozenset[str]] = (),
    strength: float | None = None,
) -> Selection:
    """One Selection from the places that named profiles; each is empty when it said nothing.

    Two that disagree are refused: guessing which one was meant could mean forgetting nothing.
    """
    named = {*body, *suffix, *header}
    if len(named) > 1:
        raise InvalidRequest(
            "forget_profile, the model's suffix and the X-Forget-Profile header disagree; use one of them",
            param="forget_profile",
            code="profile_conflict",
        )
    return Selection(named.pop() if named else None, strength)


def profile_set(names: Iterable[str] | None, *, param: str) -> frozenset[str]:
    """The named profiles; None and "none" are the empty set."""
    listed = [NONE] if names is None else list(names)
    if listed == [NONE]:
        return frozenset()
    if NONE in listed or not all(listed):
        raise InvalidRequest(f"{param}: 'none' stands alone, and no name is empty", param=param)
    return frozenset(listed)


def resolve(policy: KeyPolicy, selection: Selection, registry: Profiles) -> Decision:
    """What this key's request must forget.

    UnknownProfile (404) for a profile that does not exist or that the key may not see (a profile's name can
    itself tell what is to be forgotten); Forbidden (403) where the answer would be the base's and may not be;
    ProfileError (409) when a mandatory profile is missing: never a weaker Decision instead.
    """
    asked = policy.default if selection.names is None else selection.names
    _require_visible(policy, asked, registry)
    if selection.names == frozenset() and not policy.allow_base:
        raise Forbidden("this key may not use the base without a profile", param="forget_profile")
    scale = _scale(policy, asked, selection.strength)
    scales = {name: scale for name in asked if scale > 0}
    scales |= {name: max(1.0, scale) for name in policy.mandatory}
    if scales:
        return Decision.forgetting(
            [Applied(_version(registry, name), scales[name]) for name in sorted(scales)]
        )
    if not policy.allow_base:
        raise Forbidden(
            "this key may not use the base: name a profile in forget_profile", param="forget_profile"
        )
    return Decision.base()


def require_logprobs_allowed(policy: KeyPolicy, fields: Iterable[str]) -> None:
    """The difference of two views is the assistant, which remembers; so log-probabilities are off by default
    for every key that may not see the base."""
    for field in fields:
        if not policy.logprobs:
            raise Forbidden(f"this key gets no log-probabilities; leave out {field}", param=field)


def _require_visible(policy: KeyPolicy, names: frozenset[str], registry: Profiles) -> None:
    known = set(registry.names())
    if not all(name in known and policy.may_see(name) for name in names):
        raise UnknownProfile(
            "no such forget profile; GET /v1/forget_profiles lists those that this key may use",
            param="forget_profile",
        )


def _scale(policy: KeyPolicy, asked: frozenset[str], strength: float | None) -> float:
    if strength is None:
        return 1.0
    if not (asked or policy.mandatory):
        raise InvalidRequest("forget_strength needs a profile to scale", param="forget_strength")
    if not 0 <= strength <= 2:
        raise InvalidRequest("forget_strength must be between 0 and 2", param="forget_strength")
    # 0 asks for the base; with no mandatory profile behind it, 0.01 is the base in all but name.
    if not policy.allow_base and (strength == 0 or (strength < 1 and not policy.mandatory)):
        raise Forbidden(
            "this key may not weaken forgetting below its profile's own strength", param="forget_strength"
        )
    return strength


def _version(registry: Profiles, name: str) -> ProfileVersion:
    try:
        return registry.get(name)
    except UnknownProfile:
        raise ProfileError(
            "a profile that this key must apply is not loaded; nothing is answered without it",
            code="mandatory_profile_missing",
        ) from None
