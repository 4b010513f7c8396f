"""From profiles to streams and rule rows: the only place where the path of a request meets that of a profile.

Called by the engine at admission, and once at start by what serves in another engine. Knows the adapter bank, but no
tensor, text or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from uld_serve.engine.request import ReceiptEntry
from uld_serve.engine.streams import (
    OWN_POOL,
    TARGET_POOL,
    Compose,
    LanePlan,
    Plan,
    Seat,
    StreamPlan,
    TermPlan,
)
from uld_serve.errors import InvalidRequest, Overloaded, ProfileError, ProfileMismatch
from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.profiles.profile import TARGET, ProfileVersion, StreamSpec

__all__ = [
    "OWN_POOL",
    "TARGET_POOL",
    "Applied",
    "Compose",
    "Decision",
    "LanePlan",
    "Plan",
    "Planner",
    "ProfileVersion",
    "Seat",
    "StreamPlan",
    "TermPlan",
]


@dataclass(frozen=True, slots=True)
class Applied:
    """One profile to forget with; `scale` multiplies the strength of its rule."""

    version: ProfileVersion
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What a request must forget. The engine takes no request without one; only `server.policy.resolve` and
    `LLM` make one. No profile at all is an explicit `Decision.base()`."""

    applied: tuple[Applied, ...]
    compose: Compose = "max"

    @classmethod
    def base(cls) -> Decision:
        return cls(())

    @classmethod
    def of_version(cls, version: ProfileVersion) -> Decision:
        """One profile at its own strength."""
        return cls((Applied(version),))

    @classmethod
    def forgetting(cls, applied: Sequence[Applied], *, compose: Compose = "max") -> Decision:
        if not applied:
            raise InvalidRequest("no profile to forget with; use Decision.base() to mean the base alone")
        return cls(tuple(applied), compose)


class Bank(Protocol):
    """Who holds adapters for plans: `model.adapter_bank.AdapterBank` in this engine, others in others."""

    @property
    def total_users(self) -> int: ...

    def acquire(self, key: str, load: Callable[[], LoraAdapter]) -> int: ...

    def release(self, key: str) -> None: ...

    def evict_all(self, prefix: str) -> int: ...


@dataclass(frozen=True, slots=True)
class SecondModel:
    """A separate assistant model that is loaded: its adapters, its layers and its context."""

    bank: Bank
    num_layers: int
    max_positions: int


@dataclass(slots=True)
class Planner:
    """Makes plans and holds the adapters that they use until they are released.

    `own_layers` is how many layers deep an assistant of the base may keep keys and values of its own; `models` are
    the separate ones loaded, by fingerprint. What is not there is refused.
    """

    bank: Bank
    defers_logits: bool = False
    """Worth it where the head costs more with more rows, as on a CPU."""
    own_layers: int = 0
    models: dict[str, SecondModel] = field(default_factory=dict)

    def check(self, version: ProfileVersion) -> None:
        """Raise ProfileError for a profile that this engine cannot run, before anybody asks for it."""
        for stream in version.profile.streams:
            where = f"profile '{version.name}': stream '{stream.name}'"
            if stream.model is None:
                self._check_on_base(stream, where)
            else:
                self._check_in_model(stream, stream.model.fingerprint, where)

    def _check_on_base(self, stream: StreamSpec, where: str) -> None:
        if stream.adapter is None:
            raise ProfileError(
                f"{where} has no adapter and no model of its own, so it would say what the base says"
            )
        if stream.kv == "own" and stream.exit - stream.fork > self.own_layers:
            raise ProfileError(
                f"{where} keeps keys and values of its own in {stream.exit - stream.fork} layers; there is room for "
                f"{self.own_layers}: name the profile at start, or prepare the engine for it"
            )

    def _check_in_model(self, stream: StreamSpec, fingerprint: str, where: str) -> None:
        model = self.models.get(fingerprint)
        if model is None:
            raise ProfileError(
                f"{where} runs in model {fingerprint}, which is not loaded: name the profile at start"
            )
        if stream.exit != model.num_layers:
            raise ProfileMismatch(f"{where} exits at layer {stream.exit}; its model has {model.num_layers}")

    def plan(self, decision: Decision) -> Plan:
        """Streams and terms of a decision; a profile given twice counts once, at its larger scale.

        Holds each stream's adapter in the bank: pair every plan with one `release`.
        """
        strongest: dict[str, Applied] = {}
        for applied in decision.applied:
            known = strongest.get(applied.version.digest)
            if known is None or applied.scale > known.scale:
                strongest[applied.version.digest] = applied
        for applied in strongest.values():
            self.check(applied.version)
        draft = _Draft()
        try:
            self._seat_target(list(strongest.values()), draft)
            rules = tuple(self._term(applied, draft) for applied in strongest.values())
        except Overloaded as error:
            self._release(draft.seats)
            if self.num_users == 0:
                raise InvalidRequest(
                    "the adapters of these profiles together take more memory than adapters may have (adapter_bytes)"
                ) from error
            raise
        except Exception:
            self._release(draft.seats)
            raise
        return self._plan(draft, rules, decision.compose)

    def _plan(self, draft: _Draft, rules: tuple[TermPlan, ...], compose: Compose) -> Plan:
        terms = tuple(term for term in rules if term.kind != "identity")
        streams = draft.streams
        elsewhere = {stream.model for stream in streams if stream.model is not None}
        if self.defers_logits and not elsewhere and _asks_few_tokens(terms):
            streams = [replace(stream, is_late=True) for stream in streams]
        return Plan(
            streams=tuple(streams),
            terms=terms,
            silent=tuple(term.entry for term in rules if term.kind == "identity"),
            compose=compose,
            lanes=tuple(draft.lanes),
            target_seat=draft.target_seat,
            num_borrowing=sum(stream.borrows for stream in streams),
            max_positions=min((self.models[name].max_positions for name in elsewhere), default=None),
        )

    def release(self, plan: Plan) -> None:
        self._release(plan.seats)

    @property
    def num_users(self) -> int:
        """Adapters held, in all models, counted once for each holder."""
        return sum(bank.total_users for bank in [self.bank, *(model.bank for model in self.models.values())])

    def _release(self, seats: Sequence[tuple[str | None, Seat]]) -> None:
        for model, seat in seats:
            self._bank(model).release(seat.key)

    def _bank(self, model: str | None) -> Bank:
        return self.bank if model is None else self.models[model].bank

    def _seat_target(self, decision: Sequence[Applied], draft: _Draft) -> None:
        """The adapter that the target itself carries. Its keys and values then depend on the profile, and with them
        those of every assistant that forks from it."""
        named = [one.version for one in decision if one.version.profile.target_adapter is not None]
        if len(named) > 1:
            raise InvalidRequest(
                f"profiles {', '.join(repr(v.name) for v in named)} each put an adapter on the target itself; one "
                "request can have one such profile"
            )
        if named:
            draft.target_seat = self._seat(draft, None, named[0], TARGET)
            draft.digest = named[0].digest
        draft.lanes.append(LanePlan(TARGET_POOL, _salt(draft.digest)))

    def _seat(self, draft: _Draft, model: str | None, version: ProfileVersion, owner: str) -> Seat:
        key = f"{version.digest}/{owner}"
        seat = Seat(key, self._bank(model).acquire(key, partial(version.adapters.__getitem__, owner)))
        draft.seats.append((model, seat))
        return seat

    def _term(self, applied: Applied, draft: _Draft) -> TermPlan:
        version, rule = applied.version, applied.version.profile.rule
        if not 0 < applied.scale <= 2:
            raise InvalidRequest("forget_strength must be above 0 and at most 2", param="forget_strength")
        if rule.kind in ("identity", "pair_rank") and applied.scale != 1:
            raise InvalidRequest(
                f"profile '{version.name}' has no strength to scale", param="forget_strength"
            )
        index = {}
        for stream in version.profile.streams:
            index[stream.name] = len(draft.streams)
            draft.streams.append(self._stream(stream, version, draft))
        strength = rule.strength * applied.scale
        return TermPlan(
            kind=rule.kind,
            strength=strength,
            streams={role: index[name] for role, name in version.profile.roles.items()},
            filter_mode=rule.filter.mode,
            tau=rule.filter.tau,
            min_keep=rule.filter.min_keep,
            protect=rule.protect,
            rank_k=rule.rank_k,
            dead_zone=rule.dead_zone,
            tag=int(version.digest.removeprefix("sha256:")[:15], 16),
            entry=ReceiptEntry(version.name, version.digest, rule.kind, strength),
        )

    def _stream(self, stream: StreamSpec, version: ProfileVersion, draft: _Draft) -> StreamPlan:
        model = None if stream.model is None else stream.model.fingerprint
        seat = None if stream.adapter is None else self._seat(draft, model, version, stream.name)
        lane = 0
        if stream.kv == "own":
            lane = len(draft.lanes)
            salt = _salt(draft.digest, version.digest, stream.name)
            draft.lanes.append(LanePlan(OWN_POOL if model is None else model, salt))
        return StreamPlan(stream.fork, stream.exit, seat, lane=lane, model=model)


@dataclass(slots=True)
class _Draft:
    """A plan being made: what it holds so far. `digest`: of the profile whose adapter the target carries."""

    streams: list[StreamPlan] = field(default_factory=list)
    lanes: list[LanePlan] = field(default_factory=list)
    seats: list[tuple[str | None, Seat]] = field(default_factory=list)
    target_seat: Seat | None = None
    digest: str = ""


def _salt(*parts: str) -> str:
    """Length-prefixed, so that no two lists of parts give the same salt."""
    return "".join(f"{len(part)}:{part}" for part in parts)


def _asks_few_tokens(terms: Sequence[TermPlan]) -> bool:
    """Whether filters leave few tokens before any assistant's logit is looked at: plausibility filters do, and fused
    ones where no score can rise above the target's. Pairs, and `subtract` among others, are normalised over all."""
    if any(term.kind not in ("subtract", "relu_difference") for term in terms):
        return False
    modes = {term.filter_mode for term in terms}
    never_raises = all(term.kind == "relu_difference" for term in terms)
    return ("plausibility" in modes and (len(terms) == 1 or never_raises)) or (
        "fused" in modes and never_raises
    )
