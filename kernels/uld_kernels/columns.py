"""Collects what a call gives, row by row or many rows at once: Columns. Written by the torch samplers.

Legend: B rows to draw, N rows put at once, T listed alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch

from uld_kernels import rules
from uld_kernels.measure import Listing, Measures
from uld_kernels.rows import FusedOutput, SampleOutput, SampleRow, ScoreOutput


class Columns:
    def __init__(self, rows: Sequence[SampleRow]) -> None:
        self.tokens: dict[int, int] = {}
        """Of the rows that are done; -1 where one failed. A row that is scored counts as done too."""
        self._rows = rows
        self._ranks = [0] * len(rows)
        self._status = [rules.OK] * len(rows)
        self._logprob = [-inf] * len(rows)
        self._num_kept = [0] * len(rows)
        self._kl = [0.0] * len(rows)
        self._changed = [False] * len(rows)
        self._listed: dict[int, tuple[list[int], list[float]]] = {}

    def fail(self, number: int, status: int) -> None:
        self.tokens[number], self._status[number] = -1, status

    def draw(self, numbers: Sequence[int], token_N: torch.Tensor) -> None:
        self.tokens.update(zip(numbers, token_N.tolist(), strict=True))

    def rank(self, numbers: Sequence[int], rank_N: torch.Tensor) -> None:
        for number, rank in zip(numbers, rank_N.tolist(), strict=True):
            self._ranks[number] = rank

    def measure(
        self, numbers: Sequence[int], measures: Measures, *, score_N: torch.Tensor, listing: Listing | None
    ) -> None:
        """`score_N` are the fused scores of the rows' tokens."""
        columns = (
            (self._logprob, (score_N.double() - measures.lse_N).tolist()),
            (self._num_kept, measures.num_kept_N.tolist()),
            (self._kl, measures.kl_N.tolist()),
            (self._changed, measures.changed_N.tolist()),
        )
        for column, values in columns:
            for number, value in zip(numbers, values, strict=True):
                column[number] = value
        if listing is None:
            return
        logprob_NT = listing.scores_NT.double() - measures.lse_N[:, None]
        ids, logprobs = listing.ids_NT.tolist(), logprob_NT.tolist()
        for place, number in enumerate(numbers):
            count = self._rows[number].num_logprobs
            self._listed[number] = ids[place][:count], logprobs[place][:count]

    def sampled(self, device: torch.device) -> SampleOutput:
        tokens = [self.tokens[number] for number in range(len(self._rows))]
        token_ids_B = torch.tensor(tokens, dtype=torch.int64, device=device)
        return SampleOutput(token_ids_B=token_ids_B, **self._columns(device), digests=self._digests())

    def scored(self, device: torch.device) -> ScoreOutput:
        rank_B = torch.tensor(self._ranks, dtype=torch.int64, device=device)
        return ScoreOutput(rank_B=rank_B, **self._columns(device), digests=self._digests())

    def fused(self, scores_BV: torch.Tensor) -> FusedOutput:
        status_B = torch.tensor(self._status, dtype=torch.int32, device=scores_BV.device)
        return FusedOutput(scores_BV, status_B, self._digests())

    def _digests(self) -> list[tuple[int, ...]]:
        return [tuple(term.digest for term in row.distinct_terms) for row in self._rows]

    def _columns(self, device: torch.device) -> dict[str, torch.Tensor]:
        width = max((row.num_logprobs for row in self._rows), default=0)
        listed = [self._listed.get(number, ([], [])) for number in range(len(self._rows))]
        top_ids = [ids + [-1] * (width - len(ids)) for ids, _ in listed]
        top_logprobs = [values + [-inf] * (width - len(values)) for _, values in listed]
        shape = len(listed), width
        return {
            "logprob_B": torch.tensor(self._logprob, dtype=torch.float32, device=device),
            "top_ids_BN": torch.tensor(top_ids, dtype=torch.int64, device=device).view(shape),
            "top_logprobs_BN": torch.tensor(top_logprobs, dtype=torch.float32, device=device).view(shape),
            "status_B": torch.tensor(self._status, dtype=torch.int32, device=device),
            "num_kept_B": torch.tensor(self._num_kept, dtype=torch.int64, device=device),
            "kl_B": torch.tensor(self._kl, dtype=torch.float32, device=device),
            "argmax_changed_B": torch.tensor(self._changed, dtype=torch.bool, device=device),
        }
