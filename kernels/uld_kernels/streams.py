"""Reads rows of logits for the sampler that takes one row after the other: Streams. Called by fusion and batch_sampler.

Legend: R rows of logits, N rows read at once, V real vocabulary, K chosen tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite

import torch

from uld_kernels import rules
from uld_kernels.logit_groups import LogitGroups
from uld_kernels.normalizers import log_sum_exp, log_sum_exps
from uld_kernels.rows import LateRows


class RowFailure(Exception):
    """A row that has no token to give; `status` says why. Ends that row only."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def gather(values_V: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
    """values_V[ids_K], without the copy where nothing was filtered."""
    return values_V if ids_K.shape[0] == values_V.shape[0] else values_V[ids_K]


class Streams:
    """Reads rows of the logits as fp32 (fp64 stays fp64) without the padded head columns; late rows where asked."""

    def __init__(self, logits_RV: torch.Tensor, vocab_size: int, late: LateRows | None = None) -> None:
        self._logits_RV = logits_RV
        self._vocab_size = vocab_size
        self._late = late
        self._normalizers: dict[int, float] = {}
        self._finite: set[int] = set()
        self._every_id_V: torch.Tensor | None = None
        self._dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32

    def read(self, row: int) -> torch.Tensor:
        num_rows = self._logits_RV.shape[0]
        if row >= num_rows and self._late is not None:
            return self._late.scores(row - num_rows, self.every_id()).to(self._dtype)
        return self._logits_RV[row, : self._vocab_size].to(self._dtype)

    def kept(self, row: int, ids_K: torch.Tensor) -> torch.Tensor:
        """The logits of one assistant on the kept tokens, which must all be finite."""
        if row in self._finite:
            return gather(self.read(row), ids_K)
        num_rows = self._logits_RV.shape[0]
        if row >= num_rows and self._late is not None:
            stream_K = self._late.scores(row - num_rows, ids_K).to(self._dtype)
        else:
            stream_K = gather(self.read(row), ids_K)
        if stream_K.shape[0] > 0 and not all(map(isfinite, extremes(stream_K))):
            raise RowFailure(rules.NUMERICAL)
        return stream_K

    def survey(self, rows: Collection[int], *, normalized: Collection[int]) -> None:
        """Finds out at once which of some rows are finite, and what kept_log wants to know of the `normalized` ones.
        There is a row, and none is late."""
        ordered = sorted(rows)
        whole_NV = self._rows(ordered)
        lowest, highest = whole_NV.amin(-1), whole_NV.amax(-1)
        is_finite = (lowest.isfinite() & highest.isfinite()).tolist()
        self._finite.update(row for row, finite in zip(ordered, is_finite, strict=True) if finite)
        chosen = [place for place, row in enumerate(ordered) if row in normalized and is_finite[place]]
        if chosen:
            values = log_sum_exps(LogitGroups.of(whole_NV).select(chosen)).tolist()
            self._normalizers.update(zip((ordered[place] for place in chosen), values, strict=True))

    def is_finite(self, row: int) -> bool:
        """Whether a row is known to be finite; all of those surveyed."""
        return row in self._finite

    def every_id(self) -> torch.Tensor:
        """(V,) ids in order."""
        if self._every_id_V is None:
            self._every_id_V = torch.arange(self._vocab_size, device=self._logits_RV.device)
        return self._every_id_V

    def _rows(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), V)."""
        first, last = rows[0], rows[-1]
        if list(rows) == list(range(first, last + 1)):
            chosen_NW = self._logits_RV[first : last + 1]
        else:
            chosen_NW = self._logits_RV[torch.tensor(rows, device=self._logits_RV.device)]
        return chosen_NW[:, : self._vocab_size].to(self._dtype)

    def kept_log(self, row: int, ids_K: torch.Tensor) -> torch.Tensor:
        """The same as log-softmax over the whole vocabulary."""
        stream_K = self.kept(row, ids_K)
        normalizer = self._normalizers[row] if row in self._normalizers else log_sum_exp(self.read(row))
        if not isfinite(normalizer):
            raise RowFailure(rules.NUMERICAL)
        return stream_K - normalizer


def extremes(values: torch.Tensor) -> tuple[float, float]:
    # torch's aminmax takes fifteen times as long as the two apart.
    return values.amin().item(), values.amax().item()
