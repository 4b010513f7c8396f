"""What one would write in torch where there is no fused op: combine, filter, penalties, temperature, top-k, sort,
softmax, top-p, draw. Called by sampler_variants, as it is and compiled. Written for whole batches of one kind.

Legend: B rows, V vocabulary, L tokens of history."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log

import torch

from uld_serve.bench.sampler_kinds import FUSED_TAU, MIN_KEEP, STRENGTH, TAU, History, Kind

Chain = Callable[[Kind, torch.Tensor, torch.Tensor, torch.Tensor, History], torch.Tensor]


def draw(
    kind: Kind, b_BV: torch.Tensor, first_BV: torch.Tensor, second_BV: torch.Tensor, history: History
) -> torch.Tensor:
    """One token a row, (B,)."""
    if kind.temperature == 0.0:
        return scores(kind, b_BV, first_BV, second_BV, history).argmax(-1)
    probs_BV, ids_BV = probabilities(kind, b_BV, first_BV, second_BV, history)
    # What torch.multinomial does for one draw, without its check, for which the host waits.
    place_B1 = (probs_BV / torch.empty_like(probs_BV).exponential_()).argmax(-1, keepdim=True)
    return (place_B1 if ids_BV is None else ids_BV.gather(-1, place_B1))[:, 0]


def probabilities(
    kind: Kind, b_BV: torch.Tensor, first_BV: torch.Tensor, second_BV: torch.Tensor, history: History
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights to draw by, and whose they are: None for the ids in order."""
    s_BV = scores(kind, b_BV, first_BV, second_BV, history) / kind.temperature
    if kind.top_k > 0:
        kth_B1 = s_BV.topk(kind.top_k, dim=-1).values[:, -1:]
        s_BV = s_BV.masked_fill(s_BV < kth_B1, -inf)
    if kind.top_p == 1.0:
        return s_BV.softmax(-1), None
    sorted_BV, ids_BV = s_BV.sort(dim=-1, descending=True)
    probs_BV = sorted_BV.softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    return probs_BV.masked_fill(before_BV >= kind.top_p, 0.0), ids_BV


def scores(
    kind: Kind, b_BV: torch.Tensor, first_BV: torch.Tensor, second_BV: torch.Tensor, history: History
) -> torch.Tensor:
    """Combined, filtered and penalised, fp32."""
    b_BV = b_BV.float()
    s_BV = b_BV
    if kind.rule == "subtract":
        near_B1 = b_BV.amax(-1, keepdim=True) + log(TAU)
        kth_B1 = b_BV.topk(min(MIN_KEEP, b_BV.shape[-1]), dim=-1).values[:, -1:]
        s_BV = b_BV - STRENGTH * first_BV.float()
        s_BV = s_BV.masked_fill(b_BV < torch.minimum(near_B1, kth_B1), -inf)
    elif kind.rule == "relu_difference":
        s_BV = _fused(b_BV - STRENGTH * torch.relu(first_BV.float() - b_BV))
    elif kind.rule == "pair_linear":
        log_q_BV, log_p_BV = first_BV.float().log_softmax(-1), second_BV.float().log_softmax(-1)
        s_BV = _fused(b_BV + STRENGTH * (log_q_BV - log_p_BV))
    return _penalized(s_BV, kind, history) if kind.penalises else s_BV


def _fused(s_BV: torch.Tensor) -> torch.Tensor:
    return s_BV.masked_fill(s_BV < s_BV.amax(-1, keepdim=True) + log(FUSED_TAU), -inf)


def _penalized(s_BV: torch.Tensor, kind: Kind, history: History) -> torch.Tensor:
    seen_BL = torch.cat([history.prompt_BL, history.output_BL], dim=1)
    values_BL = s_BV.gather(1, seen_BL)
    values_BL = torch.where(values_BL > 0, values_BL / kind.repetition, values_BL * kind.repetition)
    s_BV = s_BV.scatter(1, seen_BL, values_BL)
    ones_BL = torch.ones_like(history.output_BL, dtype=s_BV.dtype)
    counts_BV = torch.zeros_like(s_BV).scatter_add(1, history.output_BL, ones_BL)
    return s_BV - kind.presence * (counts_BV > 0) - kind.frequency * counts_BV
