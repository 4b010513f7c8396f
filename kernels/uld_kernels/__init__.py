"""Sampling from combined language-model logits: fused_sample, fused_score and fused_scores, usable from any engine.

`from uld_kernels import fused_sample, SampleRow, Term, rules`."""

from uld_kernels import rules
from uld_kernels.ops import fused_sample, fused_score, fused_scores
from uld_kernels.rows import FusedOutput, LateRows, SampleOutput, SampleRow, ScoreOutput, Term
from uld_kernels.sample_shape import SampleShape
from uld_kernels.static_sampler import StaticSampler
from uld_kernels.workspace import Workspace, WorkspaceTooSmall

__all__ = [
    "FusedOutput",
    "LateRows",
    "SampleOutput",
    "SampleRow",
    "SampleShape",
    "ScoreOutput",
    "StaticSampler",
    "Term",
    "Workspace",
    "WorkspaceTooSmall",
    "fused_sample",
    "fused_score",
    "fused_scores",
    "rules",
]
