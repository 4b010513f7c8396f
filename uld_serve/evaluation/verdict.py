"""What a verification found, and the gates that it must pass. Made by verify; printed by `uld-serve profiles verify`.
Knows no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from uld_serve.evaluation import metrics
from uld_serve.profiles.profile import ProfileVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Of the answers to n prompts. NLL in nats a token; `agreement` is the share of answer
    positions where base and profile have the same most likely token; `removed` the share of answer tokens
    that the profile's filter makes impossible.
    """

    n: int
    tokens: int
    nll_base: float
    nll_fused: float
    agreement: float
    removed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of answers to the forget prompts that name a keyword: greedy, and drawn at temperature 1."""

    base: float
    fused: float
    base_t1: float
    fused_t1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fluency:
    """Perplexity under the base, given the prompt, of the base's answers and of the forgetting ones, to the
    forget prompts. `distinct_*` is the mean share of different bigrams in the greedy answers, which a loop
    would lower.
    """

    base: float
    fused: float
    base_t1: float | None
    fused_t1: float | None
    distinct_base: float
    distinct_fused: float

    @property
    def ratio(self) -> float:
        return self.fused / self.base

    @property
    def ratio_t1(self) -> float | None:
        return None if self.base_t1 is None or self.fused_t1 is None else self.fused_t1 / self.base_t1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of the gates. Rises in nats a token; agreement and falls are shares."""

    min_forget_rise: float = 2.5
    max_retain_rise: float = 0.12
    min_agreement: float = 0.93
    min_recall_fall: float = 0.8
    max_perplexity_ratio: float = 3.0


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition for `ok`. `value` is None when it could not be measured, which fails."""

    name: str
    value: float | None
    limit: float
    is_minimum: bool

    @property
    def ok(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    version: ProfileVersion
    forget: Likelihood
    retain: Likelihood
    recall: Recall | None
    fluency: Fluency
    limits: Limits = Limits()

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (
            Gate(
                "forget NLL rise",
                self.forget.nll_fused - self.forget.nll_base,
                self.limits.min_forget_rise,
                True,
            ),
            Gate(
                "retain NLL rise",
                self.retain.nll_fused - self.retain.nll_base,
                self.limits.max_retain_rise,
                False,
            ),
            Gate("retain agreement", self.retain.agreement, self.limits.min_agreement, True),
            *self._recall_gates,
            Gate("perplexity ratio, greedy", self.fluency.ratio, self.limits.max_perplexity_ratio, False),
        )

    @property
    def _recall_gates(self) -> tuple[Gate, ...]:
        if self.recall is None:
            return ()
        greedy = metrics.relative_fall(self.recall.base, self.recall.fused)
        at_t1 = metrics.relative_fall(self.recall.base_t1, self.recall.fused_t1)
        return (
            Gate("recall fall, greedy", greedy, self.limits.min_recall_fall, True),
            Gate("recall fall, T = 1", at_t1, self.limits.min_recall_fall, True),
        )

    def as_json(self) -> dict[str, object]:
        rule = self.version.profile.rule
        return {
            "profile": self.version.name,
            "digest": self.version.digest,
            "rule": rule.kind,
            "strength": rule.strength,
            "forget": asdict(self.forget),
            "retain": asdict(self.retain),
            "recall": None if self.recall is None else asdict(self.recall),
            "fluency": {
                **asdict(self.fluency),
                "ratio": self.fluency.ratio,
                "ratio_t1": self.fluency.ratio_t1,
            },
            "gates": [
                {
                    "name": gate.name,
                    "value": gate.value,
                    "at_least" if gate.is_minimum else "at_most": gate.limit,
                }
                | {"ok": gate.ok}
                for gate in self.gates
            ],
            "ok": all(gate.ok for gate in self.gates),
        }
