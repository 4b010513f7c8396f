"""Scores to tokens: turns wants into rows of the fused op and its output into tokens, log-probabilities and
receipts. The engine's only import of uld_kernels. Knows no text beyond a token's own.

Fails closed: a row whose output does not name exactly the profiles of its request raises, and a row that the
op flags becomes an error of that request; nothing falls back to the target's scores.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch
from uld_kernels import ops, rules
from uld_kernels.rows import SMALLEST_TEMPERATURE, SampleOutput, SampleRow, ScoreOutput, Term

from uld_serve.engine.batch import Want
from uld_serve.engine.plan import Plan
from uld_serve.engine.request import Receipt, TokenLogprob
from uld_serve.engine.sequence import Sequence
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import NumericalError, UldError
from uld_serve.model.head import Scores


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one want: the token drawn or scored, or the error that ends its request."""

    want: Want
    token_id: int
    logprob: TokenLogprob | None
    receipt: Receipt
    error: UldError | None = None


@dataclass(slots=True)
class Sampler:
    tokenizer: Tokenizer
    vocab_size: int
    device: torch.device
    engine_version: str

    def sample(self, wants: Series[Want], scores: Scores) -> list[Outcome]:
        """One outcome a want, in order."""
        draws = [want for want in wants if want.target_id is None]
        given = [want for want in wants if want.target_id is not None]
        outcomes = {id(o.want): o for o in [*self._draw(draws, scores), *self._score(given, scores)]}
        return [outcomes[id(want)] for want in wants]

    def _draw(self, wants: Series[Want], scores: Scores) -> list[Outcome]:
        if not wants:
            return []
        rows = [self._row(want) for want in wants]
        out = ops.fused_sample(
            scores.logits_RW,
            rows,
            vocab_size=self.vocab_size,
            protected_ids=self._protected(),
            late=scores.late,
        )
        return self._outcomes(wants, out, out.token_ids_B.tolist())

    def _score(self, wants: Series[Want], scores: Scores) -> list[Outcome]:
        if not wants:
            return []
        rows = [self._scoring_row(want) for want in wants]
        targets = [want.target_id for want in wants]
        out = ops.fused_score(
            scores.logits_RW,
            rows,
            torch.tensor(targets, device=self.device),
            vocab_size=self.vocab_size,
            protected_ids=self._protected(),
            late=scores.late,
        )
        return self._outcomes(wants, out, [int(target or 0) for target in targets])

    def _outcomes(
        self, wants: Series[Want], out: SampleOutput | ScoreOutput, token_ids: list[int]
    ) -> list[Outcome]:
        logprobs, statuses = out.logprob_B.tolist(), out.status_B.tolist()
        top_ids, top_logprobs = out.top_ids_BN.tolist(), out.top_logprobs_BN.tolist()
        outcomes = []
        for row, want in enumerate(wants):
            receipt = self._receipt(want.sequence.plan, out.digests[row])
            error = _error(statuses[row])
            logprob = None
            if error is None and self._num_logprobs(want) is not None:
                top = zip(top_ids[row], top_logprobs[row], strict=True)
                best = tuple((i, self.tokenizer.token_text(i), value) for i, value in top if i >= 0)
                logprob = self._token_logprob(token_ids[row], logprobs[row], best[: self._num_logprobs(want)])
            outcomes.append(Outcome(want, token_ids[row], logprob, receipt, error))
        return outcomes

    def _token_logprob(
        self, token_id: int, logprob: float, top: tuple[tuple[int, str, float], ...]
    ) -> TokenLogprob:
        text, raw = self.tokenizer.token_text(token_id), self.tokenizer.token_bytes(token_id)
        return TokenLogprob(token_id, text, raw, logprob, top)

    def _receipt(self, plan: Plan, applied: tuple[int, ...]) -> Receipt:
        by_tag = {term.tag: term.entry for term in plan.terms}
        if sorted(applied) != sorted(by_tag):
            raise AssertionError("the scores were combined with other profiles than the request's")
        return Receipt(tuple(entry for tag, entry in by_tag.items()), self.engine_version)

    @staticmethod
    def _num_logprobs(want: Want) -> int | None:
        params = want.sequence.params
        if want.target_id is None:
            return params.logprobs
        return params.prompt_logprobs if params.prompt_logprobs is not None else 0

    def _scoring_row(self, want: Want) -> SampleRow:
        plan = want.sequence.plan
        return SampleRow(
            row_b=want.row,
            terms=_terms(plan, want.stream_rows),
            compose=rules.COMPOSE_CODES[plan.compose],
            position=want.position,
            num_logprobs=self._num_logprobs(want) or 0,
        )

    def _row(self, want: Want) -> SampleRow:
        sequence, params = want.sequence, want.sequence.params
        repeats = params.repetition_penalty != 1.0
        penalises = repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        return SampleRow(
            row_b=want.row,
            terms=_terms(sequence.plan, want.stream_rows),
            compose=rules.COMPOSE_CODES[sequence.plan.compose],
            temperature=params.temperature if params.temperature >= SMALLEST_TEMPERATURE else 0.0,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=sequence.seed,
            position=want.position,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            prompt_ids=self._ids(sequence.prompt_ids) if repeats else None,
            output_ids=self._ids(sequence.output_ids) if penalises else None,
            logit_bias=self._bias(sequence),
            banned_ids=self._banned(sequence),
            num_logprobs=params.logprobs or 0,
            is_measured=params.logprobs is not None,
        )

    def _bias(self, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor] | None:
        bias = sequence.params.logit_bias
        if not bias:
            return None
        return self._ids(list(bias)), torch.tensor(list(bias.values()), device=self.device)

    def _banned(self, sequence: Sequence) -> torch.Tensor | None:
        """Nothing that would end the text is drawn before min_tokens."""
        if len(sequence.output_ids) >= sequence.params.min_tokens:
            return None
        return self._ids(sorted({*self.tokenizer.eos_ids, *sequence.params.stop_token_ids}))

    def _ids(self, token_ids: Series[int]) -> torch.Tensor:
        return torch.tensor(list(token_ids), dtype=torch.long, device=self.device)

    def _protected(self) -> torch.Tensor:
        return self._ids(self.tokenizer.control_ids)


def _terms(plan: Plan, stream_rows: tuple[int, ...]) -> tuple[Term, ...]:
    return tuple(
        Term(
            kind=rules.RULE_CODES[term.kind],
            strength=term.strength,
            digest=term.tag,
            filter_mode=rules.FILTER_CODES[term.filter_mode],
            tau=term.tau,
            min_keep=term.min_keep,
            protect=term.protect,
            rank_k=term.rank_k,
            **{f"row_{role}": stream_rows[stream] for role, stream in term.streams.items()},
        )
        for term in plan.terms
    )


def _error(status: int) -> UldError | None:
    if status == rules.OK:
        return None
    if status == rules.NUMERICAL:
        return NumericalError("a stream's scores are not finite; the request ends here and nothing was drawn")
    return NumericalError("no token is left: bans, filters and rules exclude each other", code="nothing_kept")
