"""The kinds of rows that `bench sampler` draws: what each asks of the fused op, and logits to draw from. Called by
sampler and sampler_chain. Knows no clock.

Legend: B rows to draw, V vocabulary, L tokens of history, N buffers in rotation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
from uld_kernels import SampleRow, Term, rules

TAU, MIN_KEEP, FUSED_TAU, STRENGTH = 0.01, 256, 0.02, 1.0
NUM_STREAMS = 3
"""Rows of logits a draw has at hand: the target and two assistants. Kinds read as many as they need."""
HISTORY = 256
# Together larger than any GPU's L2 cache and any CPU's last cache that we know of, so that no draw finds its target.
ROTATED_BYTES = 2**27
_FRESH_VALUES = 2**24

Rule = Literal["none", "subtract", "relu_difference", "pair_linear"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What one row asks for. `num_tensors`: rows of logits that must be read, the target's included."""

    name: str
    rule: Rule = "none"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def num_tensors(self) -> int:
        return {"none": 1, "subtract": 2, "relu_difference": 2, "pair_linear": 3}[self.rule]

    @property
    def penalises(self) -> bool:
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)

    def row(self, number: int, batch: int, history: History) -> SampleRow:
        """Row `number` of a batch whose targets come first, then all first assistants, then all second ones."""
        return SampleRow(
            row_b=number,
            terms=self._terms(batch + number, 2 * batch + number),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=number,
            position=HISTORY,
            repetition_penalty=self.repetition,
            presence_penalty=self.presence,
            frequency_penalty=self.frequency,
            prompt_ids=history.prompt_BL[number] if self.penalises else None,
            output_ids=history.output_BL[number] if self.penalises else None,
            is_measured=False,
        )

    def _terms(self, first: int, second: int) -> tuple[Term, ...]:
        if self.rule == "none":
            return ()
        if self.rule == "subtract":
            plausible = replace(_FUSED, filter_mode=rules.PLAUSIBILITY, tau=TAU, min_keep=MIN_KEEP)
            return (replace(plausible, kind=rules.SUBTRACT, row_a=first),)
        if self.rule == "relu_difference":
            return (replace(_FUSED, row_a=first),)
        return (replace(_FUSED, kind=rules.PAIR_LINEAR, row_q=first, row_p=second),)


_FUSED = Term(rules.RELU_DIFFERENCE, STRENGTH, digest=1, row_a=1, filter_mode=rules.FUSED, tau=FUSED_TAU)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("greedy", temperature=0.0),
        Kind("draw"),
        Kind("subtract", rule="subtract", top_p=0.95),
        Kind("relu_difference", rule="relu_difference", top_p=0.95),
        Kind("pair_linear", rule="pair_linear", top_p=0.95),
        Kind("top-k-top-p", temperature=0.8, top_k=50, top_p=0.95),
        Kind("penalties", temperature=0.8, top_p=0.95, repetition=1.1, presence=0.2, frequency=0.1),
    )
}
MIXED = "mixed"
ROW_KINDS = (*KINDS, MIXED)
ROW_HELP = (
    "greedy; draw: free, from the whole vocabulary; subtract: with the plausibility filter; relu_difference and "
    "pair_linear: with the fused one; these three, and those below, with top-p; top-k-top-p; penalties: repetition, "
    "presence and frequency; mixed: all of them in turn in one batch"
)


def kinds_of_batch(name: str, batch: int) -> list[Kind]:
    """One a row."""
    named = list(KINDS.values()) if name == MIXED else [KINDS[name]]
    return [named[number % len(named)] for number in range(batch)]


def floor_bytes(kinds: list[Kind], vocab_size: int, itemsize: int) -> int:
    """Every row of logits that a draw depends on, read once."""
    return sum(kind.num_tensors for kind in kinds) * vocab_size * itemsize


@dataclass(frozen=True, slots=True)
class History:
    """int64 (B, L) each."""

    prompt_BL: torch.Tensor
    output_BL: torch.Tensor

    @classmethod
    def random(cls, batch: int, vocab_size: int, device: torch.device) -> History:
        shape = (2, batch, HISTORY)
        prompt_BL, output_BL = torch.randint(vocab_size, shape, generator=_generator(device), device=device)
        return cls(prompt_BL, output_BL)


def rotated_logits(
    batch: int, vocab_size: int, dtype: torch.dtype, device: torch.device, *, at_most: int | None = None
) -> torch.Tensor:
    """(N, NUM_STREAMS * B, V). Targets whose probabilities fall with the 1.5th power of their rank, in random order: 22
    tokens lie within tau = 0.01 of the best, as in the mean of a small model's (16 to 38); assistants are a target and
    noise of deviation 1."""
    count = ceil(ROTATED_BYTES / (batch * vocab_size * dtype.itemsize))
    count = count if at_most is None else max(1, min(count, at_most))
    values = count * batch * vocab_size
    generator = _generator(device)
    fresh = torch.rand(min(values, _FRESH_VALUES), generator=generator, device=device)
    target = fresh.mul_(vocab_size).log1p_().mul_(-1.5)
    pool_NSBV = torch.empty((count, NUM_STREAMS, batch, vocab_size), dtype=dtype, device=device)
    for stream in range(NUM_STREAMS):
        noise = torch.randn(target.shape, generator=generator, device=device) if stream > 0 else 0.0
        tiled = (target + noise).to(dtype).repeat(ceil(values / target.numel()))
        pool_NSBV[:, stream] = tiled[:values].view(count, batch, vocab_size)
    return pool_NSBV.view(count, NUM_STREAMS * batch, vocab_size)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
