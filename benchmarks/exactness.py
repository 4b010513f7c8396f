"""Counts rows whose token or survivors differ from the fp64 combination of the same hidden rows and head. Called by
gpu_sampler.py on a device and by tests/ops/test_exactness.py on a CPU.

Legend: S streams (target, first and second assistant), N rows of each, D model width, V vocabulary, C rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log
from typing import Literal

import torch
from uld_kernels import SampleRow, Term, fused_sample, reference, rules

Rule = Literal["identity", "subtract", "relu_difference", "pair_linear"]
RULES: tuple[Rule, ...] = ("identity", "subtract", "relu_difference", "pair_linear")
TAU, FUSED_TAU, STRENGTH = 0.01, 0.02, 1.5
# Where fp64 itself tells less between two numbers, fp32 may decide either way.
CLOSEST = 1e-4
AT_ONCE = 250
# More than any filter here leaves; a row that keeps more has its survivors counted only.
MOST_LISTED = 1024


@dataclass(frozen=True, slots=True)
class Exactness:
    """`close_*`: rows left out because fp64 finds two tokens, or a token and a threshold, within CLOSEST."""

    what: str
    rows: int
    wrong_tokens: int
    close_tokens: int
    wrong_survivors: int
    close_survivors: int

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and few enough rows were left out for that to mean something."""
        is_wrong = self.wrong_tokens or self.wrong_survivors
        return not is_wrong and self.close_tokens < self.rows // 20 and self.close_survivors < self.rows // 2


def exactness(
    what: str,
    rule: Rule,
    hidden_SND: torch.Tensor,
    weight_VD: torch.Tensor,
    *,
    logits: Callable[[torch.Tensor], torch.Tensor],
    min_keep: int = 256,
) -> Exactness:
    """`logits` is the head under test: hidden rows of the base's dtype to fp32 logits."""
    totals = [0, 0, 0, 0]
    weight_VD64 = weight_VD.double()
    for start in range(0, hidden_SND.shape[1], AT_ONCE):
        part_SCD = hidden_SND[:, start : start + AT_ONCE]
        found = _compared(rule, part_SCD, weight_VD64, logits, min_keep)
        totals = [total + one for total, one in zip(totals, found, strict=True)]
    return Exactness(what, hidden_SND.shape[1], *totals)


def _compared(
    rule: Rule,
    part_SCD: torch.Tensor,
    weight_VD64: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    min_keep: int,
) -> tuple[int, int, int, int]:
    """(wrong tokens, rows with close ones, wrong sets of survivors, rows with tokens close to a threshold)."""
    num_streams, count, width = part_SCD.shape
    vocab_size = weight_VD64.shape[0]
    streams_SCV = (part_SCD.reshape(-1, width).double() @ weight_VD64.T).view(num_streams, count, vocab_size)
    s_CV, margin_C = exact_scores(rule, streams_SCV, min_keep)
    best_C2 = s_CV.topk(2, dim=-1).values
    is_close_C = best_C2[:, 0] - best_C2[:, 1] < CLOSEST
    rows = [_row(rule, number, count, min_keep) for number in range(count)]
    none = torch.tensor([], dtype=torch.int64, device=part_SCD.device)
    out = fused_sample(logits(part_SCD.reshape(-1, width)), rows, vocab_size=vocab_size, protected_ids=none)
    is_wrong_C = (out.token_ids_B != s_CV.argmax(-1)) | (out.status_B != rules.OK)
    is_other_C = _are_others(out.top_ids_BN, out.num_kept_B, s_CV)
    is_near_C = margin_C < CLOSEST
    # A token so near a threshold that rounding decides whether it stays may also be the best of those that stay. Only
    # where it is drawn, or should have been, is a row left out for that.
    distance_CV = _scored(rule, streams_SCV, min_keep)[1]
    chosen_C2 = torch.stack([out.token_ids_B.clamp_min(0), s_CV.argmax(-1)], dim=-1)
    is_close_C |= (distance_CV.gather(1, chosen_C2).abs() < CLOSEST).any(-1)
    is_close_C &= out.status_B == rules.OK
    counts = (is_wrong_C & ~is_close_C, is_close_C, is_other_C & ~is_near_C, is_near_C)
    wrong, close, other, near = (int(one.sum().item()) for one in counts)
    return wrong, close, other, near


def exact_scores(rule: Rule, streams_SCV: torch.Tensor, min_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 scores, -inf where filtered, and how near any token lies to what decides about it, (C,)."""
    s_CV, distance_CV, keep_CV = _scored(rule, streams_SCV, min_keep)
    margin_C = _nearest_other(distance_CV) if rule == "subtract" else distance_CV.abs().amin(-1)
    return s_CV.masked_fill(~keep_CV, -inf), margin_C


def _scored(
    rule: Rule, streams_SCV: torch.Tensor, min_keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores before the filter, how far above its threshold each token lies, and what it keeps."""
    b_CV = streams_SCV[0]
    if rule == "identity":
        return b_CV, torch.full_like(b_CV, inf), torch.ones_like(b_CV, dtype=torch.bool)
    if rule == "subtract":
        s_CV = reference.subtract(b_CV, streams_SCV[1], strength=STRENGTH)
        threshold_C1 = reference.plausibility_threshold(b_CV, tau=TAU, min_keep=min_keep)
        return s_CV, b_CV - threshold_C1, reference.plausibility_keep(b_CV, tau=TAU, min_keep=min_keep)
    if rule == "relu_difference":
        s_CV = reference.relu_difference(b_CV, streams_SCV[1], strength=STRENGTH)
    else:
        log_q_CV, log_p_CV = streams_SCV[1].log_softmax(-1), streams_SCV[2].log_softmax(-1)
        s_CV = reference.pair_linear(b_CV, log_q_CV, log_p_CV, strength=STRENGTH)
    threshold_C1 = s_CV.amax(-1, keepdim=True) + log(FUSED_TAU)
    return s_CV, s_CV - threshold_C1, reference.fused_keep(s_CV, tau=FUSED_TAU)


def _nearest_other(distance_CV: torch.Tensor) -> torch.Tensor:
    """How near a token comes to the threshold. The min_keep-th token may be the threshold itself and stays for certain;
    then it is the next one that could be taken for it."""
    nearest_C2 = distance_CV.abs().topk(2, dim=-1, largest=False).values
    return torch.where(nearest_C2[:, 0] == 0.0, nearest_C2[:, 1], nearest_C2[:, 0])


def _are_others(top_ids_CN: torch.Tensor, num_kept_C: torch.Tensor, s_CV: torch.Tensor) -> torch.Tensor:
    """Whether the survivors are not those of fp64, by row: their number, and which they are where all are listed."""
    kept_CV = s_CV > -inf
    listed_CV = torch.zeros(s_CV.shape[0], s_CV.shape[1] + 1, dtype=torch.bool, device=s_CV.device)
    listed_CV.scatter_(1, torch.where(top_ids_CN >= 0, top_ids_CN, s_CV.shape[1]), True)
    is_whole_C = num_kept_C <= top_ids_CN.shape[1]
    is_other_C = (listed_CV[:, :-1] != kept_CV).any(-1) & is_whole_C
    return is_other_C | (num_kept_C != kept_CV.sum(-1))


def _row(rule: Rule, number: int, count: int, min_keep: int) -> SampleRow:
    first, second = count + number, 2 * count + number
    fused = {"filter_mode": rules.FUSED, "tau": FUSED_TAU}
    terms = {
        "identity": (),
        "subtract": (
            Term(rules.SUBTRACT, STRENGTH, 1, row_a=first, filter_mode=rules.PLAUSIBILITY, tau=TAU, min_keep=min_keep),
        ),
        "relu_difference": (Term(rules.RELU_DIFFERENCE, STRENGTH, 2, row_a=first, **fused),),
        "pair_linear": (Term(rules.PAIR_LINEAR, STRENGTH, 3, row_q=first, row_p=second, **fused),),
    }[rule]  # fmt: skip
    return SampleRow(number, terms, temperature=0.0, num_logprobs=0 if rule == "identity" else MOST_LISTED)


def random_streams(num_rows: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(3, N, D): targets, and two assistants near each, scaled so that a head of unit weights gives logits of
    deviation 3."""
    generator = torch.Generator(device).manual_seed(0)
    hidden_SND = torch.randn(3, num_rows, width, generator=generator, device=device)
    hidden_SND[1:] = 0.9 * hidden_SND[0] + 0.4 * hidden_SND[1:]
    return (hidden_SND * (3.0 / width**0.5)).to(dtype)
