"""Scores to tokens: turns wants into rows of the fused op and its output into tokens, log-probabilities and
receipts. The engine's only import of uld_kernels' ops. Knows no text beyond a token's own.

`launch` gives the device its work and waits for nothing; `collect` waits and looks at what came of it.

Fails closed: a row whose output does not name exactly the profiles of its request raises, and a row that the
op flags becomes an error of that request; nothing falls back to the target's scores.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import torch
from uld_kernels import SampleShape, StaticSampler, Workspace, ops, rules
from uld_kernels.rows import SMALLEST_TEMPERATURE, SampleOutput, SampleRow, ScoreOutput, Term

from uld_serve.engine import measures
from uld_serve.engine.batch import Drawn, Want
from uld_serve.engine.measures import MeasureColumns
from uld_serve.engine.request import Measure, Receipt, TokenLogprob
from uld_serve.engine.sequence import Sequence
from uld_serve.engine.streams import Plan
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.engine.transfer import to_device, to_host
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
    measure: Measure | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """What wants of one kind (all draws, or all given) get, on its way to the host. `logprobs` are of the token, and of
    the best ones by id; None where nobody asked."""

    wants: Series[Want]
    token_ids_B: torch.Tensor
    status_B: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    digests: list[tuple[int, ...]]
    measures: MeasureColumns | None


@dataclass(frozen=True, slots=True)
class InFlight:
    """Tokens being drawn and scored. `drawn` are those on the device, which the next step may read at once; `is_done`
    is when everything has come to the host, None where it has already."""

    wants: Series[Want]
    parts: tuple[_Part, ...]
    drawn: Drawn | None
    is_done: torch.cuda.Event | None


@dataclass(slots=True)
class Sampler:
    tokenizer: Tokenizer
    vocab_size: int
    device: torch.device
    engine_version: str
    late_head_dtype: torch.dtype | None = None
    """Of the head whose rows are scored late; None where all are scored whole."""
    workspace_bytes: int = 0
    """What static samplers share; 0 lets each have its own."""
    measure_every: int = 0
    protected_ids: torch.Tensor = field(init=False)
    _ids_device: torch.device = field(init=False)
    _workspace: Workspace | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Tries the device's kernels, which takes seconds. They take a row's ids from the host, with all else of it."""
        is_proven = ops.prove(self.device, self.vocab_size)
        if self.late_head_dtype is not None:
            ops.prove(self.device, self.vocab_size, head_dtype=self.late_head_dtype)
        if is_proven and self.workspace_bytes:
            self._workspace = Workspace(self.workspace_bytes, self.device)
        self._ids_device = torch.device("cpu") if is_proven else self.device
        control_ids = torch.tensor(list(self.tokenizer.control_ids), dtype=torch.long)
        self.protected_ids = to_device(control_ids, self.device)

    def launch(self, wants: Series[Want], scores: Scores) -> InFlight:
        draws = [want for want in wants if want.target_id is None]
        given = [want for want in wants if want.target_id is not None]
        parts, drawn = [], None
        if draws:
            out = self.draw(self.rows(draws), scores)
            drawn = Drawn(out.token_ids_B, {want.sequence: row for row, want in enumerate(draws)})
            parts.append(self._part(draws, out, to_host(out.token_ids_B)))
        if given:
            parts.append(self._score(given, scores))
        return InFlight(wants, tuple(parts), drawn, self._mark())

    def drawn(self, wants: Series[Want], out: SampleOutput) -> InFlight:
        """The same for wants whose tokens have been drawn already; `out` may be overwritten afterwards."""
        part = self._part(wants, out, to_host(out.token_ids_B))
        drawn = Drawn(out.token_ids_B.clone(), {want.sequence: row for row, want in enumerate(wants)})
        return InFlight(wants, (part,), drawn, self._mark())

    def rows(self, wants: Series[Want], places: Series[int] | None = None) -> list[SampleRow]:
        """What to draw, from scores in their order; or with row r of them in the place `places[r]`."""
        return [self._row(want, places) for want in wants]

    def draw(self, rows: Series[SampleRow], scores: Scores) -> SampleOutput:
        return ops.fused_sample(
            scores.logits_RW,
            rows,
            vocab_size=self.vocab_size,
            protected_ids=self.protected_ids,
            late=scores.late,
        )

    def static(self, shape: SampleShape) -> StaticSampler:
        """One that draws the same from scores that lie in one place. Raises WorkspaceTooSmall.

        All of them share a workspace, so only one may run at a time: steps follow each other on one stream, also one
        that is launched while the one before is in flight, and what the host reads of a step is its sampler's own.
        """
        return StaticSampler(
            shape,
            vocab_size=self.vocab_size,
            protected_ids=self.protected_ids,
            device=self.device,
            workspace=self._workspace,
        )

    def collect(self, in_flight: InFlight) -> list[Outcome]:
        """One outcome a want, in order."""
        if in_flight.is_done is not None:
            in_flight.is_done.synchronize()
        found = [self._outcomes(part) for part in in_flight.parts]
        if len(found) == 1:
            return found[0]
        outcomes = {id(outcome.want): outcome for part in found for outcome in part}
        return [outcomes[id(want)] for want in in_flight.wants]

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type == "cuda":  # pragma: no cover - needs a CUDA device
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        return None

    def _score(self, wants: Series[Want], scores: Scores) -> _Part:
        rows = [self._scoring_row(want) for want in wants]
        targets = torch.tensor([want.target_id for want in wants])
        out = ops.fused_score(
            scores.logits_RW,
            rows,
            to_device(targets, self._ids_device),
            vocab_size=self.vocab_size,
            protected_ids=self.protected_ids,
            late=scores.late,
        )
        return self._part(wants, out, targets)

    def _part(self, wants: Series[Want], out: SampleOutput | ScoreOutput, token_ids_B: torch.Tensor) -> _Part:
        logprobs = None
        if wants[0].target_id is not None or {want.sequence.params.logprobs for want in wants} != {None}:
            logprobs = to_host(out.logprob_B), to_host(out.top_ids_BN), to_host(out.top_logprobs_BN)
        is_due = any(measures.is_due(want, self.measure_every) for want in wants)
        columns = measures.columns(out) if is_due else None
        return _Part(wants, token_ids_B, to_host(out.status_B), logprobs, out.digests, columns)

    def _outcomes(self, part: _Part) -> list[Outcome]:
        statuses, token_ids = part.status_B.tolist(), part.token_ids_B.tolist()
        logprobs = None if part.logprobs is None else [column.tolist() for column in part.logprobs]
        outcomes = []
        for row, want in enumerate(part.wants):
            receipt = self._receipt(want.sequence.plan, part.digests[row])
            error = _error(statuses[row])
            logprob = None
            if error is None and logprobs is not None and self._num_logprobs(want) is not None:
                values, top_ids, top_logprobs = logprobs
                top = zip(top_ids[row], top_logprobs[row], strict=True)
                best = tuple((i, self.tokenizer.token_text(i), value) for i, value in top if i >= 0)
                logprob = self._token_logprob(token_ids[row], values[row], best[: self._num_logprobs(want)])
            is_measured = error is None and measures.is_due(want, self.measure_every)
            measure = part.measures.of(row) if part.measures is not None and is_measured else None
            outcomes.append(Outcome(want, token_ids[row], logprob, receipt, error, measure))
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
            terms=terms_of(plan, want.stream_rows),
            compose=rules.COMPOSE_CODES[plan.compose],
            position=want.position,
            num_logprobs=self._num_logprobs(want) or 0,
        )

    def _row(self, want: Want, places: Series[int] | None) -> SampleRow:
        sequence, params = want.sequence, want.sequence.params
        repeats = params.repetition_penalty != 1.0
        num_drawn, penalises = want.position - len(sequence.prompt_ids), params.penalises
        assert not params.needs_tokens or num_drawn == len(sequence.output_ids), "a draw after tokens unknown"
        row, stream_rows = want.row, want.stream_rows
        if places is not None:
            row, stream_rows = places[row], tuple(places[one] for one in stream_rows)
        return SampleRow(
            row_b=row,
            terms=terms_of(sequence.plan, stream_rows),
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
            banned_ids=self._banned(sequence, num_drawn),
            allowed_mask=self._allowed(sequence),
            num_logprobs=params.logprobs or 0,
            is_measured=params.logprobs is not None or measures.is_due(want, self.measure_every),
        )

    def _bias(self, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor] | None:
        bias = sequence.params.logit_bias
        if not bias:
            return None
        return self._ids(list(bias)), to_device(torch.tensor(list(bias.values())), self._ids_device)

    def _allowed(self, sequence: Sequence) -> torch.Tensor | None:
        if sequence.grammar is None:
            return None
        return to_device(sequence.grammar.allowed(sequence.output_ids), self._ids_device)

    def _banned(self, sequence: Sequence, num_drawn: int) -> torch.Tensor | None:
        """Nothing that would end the text is drawn before min_tokens."""
        if num_drawn >= sequence.params.min_tokens:
            return None
        return self._ids(sorted({*self.tokenizer.eos_ids, *sequence.params.stop_token_ids}))

    def _ids(self, token_ids: Series[int]) -> torch.Tensor:
        return to_device(torch.tensor(list(token_ids), dtype=torch.long), self._ids_device)


def same_draws(found: SampleOutput, expected: SampleOutput) -> bool:
    """Whether the same tokens were drawn, under the same terms. Waits for the device."""
    return (
        found.digests == expected.digests
        and torch.equal(found.token_ids_B, expected.token_ids_B)
        and torch.equal(found.status_B, expected.status_B)
    )


def terms_of(plan: Plan, stream_rows: tuple[int, ...]) -> tuple[Term, ...]:
    """The plan's rules, reading its streams' scores from these rows."""
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
            dead_zone=term.dead_zone,
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
