"""Chooses a profile's decode parameters on one half of held-out data and says on the other what they do. Called by
tune. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum

from uld_serve.engine.request import SamplingParams
from uld_serve.evaluation.choice import Limits, choose, forgets_most
from uld_serve.evaluation.held_out import Item
from uld_serve.evaluation.metrics import distinct
from uld_serve.evaluation.overlap import rouge_l
from uld_serve.evaluation.settings import told
from uld_serve.evaluation.sweep import Advance, Point, Sweep, SweptModel
from uld_serve.profiles.profile import ProfileVersion, RuleSpec

ANSWER_TOKENS = 48
Sides = Mapping[str, Sequence[Item]]
"""Of "forget" and "retain"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """Greedy answers of one side: mean ROUGE-L recall of the given answers, and the mean share of different bigrams,
    which a loop would lower. None where no item can be asked."""

    rouge: float | None
    distinct: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`points` are of the choosing half, the first of them what the profile has now. `reported` are of the other half:
    "now", "chosen" and "unconstrained", which is what would have been chosen without limits. `greedy` is of that half
    as well, by who answers and then by side."""

    points: Sequence[Point]
    chosen: Point
    reported: Mapping[str, Point]
    greedy: Mapping[str, Mapping[str, Spoken]]
    limits: Limits
    served_as: str
    """The chosen setting, as the model knows it."""

    @property
    def holds(self) -> bool:
        """Whether the limits hold where nothing was chosen by."""
        return self.limits.hold(self.reported["chosen"])

    def record(self) -> dict[str, object]:
        return {
            "constraint": {"max_retain_rise": self.limits.max_rise, "max_retain_cut": self.limits.max_cut},
            "chosen": self.chosen.record(),
            "reported": {name: point.record() for name, point in self.reported.items()},
            "constraint_holds": self.holds,
            "greedy": {
                who: {side: asdict(spoken) for side, spoken in sides.items()}
                for who, sides in self.greedy.items()
            },
        }

    def lines(self) -> list[str]:
        """What was chosen, what it does, and what the constraint bought, for people."""
        reported, free = self.reported, self.reported["unconstrained"]
        chosen = reported["chosen"]
        found = [f"chosen: {told(self.chosen.rule)}", "on the half that it was not chosen on:"]
        found += [f"  {name:13} {_told(point)}" for name, point in reported.items()]
        if free.rule == chosen.rule:
            found.append("the constraint cost nothing: the setting that forgets most is within it")
        else:
            found.append(
                f"the constraint bought {free.retain.rise - chosen.retain.rise:.3f} nats a token of what must stay, "
                f"for {free.forget.rise - chosen.forget.rise:.3f} less forgotten"
            )
        for side in ("forget", "retain"):
            before, after = self.greedy["base"][side], self.greedy["chosen"][side]
            if before.rouge is not None and after.rouge is not None:
                found.append(
                    f"greedy {side} answers: ROUGE-L {before.rouge:.3f} without, {after.rouge:.3f} with"
                )
        if not self.holds:
            found.append(
                "the constraint does NOT hold on this half: more data, or a stricter constraint, would help"
            )
        return found


def tune(
    model: SweptModel,
    version: ProfileVersion,
    rules: Sequence[RuleSpec],
    *,
    limits: Limits,
    choosing: Sides,
    reporting: Sides,
    advance: Advance = lambda _: None,
) -> tuple[Sequence[Point], Outcome | None]:
    """All points, and the outcome if any of them is within the limits. The first rule is what the profile has now."""
    points = Sweep(model, version, forget=choosing["forget"], retain=choosing["retain"]).points(
        rules, advance=advance
    )
    chosen, free = choose(points, limits), forgets_most(points)
    if chosen is None or free is None:
        return points, None
    last = Sweep(model, version, forget=reporting["forget"], retain=reporting["retain"], prefix="report")
    named = {"now": points[0].rule, "chosen": chosen.rule, "unconstrained": free.rule}
    reported = dict(zip(named, last.points(list(named.values())), strict=True))
    served_as = last.name_of(chosen.rule)
    greedy = {
        who: {side: _spoken(model, reporting[side], profile) for side in ("forget", "retain")}
        for who, profile in (("base", None), ("chosen", served_as))
    }
    return points, Outcome(
        points=points,
        chosen=chosen,
        reported=reported,
        greedy=greedy,
        limits=limits,
        served_as=served_as,
    )


def _spoken(model: SweptModel, items: Sequence[Item], profile: str | None) -> Spoken:
    asked = [(item.prompt_ids, item.answer) for item in items if item.answer is not None]
    if not asked:
        return Spoken(rouge=None, distinct=None)
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
    said = model.generate([prompt for prompt, _ in asked], params, profile=profile)
    recalls = [rouge_l(one.text, truth).recall for one, (_, truth) in zip(said, asked, strict=True)]
    variety = distinct([one.token_ids for one in said])
    return Spoken(rouge=fsum(recalls) / len(recalls), distinct=variety if variety == variety else None)


def _told(point: Point) -> str:
    forget, retain = point.forget, point.retain
    return (
        f"forget NLL {forget.rise:+.3f}, retain {retain.rise:+.3f} nats; cut {forget.cut:.1%} of forget and "
        f"{retain.cut:.1%} of retain tokens; best token kept {retain.agreement:.1%}  ({told(point.rule)})"
    )
