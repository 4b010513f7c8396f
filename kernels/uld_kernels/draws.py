"""From the scores of a lane's rows, whole or listed, to one token each: temperature, truncation, noise. Called by
batch_sampler. Knows no rule.

Legend: N rows of the lane, C tokens of all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uld_kernels.lane import Lane
from uld_kernels.logit_groups import Found
from uld_kernels.lottery import Lot, draw, draw_few, draw_whole, is_long
from uld_kernels.nucleus import nuclei, top_of, truncates


def token_of_rows(lane: Lane) -> torch.Tensor:
    """(N,) drawn from whole rows. Raises RowsFailed with None for a nucleus that fp32 cannot decide."""
    free = [n for n, row in enumerate(lane.rows) if row.temperature > 0.0 and not truncates(row)]
    if len(free) == len(lane.rows):
        return _drawn_free(lane)
    cut = [n for n, row in enumerate(lane.rows) if truncates(row)]
    token_N = lane.best_id_N.clone()
    for places, drawn in ((free, _drawn_free), (cut, _drawn_cut)):
        if places:
            token_N[torch.tensor(places, device=token_N.device)] = drawn(lane.select(places))
    return token_N


def token_of_lists(lane: Lane, scores: Found) -> torch.Tensor:
    """(N,) drawn from the listed tokens of each row, all there are; none is empty."""
    if any(map(truncates, lane.rows)):
        scores, _ = _truncated(lane, scores, None)
    return _drawn(lane, scores)


def _drawn_free(lane: Lane) -> torch.Tensor:
    best = lane.best_N, lane.best_id_N
    return draw_whole(lane.groups, lane.stream(), temperature_N1=lane.temperatures(), best=best)


def _drawn_cut(lane: Lane) -> torch.Tensor:
    found, masses = top_of(lane.groups, lane.rows, lane.best_N)
    kept, unsure = _truncated(lane, found, masses)
    is_unsure_N = torch.zeros_like(lane.best_id_N, dtype=torch.bool)
    is_unsure_N[torch.tensor(unsure, dtype=torch.int64, device=is_unsure_N.device)] = True
    lane.fail_where(is_unsure_N, None)
    return _drawn(lane, kept)


def _truncated(lane: Lane, scores: Found, masses: Sequence[float] | None) -> tuple[Found, list[int]]:
    segments = scores.segments(len(lane.rows))
    keep_C, unsure = nuclei(segments, _log_weights(lane, scores), lane.rows, masses)
    return scores.where(keep_C), unsure


def _log_weights(lane: Lane, scores: Found) -> torch.Tensor:
    """(C,) scores / temperature; greedy rows keep their scores."""
    temperature_N = lane.column([row.temperature or 1.0 for row in lane.rows])
    return scores.value_C / temperature_N.index_select(0, scores.row_C)


def _drawn(lane: Lane, scores: Found) -> torch.Tensor:
    """Short lists together; a long one as a whole row, where noise is asked for in few places."""
    lengths = scores.segments(len(lane.rows)).length_N.tolist()
    is_apart = [is_long(size) and row.temperature > 0.0 for size, row in zip(lengths, lane.rows, strict=True)]
    if not any(is_apart):
        return draw_few(scores, lane.stream(), temperature_N1=lane.temperatures())
    token_N = torch.zeros_like(lane.best_id_N)
    together = [n for n, apart in enumerate(is_apart) if not apart]
    if together:
        token_N[torch.tensor(together, device=token_N.device)] = _drawn_short(lane, scores, is_apart)
    ids = torch.split(scores.id_C, lengths)
    weights = torch.split(_log_weights(lane, scores), lengths)
    apart = [n for n, is_one in enumerate(is_apart) if is_one]
    lots = [Lot(ids[n], weights[n], lane.rows[n].seed, lane.rows[n].position) for n in apart]
    token_N[torch.tensor(apart, device=token_N.device)] = torch.tensor(draw(lots), device=token_N.device)
    return token_N


def _drawn_short(lane: Lane, scores: Found, is_apart: Sequence[bool]) -> torch.Tensor:
    together_N = ~torch.tensor(is_apart, device=scores.row_C.device)
    short = scores.where(together_N.index_select(0, scores.row_C))
    short = Found((together_N.cumsum(0) - 1).index_select(0, short.row_C), short.id_C, short.value_C)
    part = lane.select([n for n, apart in enumerate(is_apart) if not apart])
    return draw_few(short, part.stream(), temperature_N1=part.temperatures())
