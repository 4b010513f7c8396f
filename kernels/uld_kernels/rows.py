"""What one draw needs and what it gives: Term, SampleRow, LateRows, SampleOutput, ScoreOutput.

Built by whoever calls ops; read by the torch and Triton samplers. Knows no formula.

Legend: R rows of logits, W their width, A late rows, D model width, V real vocabulary, K chosen tokens, B rows to
draw, N listed alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from uld_kernels import rules
from uld_kernels.listed_products import listed_products

SMALLEST_TEMPERATURE = 1e-5
"""Below it scores / temperature leave fp32's range, and every gap that fp32 can tell is a certainty anyway."""


@dataclass(frozen=True, slots=True)
class Term:
    """One applied profile of one request: a rule, its strength, its filter and the rows it reads.

    `digest` is an opaque tag that comes back in the output, so that a caller can prove what was applied.
    Terms equal in everything but strength and rows are one profile given twice; they count once.
    """

    kind: int
    strength: float
    digest: int
    row_a: int = -1
    """Row of the assistant (subtract, relu_difference)."""
    row_q: int = -1
    """Row of the retain-tuned or tuned stream (pairs)."""
    row_p: int = -1
    """Row of the forget-tuned or reference stream (pairs)."""
    filter_mode: int = rules.NO_FILTER
    tau: float = 0.0
    """Relative threshold of the filter, 0 < tau <= 1."""
    min_keep: int = 0
    """plausibility: so many of the target's best tokens stay whatever tau says."""
    protect: bool = False
    rank_k: int = 0
    """pair_rank: how many tokens are removed."""
    dead_zone: float = 0.0
    """relu_difference: differences of logits up to it count as none."""

    def __post_init__(self) -> None:
        if self.kind in (rules.SUBTRACT, rules.RELU_DIFFERENCE):
            has_rows = self.row_a >= 0
        elif self.kind in (rules.PAIR_LINEAR, rules.PAIR_RANK):
            has_rows = self.row_q >= 0 and self.row_p >= 0
        else:
            raise ValueError(f"unknown rule code {self.kind}; a row with the identity rule has no term")
        if not has_rows:
            raise ValueError(f"rule {self.kind} needs {'row_a' if self.kind <= 2 else 'row_q and row_p'}")
        if not 0.0 < self.strength < inf:
            raise ValueError(f"strength must be positive and finite, got {self.strength}")
        if self.filter_mode not in rules.FILTER_CODES.values():
            raise ValueError(f"unknown filter code {self.filter_mode}")
        if self.filter_mode != rules.NO_FILTER and not 0.0 < self.tau <= 1.0:
            raise ValueError(f"a filter needs 0 < tau <= 1, got {self.tau}")
        if self.filter_mode == rules.PLAUSIBILITY and self.min_keep < 1:
            raise ValueError(f"the plausibility filter needs min_keep >= 1, got {self.min_keep}")
        if not 0.0 <= self.dead_zone < inf:
            raise ValueError(f"dead_zone must be 0 or more and finite, got {self.dead_zone}")
        if self.dead_zone > 0.0 and self.kind != rules.RELU_DIFFERENCE:
            raise ValueError(f"rule {self.kind} needs a dead_zone of 0, got {self.dead_zone}")
        if self.kind == rules.PAIR_RANK and self.rank_k < 1:
            raise ValueError(f"pair_rank needs rank_k >= 1, got {self.rank_k}")

    @property
    def profile_key(self) -> tuple[int | float | bool, ...]:
        """What makes two terms one profile."""
        return (
            self.digest,
            self.kind,
            self.filter_mode,
            self.tau,
            self.min_keep,
            self.protect,
            self.rank_k,
            self.dead_zone,
        )


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw: one request at one position. Default values change nothing."""

    row_b: int
    """Row of the target."""
    terms: tuple[Term, ...] = ()
    compose: int = rules.COMPOSE_MAX
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """64 bits; more are cut off."""
    position: int = 0
    """Position of the drawn token in its sequence, below 2**32."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_ids: torch.Tensor | None = None
    """int64; counts for the repetition penalty only."""
    output_ids: torch.Tensor | None = None
    """int64; counts for all three penalties."""
    logit_bias: tuple[torch.Tensor, torch.Tensor] | None = None
    """(int64 ids without repeats, float values)."""
    banned_ids: torch.Tensor | None = None
    """int64."""
    allowed_mask: torch.Tensor | None = None
    """bool, (V,): what a grammar allows."""
    num_logprobs: int = 0
    """How many most likely tokens to list."""
    is_measured: bool = True
    """Whether anybody reads log-probability, KL, number of kept tokens and whether the argmax changed. Without, and
    without alternatives to list, many rows are drawn at once (on a CPU 10 to 30 times as fast) and those columns say
    nothing of this row."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < inf and 0.0 < self.top_p <= 1.0 and 0.0 <= self.min_p <= 1.0):
            raise ValueError(
                "temperature must be >= 0, top_p in (0, 1], min_p in [0, 1]; "
                f"got {self.temperature}, {self.top_p}, {self.min_p}"
            )
        if 0.0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature {self.temperature} divides scores beyond fp32; use 0 for greedy")
        if not (0.0 < self.repetition_penalty < inf and self.num_logprobs >= 0 and self.row_b >= 0):
            raise ValueError(
                "repetition_penalty must be > 0, num_logprobs and row_b >= 0; "
                f"got {self.repetition_penalty}, {self.num_logprobs}, {self.row_b}"
            )
        if not 0 <= self.position < 2**32:
            raise ValueError(f"position must be in [0, 2**32), got {self.position}")

    @property
    def distinct_terms(self) -> tuple[Term, ...]:
        """The terms in an order that does not depend on how they were given, each profile once.

        Of a profile given twice with two strengths the larger one holds.
        """
        if len(self.terms) < 2:
            return self.terms
        chosen: dict[tuple[int | float | bool, ...], Term] = {}
        # The rows of equal terms hold equal logits; sorting them too keeps the choice independent of order.
        for term in sorted(self.terms, key=lambda t: (t.strength, t.row_a, t.row_q, t.row_p)):
            chosen[term.profile_key] = term
        return tuple(chosen[key] for key in sorted(chosen))


@dataclass(frozen=True, slots=True)
class LateRows:
    """Streams whose logits are computed for the tokens that need them alone. They count as the rows that follow the
    logits: with R rows of logits, row R + i is hidden_AD[i].

    A rule whose filter leaves some hundred tokens then reads so many rows of the head instead of all.
    """

    hidden_AD: torch.Tensor
    weight_WD: torch.Tensor
    bias_W: torch.Tensor | None = None

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for a head that lacks a token: its products would read what lies behind it."""
        parts = [self.weight_WD] if self.bias_W is None else [self.weight_WD, self.bias_W]
        if min(part.shape[0] for part in parts) < vocab_size:
            sizes = [tuple(part.shape) for part in parts]
            raise ValueError(f"late rows of {vocab_size} tokens, a head (and bias) of {sizes}")

    def scores(self, index: int, ids_K: torch.Tensor) -> torch.Tensor:
        """fp32 logits of row `index` on some tokens: scores_each of one row."""
        return self.scores_each(torch.full_like(ids_K, index), ids_K)

    def scores_each(self, index_C: torch.Tensor, ids_C: torch.Tensor) -> torch.Tensor:
        """fp32 logits of row index_C[i] on token ids_C[i]: the same products as the whole head's, each summed by itself
        (listed_products)."""
        return self._finish(listed_products(self.hidden_AD, index_C, self.weight_WD, ids_C), ids_C)

    def all_scores(self) -> torch.Tensor:
        """(A, W) fp32."""
        if self.weight_WD.is_cuda and self.hidden_AD.dtype == self.weight_WD.dtype != torch.float32:
            # Products of halves summed in fp32, and no copy of the head in fp32.
            scores = torch.mm(self.hidden_AD, self.weight_WD.T, out_dtype=torch.float32)
            return self._finish(scores, None)
        return self._finish(self.hidden_AD.float() @ self.weight_WD.float().T, None)

    def _finish(self, scores: torch.Tensor, ids_K: torch.Tensor | None) -> torch.Tensor:
        if self.bias_W is None:
            return scores
        return scores + (self.bias_W if ids_K is None else self.bias_W[ids_K]).float()


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """B drawn tokens. All log-probabilities are of the fused scores, before penalties and temperature.

    A row with a status other than OK has token -1, logprob -inf and no listed alternatives. Of a row that is not
    measured only token, status and digests mean anything.
    """

    token_ids_B: torch.Tensor
    """int64."""
    logprob_B: torch.Tensor
    """fp32, of the drawn token."""
    top_ids_BN: torch.Tensor
    """int64, most likely first, padded with -1."""
    top_logprobs_BN: torch.Tensor
    """fp32, padded with -inf."""
    status_B: torch.Tensor
    """int32: rules.OK, NUMERICAL or NOTHING_KEPT."""
    num_kept_B: torch.Tensor
    """int64: tokens that filters, bans and rules left; before top-k, top-p and min-p."""
    kl_B: torch.Tensor
    """fp32: KL(fused || target) in nats."""
    argmax_changed_B: torch.Tensor
    """bool: the most likely token is no longer the target's."""
    digests: list[tuple[int, ...]]
    """Which terms were applied, in the order of SampleRow.distinct_terms."""


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Fused log-probabilities of B given tokens."""

    logprob_B: torch.Tensor
    """fp32; -inf for a token that was filtered or banned."""
    rank_B: torch.Tensor
    """int64: 1 + number of tokens with a higher score; 0 where status is not OK."""
    top_ids_BN: torch.Tensor
    top_logprobs_BN: torch.Tensor
    status_B: torch.Tensor
    num_kept_B: torch.Tensor
    kl_B: torch.Tensor
    argmax_changed_B: torch.Tensor
    digests: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FusedOutput:
    """Fused scores of B rows, for engines that have a sampler of their own."""

    scores_BV: torch.Tensor
    """fp32; -inf where a token was filtered, banned or removed, and everywhere in a row whose status is not OK."""
    status_B: torch.Tensor
    """int32: rules.OK, NUMERICAL or NOTHING_KEPT."""
    digests: list[tuple[int, ...]]
    """As in SampleOutput."""
