"""Which drawn tokens are measured for the metrics, and what the fused op says of them, on the host. Called by the
sampler. Whether a token is measured hangs on its place in the answer alone, and changes no draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from uld_kernels.rows import SampleOutput, ScoreOutput

from uld_serve.engine.batch import Want
from uld_serve.engine.request import Measure
from uld_serve.engine.transfer import to_host


@dataclass(frozen=True, slots=True)
class MeasureColumns:
    """Of B rows, on their way to the host."""

    kl_B: torch.Tensor
    num_kept_B: torch.Tensor
    argmax_changed_B: torch.Tensor

    def of(self, row: int) -> Measure:
        return Measure(
            self.kl_B[row].item(), int(self.num_kept_B[row].item()), bool(self.argmax_changed_B[row].item())
        )


def is_due(want: Want, every: int) -> bool:
    """Of requests whose scores some rule combines: the first drawn token, and every one so many further on."""
    if not every or want.target_id is not None or not want.sequence.plan.terms:
        return False
    return (want.position - len(want.sequence.prompt_ids)) % every == 0


def columns(out: SampleOutput | ScoreOutput) -> MeasureColumns:
    return MeasureColumns(to_host(out.kl_B), to_host(out.num_kept_B), to_host(out.argmax_changed_B))
