"""History penalties and logit_bias of rows' tokens. Called by the torch samplers. Writes no formula: those are in
reference.py.

Legend: N rows, C tokens of all rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uld_kernels import reference
from uld_kernels.logit_groups import Found
from uld_kernels.rows import SampleRow
from uld_kernels.segments import Segments


def penalizes(row: SampleRow) -> bool:
    """Whether anything but the rule changes a row's scores."""
    return _counts_history(row) or row.logit_bias is not None


def repeats(row: SampleRow) -> bool:
    return row.repetition_penalty != 1.0


def penalized(
    found: Found, rows: Sequence[SampleRow], anchor_N: torch.Tensor | None, *, vocab_size: int
) -> torch.Tensor:
    """(C,): the tokens' scores after penalties and bias; others are not revived.

    The repetition penalty divides positive scores and multiplies negative ones, so their offset must mean something
    whatever the rule did to it: `anchor_N` moves the scores of rows that have it to the target's own log-normaliser
    (fp64; None where they are there).
    """
    s_C, segments = found.value_C, found.segments(len(rows))
    if any(map(_counts_history, rows)):
        prompt_C, output_C = _counts(found, segments, rows, vocab_size)
        if any(map(repeats, rows)):
            if anchor_N is not None:
                shift_N = anchor_N.where(_column(anchor_N, list(map(repeats, rows))) > 0, 0.0)
                s_C = s_C + segments.spread(shift_N.to(s_C.dtype))
            penalty_C = segments.spread(_column(s_C, [row.repetition_penalty for row in rows]))
            s_C = reference.repetition_penalty(s_C, prompt_C + output_C > 0, penalty=penalty_C)
        presence_C = segments.spread(_column(s_C, [row.presence_penalty for row in rows]))
        frequency_C = segments.spread(_column(s_C, [row.frequency_penalty for row in rows]))
        s_C = reference.presence_penalty(s_C, output_C, penalty=presence_C)
        s_C = reference.frequency_penalty(s_C, output_C, penalty=frequency_C)
    if any(row.logit_bias is not None for row in rows):
        s_C = s_C + _biases(found, segments, rows, vocab_size)
    return s_C


def touched(rows: Sequence[SampleRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and ids, with repeats, of all tokens that penalties and bias could change."""
    ids, counts = [torch.zeros(0, dtype=torch.int64, device=device)], []
    for row in rows:
        own = [row.prompt_ids, row.output_ids] if _counts_history(row) else []
        own += [row.logit_bias[0]] if row.logit_bias is not None else []
        present = [each for each in own if each is not None]
        ids += present
        counts.append(sum(each.shape[0] for each in present))
    row_N = torch.arange(len(rows), device=device)
    return row_N.repeat_interleave(torch.tensor(counts, device=device)), torch.cat(ids)


def _counts_history(row: SampleRow) -> bool:
    return repeats(row) or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _counts(
    found: Found, segments: Segments, rows: Sequence[SampleRow], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each token is in its row's prompt and in its output; 0 where nobody counts."""
    count_V = torch.zeros(vocab_size, dtype=torch.int64, device=found.id_C.device)
    prompt, output = [], []
    lengths = segments.length_N.tolist()
    for row, ids_K in zip(rows, torch.split(found.id_C, lengths), strict=True):
        counts_output = _counts_history(row) and row.output_ids is not None
        prompt.append(_count(ids_K, row.prompt_ids if repeats(row) else None, count_V))
        output.append(_count(ids_K, row.output_ids if counts_output else None, count_V))
    return torch.cat(prompt), torch.cat(output)


def _count(ids_K: torch.Tensor, history: torch.Tensor | None, count_V: torch.Tensor) -> torch.Tensor:
    """`count_V` comes with zeros and goes with zeros."""
    if history is None:
        return torch.zeros_like(ids_K)
    count_V.index_add_(0, history, torch.ones_like(history))
    counts_K = count_V.index_select(0, ids_K)
    count_V.index_fill_(0, history, 0)
    return counts_K


def _biases(found: Found, segments: Segments, rows: Sequence[SampleRow], vocab_size: int) -> torch.Tensor:
    bias_V = torch.zeros(vocab_size, dtype=found.value_C.dtype, device=found.id_C.device)
    biases = []
    for row, ids_K in zip(rows, torch.split(found.id_C, segments.length_N.tolist()), strict=True):
        if row.logit_bias is None:
            biases.append(torch.zeros_like(ids_K, dtype=bias_V.dtype))
            continue
        ids, values = row.logit_bias
        biases.append(bias_V.index_copy_(0, ids, values.to(bias_V.dtype)).index_select(0, ids_K))
        bias_V.index_fill_(0, ids, 0.0)
    return torch.cat(biases)
