"""Refuses, when a request comes, what vLLM would do to the fused logits too late: bans and grammars belong before the
filters, and behind them could leave no token at all. Changes no logit. vLLM's two model runners have an interface each
for logits processors; this answers both."""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SecondLogitsProcessor

from uld_serve.vllm_plugin.bans import banned_by


class ForgettingGuard(LogitsProcessor, SecondLogitsProcessor):  # type: ignore[misc]
    def __init__(self, *_: object) -> None:
        """Keeps nothing of what vLLM gives."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        banned = banned_by(sampling_params)
        if banned:
            raise ValueError(
                f"{', '.join(banned)} cannot be combined with profiles here: it would act behind their filters and "
                "might leave no token; uld-serve's own server applies it before them"
            )

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: object) -> None:
        """There is none."""

    def apply(self, logits: torch.Tensor, *_: object) -> torch.Tensor:
        return logits
