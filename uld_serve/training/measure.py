"""The served rule in plain torch, to say at the end of a run what the adapters do and to record replay probes.
Called by run. `uld-serve profiles verify` measures the same through the engine; knows no files.

Shapes: B examples, N answer tokens, V real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from uld_kernels import reference

from uld_serve.model.loading import Base, control_ids
from uld_serve.profiles.profile import RuleSpec
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Example, Kind
from uld_serve.training.states import Batch, collate, observe

BATCH_SIZE = 16
NEXT = (0,)
"""An answer of one token, whichever: its position is where the next token is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """NLL a token of given answers, in nats; `nll_fused` without a fused filter, `nll_served` with it.

    `agreement`: share of positions where base and rule have the same most likely token. `removed`: share of
    answer tokens that the filter makes impossible.
    """

    tokens: int
    nll_base: float
    nll_fused: float
    nll_served: float
    agreement: float
    removed: float

    @property
    def rise(self) -> float:
        return self.nll_fused - self.nll_base

    def rounded(self) -> dict[str, float | int | None]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: round(v, 4) if v != float("inf") else None for name, v in values.items()}


def protected_ids(base: Base) -> torch.Tensor:
    """The tokens that the engine protects."""
    return torch.tensor(control_ids(base.tokenizer, base.eos_ids), dtype=torch.long, device=base.device)


def combine(
    b_NV: torch.Tensor,
    streams: Mapping[str, torch.Tensor],
    rule: RuleSpec,
    *,
    protected_ids: torch.Tensor,
    fused_filter: bool,
) -> torch.Tensor:
    """The rule's scores of fp32 logits, by role "a", or "q" and "p"; -inf where filtered. `fused_filter` False leaves
    that filter out."""
    tau = rule.filter.tau
    scores = b_NV
    if rule.kind == "subtract":
        scores = reference.subtract(b_NV, streams["a"], strength=rule.strength)
    elif rule.kind == "relu_difference":
        scores = reference.relu_difference(
            b_NV, streams["a"], strength=rule.strength, dead_zone=rule.dead_zone
        )
    elif rule.kind == "pair_linear":
        scores = reference.pair_linear(b_NV, streams["q"], streams["p"], strength=rule.strength)
    elif rule.kind == "pair_rank":
        scores = reference.pair_rank(b_NV, streams["q"], streams["p"], rank_k=rule.rank_k)
    if rule.filter.mode == "plausibility":
        keep = reference.plausibility_keep(b_NV, tau=tau, min_keep=rule.filter.min_keep)
        scores = scores.masked_fill(~keep, float("-inf"))
    if rule.filter.mode == "official":
        scores = scores.masked_fill(~reference.official_keep(b_NV, tau=tau), float("-inf"))
    if rule.filter.mode == "fused" and fused_filter:
        scores = scores.masked_fill(~reference.fused_keep(scores, tau=tau), float("-inf"))
    return reference.protect(scores, b_NV, protected_ids) if rule.protect else scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Logits of N answer tokens: the base's, and the served scores with and without a fused filter."""

    labels_N: torch.Tensor
    base_NV: torch.Tensor
    open_NV: torch.Tensor
    closed_NV: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What will be served: a rule and the adapter in each of its roles, or one adapter in the target itself."""

    rule: RuleSpec
    roles: Mapping[str, Assistant]
    target: Assistant | None
    protected_ids: torch.Tensor

    @property
    def adapters(self) -> list[Assistant]:
        return [*self.roles.values(), *([] if self.target is None else [self.target])]

    def score(self, examples: Sequence[Example]) -> Scored:
        """Teacher-forced over the answers of some examples: one batch."""
        return next(self.scores(examples, [self.rule]))

    @torch.inference_mode()
    def scores(self, examples: Sequence[Example], rules: Sequence[RuleSpec]) -> Iterator[Scored]:
        """The same under each of some rules that read the same streams, which run once. One after another: they are
        large."""
        streams: dict[str, torch.Tensor] = {}
        first = self.adapters[0]
        batch = self._batch(first, examples)
        labels_N = first.tokens(batch).labels_N
        base_NV = first.logits(batch["final_BQD"][batch["is_answer_BQ"]])
        for role, assistant in self.roles.items():
            if assistant.place != first.place:
                batch, first = self._batch(assistant, examples), assistant
            streams[role] = assistant.logits(assistant.hidden(batch))
        # With an adapter in the target the rule starts from the adapted target's scores.
        b_NV = base_NV if self.target is None else self.target.logits(self.target.hidden(batch))
        for rule in rules:
            yield Scored(
                labels_N=labels_N,
                base_NV=base_NV,
                open_NV=self._combined(b_NV, streams, rule, fused_filter=False),
                closed_NV=self._combined(b_NV, streams, rule, fused_filter=True),
            )

    def _combined(
        self, b_NV: torch.Tensor, streams: Mapping[str, torch.Tensor], rule: RuleSpec, *, fused_filter: bool
    ) -> torch.Tensor:
        return combine(b_NV, streams, rule, protected_ids=self.protected_ids, fused_filter=fused_filter)

    def _batch(self, assistant: Assistant, examples: Sequence[Example]) -> Batch:
        with assistant.peft.disable_adapter():
            seen = observe(
                assistant.model, examples, place=assistant.place, num_top=1, vocab_size=assistant.vocab_size
            )
        device = assistant.model.device
        return cast(Batch, {name: cast(torch.Tensor, v).to(device) for name, v in collate(seen).items()})


Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompts and their answers, token ids."""


def likelihood(fusion: Fusion, pairs: Pairs) -> Likelihood:
    return likelihoods(fusion, pairs, [fusion.rule])[0]


def likelihoods(fusion: Fusion, pairs: Pairs, rules: Sequence[RuleSpec]) -> list[Likelihood]:
    """The same answers under each rule; target and assistants run once for all."""
    tallies = [_Tally() for _ in rules]
    examples = [
        Example(tuple(prompt), tuple(answer), Kind.RETAIN, (0.0,) * len(answer)) for prompt, answer in pairs
    ]
    for start in range(0, len(examples), BATCH_SIZE):
        scored = fusion.scores(examples[start : start + BATCH_SIZE], rules)
        for tally, one in zip(tallies, scored, strict=True):
            tally.add(one)
    return [tally.likelihood() for tally in tallies]


class _Tally:
    """Answer tokens under one rule, batch by batch."""

    def __init__(self) -> None:
        self._nlls: dict[str, list[torch.Tensor]] = {"base": [], "open": [], "closed": []}
        self._same: list[torch.Tensor] = []

    def add(self, scored: Scored) -> None:
        for name, found in self._nlls.items():
            log_p_NV = cast(torch.Tensor, getattr(scored, f"{name}_NV")).log_softmax(-1)
            found.append(-log_p_NV.gather(-1, scored.labels_N[:, None])[:, 0])
        self._same.append((scored.closed_NV.argmax(-1) == scored.base_NV.argmax(-1)).float())

    def likelihood(self) -> Likelihood:
        base_N, open_N, closed_N = (torch.cat(found) for found in self._nlls.values())
        removed_N = closed_N.isinf()
        return Likelihood(
            tokens=removed_N.shape[0],
            nll_base=base_N.mean().item(),
            nll_fused=open_N.mean().item(),
            nll_served=closed_N.mean().item(),
            agreement=torch.cat(self._same).mean().item(),
            removed=removed_N.float().mean().item(),
        )


def generate(
    fusion: Fusion, prompts: Sequence[Sequence[int]], *, end_ids: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """One greedy answer to each prompt under the rule, with its end token where it ended.

    Whole sequences are run anew for every token: this is for a handful of probes, and the same code for every kind of
    stream.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), BATCH_SIZE):
        unfinished = list(range(start, min(start + BATCH_SIZE, len(prompts))))
        for _ in range(max_tokens):
            so_far = [(*prompts[number], *answers[number]) for number in unfinished]
            scored = fusion.score([Example(ids, NEXT, Kind.RETAIN, (0.0,)) for ids in so_far])
            for number, token in zip(unfinished, scored.closed_NV.argmax(-1).tolist(), strict=True):
                answers[number].append(token)
            unfinished = [number for number in unfinished if answers[number][-1] not in end_ids]
            if not unfinished:
                break
    return answers
