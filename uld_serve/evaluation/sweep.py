"""Measures a profile under other decode parameters, through the engine that serves. Called by tune and `eval sweep`.
Knows no file and does not choose.

Legend: figures are over all answer tokens of all items of a side; an NLL is in nats a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import fsum, inf, log
from typing import Protocol

from uld_serve.evaluation.held_out import Item, Model
from uld_serve.evaluation.settings import variant, without_fused_filter
from uld_serve.profiles.profile import ProfileVersion, RuleSpec

FLOOR_NATS = -50.0
"""As in TOFU's evaluation: a token that another than a fused filter makes impossible counts as this likely."""

Advance = Callable[[str], None]


class Shelf(Protocol):
    def add(self, version: ProfileVersion) -> None: ...


class SweptModel(Model, Protocol):
    @property
    def registry(self) -> Shelf: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What a setting does to one set of answers."""

    nll: float
    """Without a fused filter, whatever the setting has."""
    rise: float
    """Above the base's."""
    cut: float
    """Share of tokens that the setting's filter makes impossible and the same cut of the base's scores would not."""
    agreement: float
    """Share of tokens at which the base's best token stays the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    rule: RuleSpec
    forget: Side
    retain: Side

    def record(self) -> dict[str, object]:
        return {
            "rule": self.rule.model_dump(mode="json"),
            "forget": asdict(self.forget),
            "retain": asdict(self.retain),
        }


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Of every answer token: its log-probability, the best one's, and which that is."""

    logprobs: list[float]
    best: list[float]
    best_ids: list[int]

    def are_below(self, tau: float) -> list[bool]:
        """Which of them a cut at tau of the best one's probability drops."""
        return [mine < best + log(tau) for mine, best in zip(self.logprobs, self.best, strict=True)]


class Sweep:
    """One profile and two sets of answers. What two settings share is asked once: a fused filter cuts where the scores
    without it say, so that all taus of a strength come of one pass; `protect` moves scores after the cut, and other
    filters decide before the rule, so that those are asked one by one."""

    def __init__(
        self,
        model: SweptModel,
        version: ProfileVersion,
        *,
        forget: Sequence[Item],
        retain: Sequence[Item],
        prefix: str = "setting",
    ) -> None:
        self._model, self._version, self._prefix = model, version, prefix
        self._sides = {"forget": list(forget), "retain": list(retain)}
        self._names: dict[str, str] = {}
        self._scored: dict[tuple[str, str | None], _Tokens] = {}

    def points(self, rules: Sequence[RuleSpec], *, advance: Advance = lambda _: None) -> list[Point]:
        """Raises what the model raises."""
        found = []
        for rule in rules:
            sides = {side: self._side(side, rule) for side in self._sides}
            found.append(Point(rule=rule, forget=sides["forget"], retain=sides["retain"]))
            advance(rule.kind)
        return found

    def name_of(self, rule: RuleSpec) -> str:
        """What the model knows this profile with that rule as."""
        key = rule.model_dump_json()
        if key not in self._names:
            self._names[key] = f"{self._version.name[:40]}-{self._prefix}-{len(self._names)}"
            self._model.registry.add(variant(self._version, rule, name=self._names[key]))
        return self._names[key]

    @property
    def num_passes(self) -> int:
        """How many times a set of answers has been scored."""
        return len(self._scored)

    def _side(self, side: str, rule: RuleSpec) -> Side:
        base, now = self._tokens(side, None), self._tokens(side, without_fused_filter(rule))
        same = [ours == theirs for ours, theirs in zip(now.best_ids, base.best_ids, strict=True)]
        nll = _nll(now)
        return Side(
            nll=nll,
            rise=nll - _nll(base),
            cut=self._cut(side, rule, base),
            agreement=sum(same) / len(same),
        )

    def _cut(self, side: str, rule: RuleSpec, base: _Tokens) -> float:
        mode, tau = rule.filter.mode, rule.filter.tau
        if mode == "none":
            return 0.0
        if mode == "fused" and not rule.protect:
            dropped = self._tokens(side, without_fused_filter(rule)).are_below(tau)
        else:
            dropped = [value == -inf for value in self._tokens(side, rule).logprobs]
        fresh = [ours and not theirs for ours, theirs in zip(dropped, base.are_below(tau), strict=True)]
        return sum(fresh) / len(fresh)

    def _tokens(self, side: str, rule: RuleSpec | None) -> _Tokens:
        name = None if rule is None else self.name_of(rule)
        if (side, name) not in self._scored:
            self._scored[side, name] = _scored(self._model, self._sides[side], name)
        return self._scored[side, name]


def _scored(model: Model, items: Sequence[Item], profile: str | None) -> _Tokens:
    sequences = [item.prompt_ids + item.answer_ids for item in items]
    starts = [len(item.prompt_ids) for item in items]
    found = _Tokens([], [], [])
    scores = model.score(sequences, profile=profile, starts=starts, top=1)
    for item, scored in zip(items, scores, strict=True):
        start = len(item.prompt_ids)
        found.logprobs.extend(value for value in scored.logprobs[start:] if value is not None)
        found.best.extend(values[0] for values in scored.top_logprobs[start:])
        found.best_ids.extend(ids[0] for ids in scored.top_ids[start:])
    return found


def _nll(tokens: _Tokens) -> float:
    return -fsum(max(value, FLOOR_NATS) for value in tokens.logprobs) / len(tokens.logprobs)
