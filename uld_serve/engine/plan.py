"""From profiles to streams and rule rows: the only place where the path of a request meets that of a profile.

Called by the engine at admission. Knows the adapter bank, but no tensor, text or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from uld_serve.engine.request import ReceiptEntry
from uld_serve.errors import InvalidRequest, Overloaded, ProfileError
from uld_serve.model.adapter_bank import AdapterBank
from uld_serve.profiles.profile import FilterMode, ProfileVersion, RuleKind

__all__ = ["Applied", "Compose", "Decision", "Plan", "Planner", "ProfileVersion", "StreamPlan", "TermPlan"]

Compose = Literal["max", "sum"]


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


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One assistant row per scored position: where it forks and exits, and its adapter's bank slot. `is_late`: the
    rules ask for its logits on some hundred tokens at most."""

    fork: int
    exit: int
    adapter_key: str
    slot: int
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class TermPlan:
    """One profile's rule. `streams` maps the formula's inputs to indices into Plan.streams."""

    kind: RuleKind
    strength: float
    streams: dict[str, int]
    filter_mode: FilterMode
    tau: float
    min_keep: int
    protect: bool
    rank_k: int
    tag: int
    entry: ReceiptEntry


@dataclass(frozen=True, slots=True)
class Plan:
    streams: tuple[StreamPlan, ...]
    terms: tuple[TermPlan, ...]
    compose: Compose


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans and holds the adapters that they use until they are released."""

    bank: AdapterBank
    defers_logits: bool = False
    """Worth it where the head costs more with more rows, as on a CPU."""

    def check(self, version: ProfileVersion) -> None:
        """Raise ProfileError for a profile that this engine cannot run, before anybody asks for it."""
        profile = version.profile
        if profile.target_adapter is not None:
            raise ProfileError(
                f"profile '{profile.name}' has a target_adapter, which this version does not serve"
            )
        for stream in profile.streams:
            if stream.kv != "borrowed":
                raise ProfileError(
                    f"profile '{profile.name}': stream '{stream.name}' keeps its own keys and values, which this "
                    "version does not serve; train it with kv 'borrowed'"
                )
            if stream.adapter is None:
                raise ProfileError(f"profile '{profile.name}': stream '{stream.name}' has no adapter")

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
        streams: list[StreamPlan] = []
        try:
            terms = tuple(self._term(applied, streams) for applied in strongest.values())
        except Overloaded as error:
            self._release(streams)
            if self.bank.total_users == 0:
                raise InvalidRequest(
                    "the adapters of these profiles together take more memory than adapters may have (adapter_bytes)"
                ) from error
            raise
        except Exception:
            self._release(streams)
            raise
        if self.defers_logits and _asks_few_tokens(terms):
            streams = [replace(stream, is_late=True) for stream in streams]
        return Plan(tuple(streams), terms, decision.compose)

    def release(self, plan: Plan) -> None:
        self._release(plan.streams)

    def _release(self, streams: Sequence[StreamPlan]) -> None:
        for stream in streams:
            self.bank.release(stream.adapter_key)

    def _term(self, applied: Applied, streams: list[StreamPlan]) -> TermPlan:
        version, rule = applied.version, applied.version.profile.rule
        if not 0 < applied.scale <= 2:
            raise InvalidRequest("forget_strength must be above 0 and at most 2", param="forget_strength")
        if rule.kind == "pair_rank" and applied.scale != 1:
            raise InvalidRequest(
                f"profile '{version.name}' has no strength to scale", param="forget_strength"
            )
        index = {}
        for stream in version.profile.streams:
            key = f"{version.digest}/{stream.name}"
            slot = self.bank.acquire(key, partial(version.adapters.__getitem__, stream.name))
            index[stream.name] = len(streams)
            streams.append(StreamPlan(stream.fork, stream.exit, key, slot))
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
            tag=int(version.digest.removeprefix("sha256:")[:15], 16),
            entry=ReceiptEntry(version.name, version.digest, rule.kind, strength),
        )


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
