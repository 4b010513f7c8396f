"""Many rows drawn or scored at once: what sampler_reference gives one by one, in a few tensor operations. Called by
sampler_reference.

Tokens that could win are found first, by the best of each group of ids; all else looks at these alone. Nothing here
depends on which rows come together. Rows that this file leaves out are rare: see ways.py.

Legend: R rows of logits, W their width, V real vocabulary, B rows of the call, N rows of a lane, C tokens of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from uld_kernels import rules
from uld_kernels.assistants import Assistants
from uld_kernels.candidates import (
    best_by_fused_filter,
    kept_by_fused_filter,
    kept_by_target_filter,
    listed,
)
from uld_kernels.columns import Columns
from uld_kernels.draws import token_of_lists, token_of_rows
from uld_kernels.fusion import combine_whole, whole_rows
from uld_kernels.history import penalized, penalizes, touched
from uld_kernels.lane import Lane, RowsFailed
from uld_kernels.logit_groups import LOWEST, Found, LogitGroups
from uld_kernels.measure import (
    Measures,
    listing,
    listing_of_rows,
    measures_of_lists,
    measures_of_rows,
    ranks_of_lists,
    ranks_of_rows,
    scores_of,
)
from uld_kernels.normalizers import log_sum_exps
from uld_kernels.protection import protected
from uld_kernels.rows import LateRows, SampleRow
from uld_kernels.streams import RowFailure, Streams
from uld_kernels.ways import Targets, Way, is_measured, lanes, way_of


@dataclass(frozen=True, slots=True)
class Batch:
    """What the rows of a call share; as ops.fused_sample has it."""

    logits_RW: torch.Tensor
    rows: Sequence[SampleRow]
    vocab_size: int
    protected_ids: torch.Tensor
    late: LateRows | None


def sample_batch(batch: Batch, columns: Columns) -> None:
    """Draws for those rows that can be drawn together; the others are not in `columns` afterwards."""

    def draw(lane: Lane, way: Way) -> None:
        if way.kind == "plain":
            _draw_plain(lane, way, columns)
        else:
            _draw_fused(lane, way, batch, columns)

    _work(batch, columns, draw, is_scored=False)


def score_batch(batch: Batch, target_ids_B: torch.Tensor, columns: Columns) -> None:
    """The same of given tokens' scores and ranks."""

    def score(lane: Lane, way: Way) -> None:
        numbers_N = torch.tensor(lane.numbers, device=target_ids_B.device)
        token_N = target_ids_B.index_select(0, numbers_N)
        if way.kind == "plain":
            score_N = lane.groups.at(token_N[:, None])[:, 0]
            rank_N = ranks_of_rows(lane.groups, score_N)
            _measure_plain(lane, columns, score_N)
        else:
            kept, target_lse_N = _kept(lane, way, batch)
            score_N = scores_of(kept, token_N)
            rank_N = ranks_of_lists(kept, score_N)
            measures, _ = _measured(lane, kept, target_lse_N)
            _measure_fused(lane, kept, measures, score_N, columns)
        columns.rank(lane.numbers, rank_N)
        columns.draw(lane.numbers, token_N)

    _work(batch, columns, score, is_scored=True)


def fuse_batch(batch: Batch, columns: Columns, scores_BV: torch.Tensor) -> None:
    """Writes the fused scores of those rows that can be worked on together, which begin as -inf."""
    width = scores_BV.shape[1]

    def write(lane: Lane, way: Way) -> None:
        if way.kind == "plain":
            kept = lane.groups.at_least(torch.full_like(lane.groups.max_NG, LOWEST))
        else:
            kept, _ = _kept(lane, way, batch)
            if not kept.value_C.isfinite().all():
                is_wrong_C = ~kept.value_C.isfinite()
                lane.fail_where(kept.segments(len(lane.rows)).sums(is_wrong_C) > 0, rules.NUMERICAL)
        number_N = torch.tensor(lane.numbers, device=scores_BV.device)
        place_C = number_N.index_select(0, kept.row_C) * width + kept.id_C
        scores_BV.view(-1).index_copy_(0, place_C, kept.value_C)
        columns.draw(lane.numbers, number_N)

    _work(batch, columns, write, is_scored=False)


def _work(batch: Batch, columns: Columns, work: Callable[[Lane, Way], None], *, is_scored: bool) -> None:
    """`work` writes columns once nothing can fail any more. A lane in which a row fails is worked without it."""
    if batch.logits_RW.dtype == torch.float64:
        return
    shape = {"num_rows": batch.logits_RW.shape[0], "vocab_size": batch.vocab_size}
    has_protected = batch.protected_ids.shape[0] > 0
    ways = [way_of(row, **shape, has_protected=has_protected, is_scored=is_scored) for row in batch.rows]
    used = [row for row, way in zip(batch.rows, ways, strict=True) if way is not None]
    if not used:
        return
    targets = Targets(batch.logits_RW, used, vocab_size=batch.vocab_size)
    for way, members in lanes(ways):
        numbers = members
        while numbers:
            try:
                work(targets.lane(numbers, [batch.rows[number] for number in numbers], bans=way.bans), way)
                break
            except RowsFailed as failed:
                for number, status in failed.statuses.items():
                    if status is not None:
                        columns.fail(number, status)
                numbers = [number for number in numbers if number not in failed.statuses]


# --- rows without a term -----------------------------------------------------------------------------


def _draw_plain(lane: Lane, way: Way, columns: Columns) -> None:
    token_N = token_of_rows(_penalized_rows(lane) if way.penalizes else lane)
    measured = [place for place, row in enumerate(lane.rows) if is_measured(row)]
    if measured:
        part = lane.select(measured)
        own_N = token_N.index_select(0, torch.tensor(measured, device=token_N.device))
        _measure_plain(part, columns, part.groups.at(own_N[:, None])[:, 0])
    columns.draw(lane.numbers, token_N)


def _measure_plain(lane: Lane, columns: Columns, score_N: torch.Tensor) -> None:
    measures = measures_of_rows(lane.groups, log_sum_exps(lane.groups))
    num_listed = max(row.num_logprobs for row in lane.rows)
    listing_NT = listing_of_rows(lane.groups, num_listed) if num_listed else None
    columns.measure(lane.numbers, measures, score_N=score_N, listing=listing_NT)


def _penalized_rows(lane: Lane) -> Lane:
    """Raises RowsFailed where a penalty or bias makes a score infinite."""
    row_C, id_C = touched(lane.rows, lane.best_N.device)
    before = Found(row_C, id_C, lane.groups.at_each(row_C, id_C))
    after_C = penalized(before, lane.rows, None, vocab_size=lane.groups.size)
    is_lost_C = ~after_C.isfinite() & (before.value_C >= LOWEST)
    lane.fail_where(torch.bincount(row_C[is_lost_C], minlength=len(lane.rows)) > 0, rules.NUMERICAL)
    values_NW = lane.groups.copy()
    values_NW.view(-1).index_copy_(0, row_C * values_NW.shape[1] + id_C, after_C)
    return Lane.of(lane.numbers, lane.rows, LogitGroups.of(values_NW, size=lane.groups.size))


# --- rows with terms ---------------------------------------------------------------------------------


def _draw_fused(lane: Lane, way: Way, batch: Batch, columns: Columns) -> None:
    if _asks_for_best(lane, way):
        fuse = Assistants(lane, batch.logits_RW, batch.late).fused
        columns.draw(lane.numbers, best_by_fused_filter(lane, fuse))
        return
    kept, target_lse_N = _kept(lane, way, batch)
    measures, anchor_N = _measured(lane, kept, target_lse_N) if way.is_measured else (None, None)
    weights = kept
    if any(map(penalizes, lane.rows)):
        weights = kept.valued(penalized(kept, lane.rows, anchor_N, vocab_size=lane.groups.size))
    if not weights.value_C.isfinite().all():
        segments = weights.segments(len(lane.rows))
        lane.fail_where(segments.sums(~weights.value_C.isfinite()) > 0, rules.NUMERICAL)
    token_N = token_of_lists(lane, weights)
    if measures is not None:
        _measure_fused(lane, kept, measures, scores_of(kept, token_N), columns)
    columns.draw(lane.numbers, token_N)


def _asks_for_best(lane: Lane, way: Way) -> bool:
    """Whether the best fused score decides: it is never filtered, so that what else is kept need not be known."""
    if way.kind != "fused_filter" or way.protects or way.is_measured:
        return False
    return not any(row.temperature > 0.0 or penalizes(row) for row in lane.rows)


def _kept(lane: Lane, way: Way, batch: Batch) -> tuple[Found, torch.Tensor | None]:
    """What filters, rules and protection leave, at least one token a row; and the target's log-sum-exps where they are
    known. Raises RowsFailed."""
    fuse = Assistants(lane, batch.logits_RW, batch.late).fused
    if way.kind == "target_filter":
        kept = kept_by_target_filter(lane, fuse)
    elif way.kind == "fused_filter":
        kept = kept_by_fused_filter(lane, fuse)
    else:
        kept = listed(_whole_scores(lane, batch), lane)
    return protected(kept, lane.groups, batch.protected_ids) if way.protects else (kept, None)


def _whole_scores(lane: Lane, batch: Batch) -> torch.Tensor:
    """(N, V) fused scores, one row after the other; -inf where a token is banned or removed. Raises RowsFailed."""
    streams = Streams(batch.logits_RW, batch.vocab_size, batch.late)
    read, normalized = whole_rows(lane.rows)
    streams.survey(read, normalized=normalized)
    scores_NV = lane.groups.copy()
    failed: dict[int, int | None] = {}
    for place, (number, row) in enumerate(zip(lane.numbers, lane.rows, strict=True)):
        try:
            scores_NV[place, : batch.vocab_size] = combine_whole(streams, lane.groups.row(place), row)
        except RowFailure as failure:
            failed[number] = failure.status
    if failed:
        raise RowsFailed(failed)
    return scores_NV


def _measured(lane: Lane, kept: Found, target_lse_N: torch.Tensor | None) -> tuple[Measures, torch.Tensor]:
    """And how far the scores are from the target's own log-normaliser."""
    if target_lse_N is None:
        target_lse_N = log_sum_exps(lane.groups)
    target_C = lane.groups.at_each(kept.row_C, kept.id_C)
    measures = measures_of_lists(kept, target_C, target_lse_N, lane.best_id_N)
    lane.fail_where(~measures.lse_N.isfinite(), rules.NUMERICAL)
    return measures, target_lse_N - measures.lse_N


def _measure_fused(
    lane: Lane, kept: Found, measures: Measures, score_N: torch.Tensor, columns: Columns
) -> None:
    num_listed = max(row.num_logprobs for row in lane.rows)
    listing_NT = listing(kept, num_listed, num_rows=len(lane.rows)) if num_listed else None
    columns.measure(lane.numbers, measures, score_N=score_N, listing=listing_NT)
