"""Turns SampleRows into the parameter tables that the Triton sampler reads. Called by sampler_triton once a batch.

Decides per row, on the host, how its candidates are found (see kernels/README.md); launches nothing.

Legend: B rows to draw, M terms of the row with the most, V real vocabulary, H rows with history, bans or bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, log

import torch

from uld_kernels import rules
from uld_kernels.rows import SampleRow, Term

# Row classes: where the values that candidates are selected by come from.
FILTERED_BY_TARGET = 0
FILTERED_BY_SCORE = 1
UNFILTERED = 2

# Columns of the tables. The kernels load them by these numbers.
INT_COLUMNS = (
    "row_b",
    "num_terms",
    "add_penalties",
    "row_class",
    "protect",
    "ban_row",
    "history_row",
    "bias_row",
    "top_k",
    "num_logprobs",
    "seed_low",
    "seed_high",
    "position",
    "list_best",
    "list_nucleus",
    "target_id",
)
FLOAT_COLUMNS = (
    "temperature",
    "top_p",
    "log_min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "log_fused_tau",
    "list_log_ratio",
)
TERM_INT_COLUMNS = ("kind", "row_1", "row_2", "needs_normalizer", "rank_k", "filter_keep")
TERM_FLOAT_COLUMNS = ("strength", "log_filter_tau")

# Lists of unfiltered rows: so many best tokens are listed at most before a row falls back to listing everything.
_MAX_LISTED_TOP_K = 1024
_LISTED_FOR_TOP_P = 512


@dataclass(frozen=True, slots=True)
class Packed:
    """Parameters of B rows on the device, and what the launcher must know of them on the host."""

    ints: torch.Tensor
    """int32 (B, len(INT_COLUMNS))."""
    floats: torch.Tensor
    """fp32 (B, len(FLOAT_COLUMNS))."""
    term_ints: torch.Tensor
    """int32 (B, M, len(TERM_INT_COLUMNS))."""
    term_floats: torch.Tensor
    """fp32 (B, M, len(TERM_FLOAT_COLUMNS))."""
    allowed_HV: torch.Tensor
    """int8: 0 where banned."""
    history_HV: torch.Tensor
    """int32: 2 * times put out + (1 if in the prompt)."""
    bias_HV: torch.Tensor
    """fp32."""
    max_terms: int
    max_logprobs: int
    needs_normalizers: bool
    needs_ranks: bool
    digests: list[tuple[int, ...]]


def pack(
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    device: torch.device,
    target_ids: Sequence[int] | None = None,
) -> Packed:
    """Host work only, then one copy to the device a table, without waiting for it.

    With target_ids the rows are to be scored, not drawn: sampling parameters are left out and every kept token is
    listed, because ranks count them all.
    """
    dense = _DenseTables(vocab_size, device)
    terms = [row.distinct_terms for row in rows]
    max_terms = max(1, max((len(group) for group in terms), default=1))
    ints, floats, term_ints, term_floats = [], [], [], []
    for index, (row, group) in enumerate(zip(rows, terms, strict=True)):
        target_id = None if target_ids is None else target_ids[index]
        row_ints, row_floats = _row_columns(row, group, dense, target_id=target_id)
        ints.append([row_ints[name] for name in INT_COLUMNS])
        floats.append([row_floats[name] for name in FLOAT_COLUMNS])
        columns = [_term_columns(term, len(group), vocab_size) for term in group]
        padding = max_terms - len(group)
        term_ints.append([c[0] for c in columns] + [[0] * len(TERM_INT_COLUMNS)] * padding)
        term_floats.append([c[1] for c in columns] + [[0.0] * len(TERM_FLOAT_COLUMNS)] * padding)
    return Packed(
        ints=_to_device(torch.tensor(ints, dtype=torch.int32), device),
        floats=_to_device(torch.tensor(floats, dtype=torch.float32), device),
        term_ints=_to_device(torch.tensor(term_ints, dtype=torch.int32), device),
        term_floats=_to_device(torch.tensor(term_floats, dtype=torch.float32), device),
        allowed_HV=dense.stacked(dense.allowed, torch.int8),
        history_HV=dense.stacked(dense.history, torch.int32),
        bias_HV=dense.stacked(dense.bias, torch.float32),
        max_terms=max_terms,
        max_logprobs=max((row.num_logprobs for row in rows), default=0),
        needs_normalizers=any(_needs_normalizer(term, len(group)) for group in terms for term in group),
        needs_ranks=any(term.kind == rules.PAIR_RANK for group in terms for term in group),
        digests=[tuple(term.digest for term in group) for group in terms],
    )


def _row_columns(
    row: SampleRow, terms: tuple[Term, ...], dense: _DenseTables, *, target_id: int | None
) -> tuple[dict[str, int], dict[str, float]]:
    is_drawn = target_id is None
    fused_tau = max((term.tau for term in terms if term.filter_mode == rules.FUSED), default=0.0)
    history_row = dense.add_history(row) if is_drawn else -1
    bias_row = dense.add_bias(row) if is_drawn else -1
    protect = any(term.protect for term in terms)
    ints = {
        "row_b": row.row_b,
        "num_terms": len(terms),
        "add_penalties": int(len(terms) == 1 or row.compose == rules.COMPOSE_SUM),
        "row_class": _row_class(terms, dense.vocab_size),
        "protect": int(protect),
        "ban_row": dense.add_bans(row),
        "history_row": history_row,
        "bias_row": bias_row,
        "top_k": row.top_k if is_drawn else 0,
        "num_logprobs": row.num_logprobs,
        "seed_low": _as_int32(row.seed),
        "seed_high": _as_int32(row.seed >> 32),
        "position": _as_int32(row.position),
        "list_best": 0,
        "list_nucleus": 0,
        "target_id": -1 if target_id is None else target_id,
    }
    floats = {
        "temperature": row.temperature,
        "top_p": row.top_p,
        "log_min_p": log(row.min_p) if row.min_p > 0.0 else -inf,
        "repetition_penalty": row.repetition_penalty,
        "presence_penalty": row.presence_penalty,
        "frequency_penalty": row.frequency_penalty,
        "log_fused_tau": log(fused_tau) if fused_tau > 0.0 else -inf,
        "list_log_ratio": 0.0,
    }
    if is_drawn and not protect and history_row < 0 and bias_row < 0:
        _plan_list(row, ints, floats)
    return ints, floats


def _plan_list(row: SampleRow, ints: dict[str, int], floats: dict[str, float]) -> None:
    """How an unfiltered row lists few candidates: its best `list_best` and all within `list_log_ratio` of the best.

    Left at 0 and 0, everything is listed: a free draw needs every token.
    """
    if row.temperature == 0.0:
        ints["list_best"] = max(1, row.num_logprobs)
    elif 0 < row.top_k <= _MAX_LISTED_TOP_K:
        ints["list_best"] = max(row.top_k, row.num_logprobs)
    elif row.min_p > 0.0 and row.top_p == 1.0:
        ints["list_best"] = max(1, row.num_logprobs)
        floats["list_log_ratio"] = row.temperature * log(row.min_p)
    elif row.top_p < 1.0 and row.top_k == 0:
        ints["list_best"] = max(_LISTED_FOR_TOP_P, row.num_logprobs)
        ints["list_nucleus"] = 1


def _row_class(terms: tuple[Term, ...], vocab_size: int) -> int:
    if any(_filter_keep(term, vocab_size) > 0 for term in terms):
        return FILTERED_BY_TARGET
    if any(term.filter_mode == rules.FUSED for term in terms):
        return FILTERED_BY_SCORE
    return UNFILTERED


def _filter_keep(term: Term, vocab_size: int) -> int:
    """min_keep of the filter on the target; 0 where there is none."""
    if term.filter_mode == rules.PLAUSIBILITY:
        return min(term.min_keep, vocab_size)
    # floor gives 0 where the published code keeps everything.
    return floor(term.tau * vocab_size) if term.filter_mode == rules.OFFICIAL else 0


def _needs_normalizer(term: Term, num_terms: int) -> bool:
    """A single rule may leave out the constants that normalisers add to all its scores."""
    return num_terms > 1 and term.kind in (rules.SUBTRACT, rules.PAIR_LINEAR)


def _term_columns(term: Term, num_terms: int, vocab_size: int) -> tuple[list[int], list[float]]:
    is_pair = term.kind in (rules.PAIR_LINEAR, rules.PAIR_RANK)
    ints = {
        "kind": term.kind,
        "row_1": term.row_q if is_pair else term.row_a,
        "row_2": term.row_p if is_pair else -1,
        "needs_normalizer": int(_needs_normalizer(term, num_terms)),
        "rank_k": min(term.rank_k, vocab_size) if term.kind == rules.PAIR_RANK else 0,
        "filter_keep": _filter_keep(term, vocab_size),
    }
    floats = {"strength": term.strength, "log_filter_tau": log(term.tau) if term.tau > 0.0 else -inf}
    return [ints[name] for name in TERM_INT_COLUMNS], [floats[name] for name in TERM_FLOAT_COLUMNS]


class _DenseTables:
    """Vocabulary-wide tables of the rows that have bans, history penalties or a bias; most rows have none."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self.allowed: list[torch.Tensor] = []
        self.history: list[torch.Tensor] = []
        self.bias: list[torch.Tensor] = []

    def add_bans(self, row: SampleRow) -> int:
        if row.allowed_mask is None and row.banned_ids is None:
            return -1
        allowed_V = torch.ones(self.vocab_size, dtype=torch.int8, device=self._device)
        if row.allowed_mask is not None:
            allowed_V.copy_(row.allowed_mask, non_blocking=True)
        if row.banned_ids is not None:
            allowed_V.index_fill_(0, _to_device(row.banned_ids, self._device), 0)
        self.allowed.append(allowed_V)
        return len(self.allowed) - 1

    def add_history(self, row: SampleRow) -> int:
        if (row.repetition_penalty, row.presence_penalty, row.frequency_penalty) == (1.0, 0.0, 0.0):
            return -1
        history_V = torch.zeros(self.vocab_size, dtype=torch.int32, device=self._device)
        if row.prompt_ids is not None:
            history_V.index_fill_(0, _to_device(row.prompt_ids, self._device), 1)
        if row.output_ids is not None:
            ids = _to_device(row.output_ids, self._device)
            history_V.index_add_(0, ids, torch.full_like(ids, 2, dtype=torch.int32))
        self.history.append(history_V)
        return len(self.history) - 1

    def add_bias(self, row: SampleRow) -> int:
        if row.logit_bias is None:
            return -1
        ids, values = (_to_device(part, self._device) for part in row.logit_bias)
        bias_V = torch.zeros(self.vocab_size, dtype=torch.float32, device=self._device)
        self.bias.append(bias_V.index_copy_(0, ids, values.float()))
        return len(self.bias) - 1

    def stacked(self, tables: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """(H, V), or one element that nothing points to."""
        return torch.stack(tables) if tables else torch.zeros((1, 1), dtype=dtype, device=self._device)


def _as_int32(word: int) -> int:
    """The low 32 bits of a number as a signed one, which is how int32 tensors hold them."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
