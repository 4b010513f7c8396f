"""Times the head with what comes after it: drawing from combined logits over an argmax of the target's own (G2), and
assistants' logits whole or late. Called by gpu_sampler.py; on a CPU the same calls run in plain torch.

Legend: R rows of hidden values, B rows to draw, C tokens of a list, D model width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from exactness import random_streams
from gpu_kernels import median_us
from torch import nn
from uld_kernels import LateRows, SampleRow, SampleShape, StaticSampler

from uld_serve.bench.sampler_kinds import KINDS, History
from uld_serve.model.head import Head

# Tokens of a list: what the plausibility filter leaves at least, and some more.
LISTED = 300


@dataclass(frozen=True, slots=True)
class HeadTime:
    """`extra_us`: of two rows of hidden values a request, combined and drawn, over one row and its best token."""

    rows: str
    batch: int
    us: float
    argmax_us: float
    extra_us: float


@dataclass(frozen=True, slots=True)
class LateTime:
    """`whole_us`: what assistants' rows add to the head's product; `late_us`: their logits on LISTED tokens each."""

    batch: int
    whole_us: float
    late_us: float


def head_times(
    device: torch.device, dtype: torch.dtype, *, vocab: int, width: int, batches: Sequence[int]
) -> list[HeadTime]:
    head, times = random_head(vocab, width, device, dtype), []
    for batch in batches:
        hidden_RD = random_streams(batch, width, device, dtype)[:2].reshape(2 * batch, width)
        history = History.random(batch, vocab, device)
        argmax_us = median_us(
            [lambda hidden_RD=hidden_RD, B=batch: head.logits(hidden_RD[:B]).argmax(-1)], device
        )
        for name in ("subtract", "relu_difference"):
            rows = [KINDS[name].row(number, batch, history) for number in range(batch)]
            us = median_us([_head_and_draw(head, hidden_RD, rows)], device)
            times.append(HeadTime(name, batch, us, argmax_us, us - argmax_us))
    return times


def _head_and_draw(head: Head, hidden_RD: torch.Tensor, rows: Sequence[SampleRow]) -> Callable[[], object]:
    vocab, device = head.weight_WD.shape[0], hidden_RD.device
    shape = SampleShape.of(rows, num_rows=len(rows))
    static = StaticSampler(
        shape,
        vocab_size=vocab,
        protected_ids=torch.tensor([], dtype=torch.int64, device=device),
        device=device,
    )
    static.fill(rows)
    return lambda: static.run(head.logits(hidden_RD))


def late_times(
    device: torch.device, dtype: torch.dtype, *, vocab: int, width: int, batches: Sequence[int]
) -> list[LateTime]:
    """Where scoring the assistants on what a filter leaves would overtake scoring them whole."""
    head, times = random_head(vocab, width, device, dtype), []
    for batch in batches:
        hidden_RD = random_streams(batch, width, device, dtype)[:2].reshape(2 * batch, width)
        late = head.late(hidden_RD[batch:])
        ids_BC = torch.randint(vocab, (batch, LISTED), device=device)
        both_us = median_us([lambda hidden_RD=hidden_RD: head.logits(hidden_RD)], device)
        alone_us = median_us([lambda hidden_RD=hidden_RD, B=batch: head.logits(hidden_RD[:B])], device)
        times.append(LateTime(batch, both_us - alone_us, median_us([_listed_call(late, ids_BC)], device)))
    return times


def _listed_call(late: LateRows, ids_BC: torch.Tensor) -> Callable[[], object]:
    batch, device = ids_BC.shape[0], ids_BC.device
    if device.type != "cuda":
        rows_C, ids_C = torch.arange(batch).repeat_interleave(LISTED), ids_BC.flatten()
        return lambda: late.scores_each(rows_C, ids_C)
    from uld_kernels.late_triton import score_listed

    lists_BC, counts_B = ids_BC.int(), torch.full((batch,), LISTED, dtype=torch.int32, device=device)
    index_BM = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    out_BMC = torch.empty(batch, 1, LISTED, device=device)
    return lambda: score_listed(late, lists_BC, counts_B, index_BM, out_BMC=out_BMC)


def random_head(vocab: int, width: int, device: torch.device, dtype: torch.dtype) -> Head:
    """Of unit weights."""
    generator = torch.Generator(device).manual_seed(1)
    linear = nn.Linear(width, vocab, bias=False, device="meta")
    weight_VD = torch.randn(vocab, width, generator=generator, device=device).to(dtype)
    linear.weight = nn.Parameter(weight_VD, requires_grad=False)
    return Head.of(linear, is_packed=device.type == "cpu")
