"""The served rule in plain torch, to say at the end of a run what the assistant does and to record replay probes.
Called by run. `uld-serve profiles verify` measures the same through the engine; knows no files.

Shapes: B prompts, Q positions, N answer tokens, V real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache
from uld_kernels import reference

from uld_serve.model.borrowed import assistant_pass, causal_mask, target_pass
from uld_serve.model.loading import Base, control_ids
from uld_serve.profiles.profile import RuleSpec
from uld_serve.training.assistant import Assistant
from uld_serve.training.states import IGNORED, Batch, Observed, collate

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """NLL a token of given answers, in nats; `nll_fused` without a fused filter, `nll_served` with it.

    `agreement`: share of positions where base and rule have the same most likely token. `removed`: share of
    answer tokens that the filter makes impossible.
    """

    tokens: int
    nll_base: float
    nll_fused: float
    nll_served: float
    agreement: float
    removed: float

    @property
    def rise(self) -> float:
        return self.nll_fused - self.nll_base

    def rounded(self) -> dict[str, float | int | None]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: round(v, 4) if v != float("inf") else None for name, v in values.items()}


def protected_ids(base: Base) -> torch.Tensor:
    """The tokens that the engine protects."""
    return torch.tensor(control_ids(base.tokenizer, base.eos_ids), dtype=torch.long, device=base.device)


def combine(
    b_NV: torch.Tensor, a_NV: torch.Tensor, rule: RuleSpec, *, protected_ids: torch.Tensor, fused_filter: bool
) -> torch.Tensor:
    """The rule's scores of fp32 logits; -inf where filtered. `fused_filter` False leaves that filter out."""
    tau = rule.filter.tau
    if rule.kind == "subtract":
        scores = reference.subtract(b_NV, a_NV, strength=rule.strength)
    else:
        scores = reference.relu_difference(b_NV, a_NV, strength=rule.strength)
    if rule.filter.mode == "plausibility":
        keep = reference.plausibility_keep(b_NV, tau=tau, min_keep=rule.filter.min_keep)
        scores = scores.masked_fill(~keep, float("-inf"))
    if rule.filter.mode == "fused" and fused_filter:
        scores = scores.masked_fill(~reference.fused_keep(scores, tau=tau), float("-inf"))
    return reference.protect(scores, b_NV, protected_ids) if rule.protect else scores


@torch.inference_mode()
def likelihood(
    assistant: Assistant, observed: Sequence[Observed], rule: RuleSpec, *, protected_ids: torch.Tensor
) -> Likelihood:
    """Teacher-forced over the answers in `observed`."""
    base: list[torch.Tensor] = []
    fused: list[torch.Tensor] = []
    served: list[torch.Tensor] = []
    same: list[torch.Tensor] = []
    for start in range(0, len(observed), BATCH_SIZE):
        batch = _to(assistant.model.device, collate(observed[start : start + BATCH_SIZE]))
        is_token_BQ = batch["labels_BQ"] != IGNORED
        labels_N1 = batch["labels_BQ"][is_token_BQ][:, None]
        b_NV = assistant.logits(batch["final_BQD"][is_token_BQ])
        a_NV = assistant.logits(assistant.hidden(batch))
        open_NV = combine(b_NV, a_NV, rule, protected_ids=protected_ids, fused_filter=False)
        closed_NV = combine(b_NV, a_NV, rule, protected_ids=protected_ids, fused_filter=True)
        for scores, found in ((b_NV, base), (open_NV, fused), (closed_NV, served)):
            found.append(-scores.log_softmax(-1).gather(-1, labels_N1)[:, 0])
        same.append((closed_NV.argmax(-1) == b_NV.argmax(-1)).float())
    removed_N = torch.cat(served).isinf()
    return Likelihood(
        tokens=removed_N.shape[0],
        nll_base=torch.cat(base).mean().item(),
        nll_fused=torch.cat(fused).mean().item(),
        nll_served=torch.cat(served).mean().item(),
        agreement=torch.cat(same).mean().item(),
        removed=removed_N.float().mean().item(),
    )


def _to(device: torch.device, batch: Batch) -> Batch:
    return cast(Batch, {name: cast(torch.Tensor, value).to(device) for name, value in batch.items()})


@torch.inference_mode()
def generate(
    assistant: Assistant,
    prompts: Sequence[Sequence[int]],
    rule: RuleSpec,
    *,
    protected_ids: torch.Tensor,
    end_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """One answer to each prompt under the rule, with its end token where it ended."""
    answers: list[list[int]] = []
    device = assistant.model.device
    generator = torch.Generator(device).manual_seed(seed)
    end_ids_E = torch.tensor(end_ids, dtype=torch.long, device=device)
    for start in range(0, len(prompts), BATCH_SIZE):
        decoding = _Decoding(assistant, prompts[start : start + BATCH_SIZE], pad=end_ids[0] if end_ids else 0)
        unfinished = torch.ones(len(decoding.answers), dtype=torch.bool, device=device)
        for _ in range(max_tokens):
            b_BV, a_BV = decoding.logits()
            scores = combine(b_BV, a_BV, rule, protected_ids=protected_ids, fused_filter=True)
            if temperature > 0:
                token_B = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                token_B = scores.argmax(-1)
            decoding.append(token_B, unfinished)
            unfinished &= ~torch.isin(token_B, end_ids_E)
            if not unfinished.any():
                break
        answers += decoding.answers
    return answers


class _Decoding:
    """A batch on its way: the target's cache, and the assistant at the last position of each prompt."""

    def __init__(self, assistant: Assistant, prompts: Sequence[Sequence[int]], *, pad: int) -> None:
        self._assistant = assistant
        width = max(len(prompt) for prompt in prompts)
        device = assistant.model.device
        self._ids_BQ = torch.tensor(
            [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        self._is_real_BT = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        self._positions_BQ = (self._is_real_BT.cumsum(-1) - 1).clamp_min(0)
        self._cache = DynamicCache(config=assistant.model.config)
        self.answers: list[list[int]] = [[] for _ in prompts]

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(target, assistant) logits of the next token, (B, V)."""
        layers = self._assistant.layers
        with self._assistant.peft.disable_adapter():
            states = target_pass(
                self._assistant.model,
                self._ids_BQ,
                positions_BQ=self._positions_BQ,
                mask_B1QT=causal_mask(self._is_real_BT, self._positions_BQ),
                fork=layers.start,
                exit=layers.stop,
                cache=self._cache,
            )
        last_B1 = self._positions_BQ[:, -1:]
        out_B1D = assistant_pass(
            self._assistant.model,
            states.fork_BQD[:, -1:],
            states.keys_values,
            positions_BQ=last_B1,
            mask_B1QT=causal_mask(self._is_real_BT, last_B1),
            layers=layers,
        )
        return self._assistant.logits(states.final_BQD[:, -1]), self._assistant.logits(out_B1D[:, -1])

    def append(self, token_B: torch.Tensor, unfinished_B: torch.Tensor) -> None:
        for answer, token, is_unfinished in zip(
            self.answers, token_B.tolist(), unfinished_B.tolist(), strict=True
        ):
            if is_unfinished:
                answer.append(token)
        self._ids_BQ = token_B[:, None]
        self._positions_BQ = self._positions_BQ[:, -1:] + 1
        self._is_real_BT = torch.cat([self._is_real_BT, torch.ones_like(self._ids_BQ)], dim=1)
