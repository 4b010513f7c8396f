"""The engine: requests in, deltas out, one step at a time. Called by AsyncEngine's thread and by LLM. Knows no
HTTP. A step is schedule, run, sample, finish; detail is below it.

With `overlap` the device has its next step before the host has looked at the last one: nothing that was drawn changes,
and what turns out to be for a request that has ended is thrown away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace

import uld_serve
from uld_serve.config import EngineConfig, EngineSettings
from uld_serve.engine.admission import Admission
from uld_serve.engine.block_pool import BlockPool
from uld_serve.engine.cuda_graphs import CudaRecorder, GraphedRunner
from uld_serve.engine.grammar import Grammars
from uld_serve.engine.leading import LeadingBank, LeadingRunner
from uld_serve.engine.memory import runner_of
from uld_serve.engine.plan import OWN_POOL, TARGET_POOL, Bank, Decision, Planner, ProfileVersion
from uld_serve.engine.pools import Pools
from uld_serve.engine.provision import Provision
from uld_serve.engine.ranks import Begin, Ranks
from uld_serve.engine.request import Delta, FinishReason, Load, Receipt, SamplingParams, TokenLogprob
from uld_serve.engine.runner import Runner
from uld_serve.engine.sampler import Outcome, Sampler
from uld_serve.engine.scheduler import Scheduler
from uld_serve.engine.sequence import Scheduled, Sequence
from uld_serve.engine.step import Result, Step, Steps, as_uld_error
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import InvalidRequest, Overloaded, UldError
from uld_serve.model.loading import Base

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Engine:
    """One base model, many requests, each with its own profiles. Not thread-safe: one thread calls it."""

    base: Base
    config: EngineConfig
    tokenizer: Tokenizer
    grammars: Grammars
    planner: Planner
    pools: Pools
    scheduler: Scheduler
    runner: Runner
    sampler: Sampler
    sequences: dict[str, Sequence] = field(default_factory=dict)
    ahead: Step | None = None

    @classmethod
    def of(cls, base: Base, settings: EngineSettings | None = None, ranks: Ranks | None = None) -> Engine:
        """With `ranks`, those who share the base: rank 0's, of which the others hear in `follow`.

        Raises ModelUnsupported when the base's layers do not compute what the base computes."""
        runner, config = runner_of(base, settings or EngineSettings(), ranks)
        decoder = runner.decoder
        bank: Bank = decoder.bank
        if config.cuda_graphs:
            record = CudaRecorder(base.device)
            runner = GraphedRunner.around(runner, record, max_rows=config.max_num_seqs)
        if ranks is not None:
            ranks.tell(Begin(base.fingerprint, config))
            runner, bank = LeadingRunner.around(runner, ranks), LeadingBank(decoder.bank, ranks)
        pools = Pools({TARGET_POOL: BlockPool(config.num_blocks, config.block_size)})
        tokenizer = Tokenizer(base.tokenizer, vocab_size=base.vocab_size, eos_ids=base.eos_ids)
        return cls(
            base=base,
            config=config,
            tokenizer=tokenizer,
            grammars=Grammars(tokenizer),
            planner=Planner(bank, defers_logits=config.late_head),
            pools=pools,
            scheduler=Scheduler(config, pools),
            runner=runner,
            sampler=Sampler(
                tokenizer,
                base.vocab_size,
                base.device,
                uld_serve.__version__,
                late_head_dtype=decoder.head.weight_WD.dtype if config.late_head else None,
                workspace_bytes=config.sampler_bytes,
                measure_every=config.measure_every,
            ),
        )

    def prepare(self, versions: Series[ProfileVersion], models: Mapping[str, Base] | None = None) -> None:
        """Make room for what these profiles need beyond the base: their own keys and values, separate models (given
        loaded, by fingerprint). Profiles that borrow need nothing. What it raises: `Provision.make`."""
        lanes = [lane for sequence in self.sequences.values() for lane in sequence.lanes]
        has_own = any(lane.pool == OWN_POOL for lane in lanes)
        provision = Provision(self.base, self.config, self.planner, self.pools, self.runner, has_own)
        provision.make(versions, models or {})

    @property
    def _admission(self) -> Admission:
        return Admission(self.config, self.tokenizer, self.planner, self.pools, self.grammars)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def load(self) -> Load:
        """Only counts are read, so any thread may ask."""
        scheduler, usage = self.scheduler, self.pools.target.usage
        return Load(len(scheduler.running), len(scheduler.waiting), usage, scheduler.num_preemptions)

    def validate(self, prompt_ids: list[int], params: SamplingParams, *, cache_salt: str = "") -> None:
        """Admission.validate, for any thread."""
        self._admission.validate(prompt_ids, params, cache_salt=cache_salt)

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        decision: Decision,
        *,
        tenant: str = "",
        cache_salt: str = "",
    ) -> None:
        """Queue a request. It shares cached prefixes with requests of its salt only; tenants take turns.

        Raises InvalidRequest, PromptTooLong, Overloaded or ProfileError; then nothing is held.
        """
        self.validate(prompt_ids, params, cache_salt=cache_salt)
        if self.num_waiting >= self.config.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests are waiting; try again later")
        if request_id in self.sequences:
            raise InvalidRequest(f"request id {request_id!r} is in use")
        sequence = self._admission.sequence(
            request_id, prompt_ids, params, decision, tenant=tenant, cache_salt=cache_salt
        )
        self.sequences[request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free all it holds; None if it has ended already."""
        sequence = self.sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, "abort", text="")

    def step(self) -> list[Delta]:
        """Run one step; every delta that it made."""
        step = self._launched_ahead() or self._steps.launch(self.scheduler.schedule())
        self.ahead = self._go_ahead(step)
        result = self._collect(step)
        return self._take_in(step, result)

    @property
    def _steps(self) -> Steps:
        return Steps(self.runner, self.sampler, self.pools)

    def _launched_ahead(self) -> Step | None:
        """The step that was launched while the one before was in flight, if anybody still waits for it."""
        return self.ahead if self.ahead is not None and self.ahead.is_live else None

    def _go_ahead(self, step: Step) -> Step | None:
        """Launch the step after `step`, which is in flight, as if nobody ended in it."""
        if not self.config.overlap or isinstance(step.in_flight, Exception):
            return None
        scheduled = self.scheduler.schedule_ahead()
        ahead = self._steps.launch_ahead(scheduled, step) if scheduled else None
        if ahead is None:
            self.scheduler.take_back(scheduled)
        return ahead

    def _collect(self, step: Step) -> Result:
        """What a step gave. When that raises, what went ahead of it is forgotten and it is run again in parts."""
        found = self._steps.collect(step)
        if isinstance(found, Result):
            return found
        if self.ahead is not None:
            self.scheduler.take_back(self.ahead.scheduled)
            self.ahead = None
        return self._steps.rerun(step, found)

    def _take_in(self, step: Step, result: Result) -> list[Delta]:
        """The deltas of those who still wait for what the step gave."""
        deltas = [self._fail(item.sequence, error) for item, error in result.failed]
        by_sequence: dict[Sequence, list[Outcome]] = {item.sequence: [] for item in step.scheduled}
        for outcome in result.outcomes:
            by_sequence[outcome.want.sequence].append(outcome)
        for item in step.scheduled:
            if item.is_live:
                deltas += self._take_in_one(item, by_sequence[item.sequence])
        return deltas

    def check_integrity(self) -> None:
        """Blocks, adapters and sequences add up; tests call it after every step."""
        self.scheduler.check_integrity()
        held = [*self.scheduler.running, *self.scheduler.waiting]
        assert {id(s) for s in held} == {id(s) for s in self.sequences.values()}, "a sequence is lost"
        seats = sum(len(s.plan.seats) for s in self.sequences.values())
        assert self.planner.num_users == seats, "an adapter is held by nobody or not held"

    def _take_in_one(self, item: Scheduled, outcomes: list[Outcome]) -> list[Delta]:
        try:
            return self._advance(item, outcomes)
        except Exception as error:  # whatever it is, it must end one request and no other
            if item.sequence.request_id not in self.sequences:
                raise  # it came while ending the request: what is held is not known any more
            logger.exception("request %s failed", item.sequence.request_id)
            return [self._fail(item.sequence, as_uld_error(error))]

    def _advance(self, item: Scheduled, outcomes: list[Outcome]) -> list[Delta]:
        """Take in what one sequence's rows gave."""
        sequence = item.sequence
        self.scheduler.advance(item)
        for outcome in outcomes:
            if outcome.error is not None:
                return [self._fail(sequence, outcome.error)]
            if outcome.want.target_id is not None:
                sequence.prompt_scores.append(outcome.logprob)
            sequence.receipt = _whole_receipt(sequence, outcome)
        if outcomes and outcomes[-1].want.target_id is None and sequence.params.max_tokens > 0:
            return [self._accept(sequence, outcomes[-1])]
        if sequence.params.max_tokens == 0 and sequence.num_computed == sequence.num_tokens:
            return [self._finish(sequence, "length", text="")]
        return []

    def _accept(self, sequence: Sequence, outcome: Outcome) -> Delta:
        """One drawn token: its text, and whether the request is done."""
        params, token_id = sequence.params, outcome.token_id
        sequence.output_ids.append(token_id)
        sequence.drew_at = sequence.drew_at or time.monotonic_ns()
        may_stop = len(sequence.output_ids) >= params.min_tokens
        is_eos = token_id in self.tokenizer.eos_ids and not params.ignore_eos
        text = sequence.detokenizer.push(token_id, may_stop=may_stop)
        if may_stop and (is_eos or token_id in params.stop_token_ids or sequence.detokenizer.is_stopped):
            return self._finish(sequence, "stop", text=text, outcome=outcome)
        if sequence.is_full():
            return self._finish(sequence, "length", text=text, outcome=outcome)
        return Delta(
            request_id=sequence.request_id,
            text=text,
            token_ids=(token_id,),
            logprobs=None if outcome.logprob is None else (outcome.logprob,),
            prompt_logprobs=_prompt_logprobs(sequence, after=outcome),
            receipt=sequence.receipt if len(sequence.output_ids) == 1 else None,
            measure=outcome.measure,
        )

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        text: str,
        outcome: Outcome | None = None,
        error: UldError | None = None,
    ) -> Delta:
        """The one end of a request: gives everything back and makes its last delta. Text that was held back is for
        requests that end as they should; what fails in giving it out fails before anything is given back."""
        held_back = sequence.detokenizer.flush() if reason in ("stop", "length") else ""
        del self.sequences[sequence.request_id]
        self.scheduler.remove(
            sequence, is_suspect=reason not in ("stop", "length"), has_failed=reason == "error"
        )
        self.planner.release(sequence.plan)
        return Delta(
            request_id=sequence.request_id,
            text=text + held_back,
            token_ids=() if outcome is None else (outcome.token_id,),
            logprobs=None if outcome is None or outcome.logprob is None else (outcome.logprob,),
            prompt_logprobs=_prompt_logprobs(sequence, after=outcome),
            finish_reason=reason,
            error=error,
            receipt=sequence.receipt,
            usage=sequence.usage,
            measure=None if outcome is None else outcome.measure,
            timing=sequence.timing,
        )

    def _fail(self, sequence: Sequence, error: UldError) -> Delta:
        return self._finish(sequence, "error", text="", error=error)


def _prompt_logprobs(sequence: Sequence, *, after: Outcome | None) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's scores, for the first delta of a request only: the one of its first drawn token, or its
    last when it draws none."""
    is_first = len(sequence.output_ids) == (0 if after is None else 1)
    return tuple(sequence.prompt_scores) if is_first and sequence.params.prompt_logprobs is not None else None


def _whole_receipt(sequence: Sequence, outcome: Outcome) -> Receipt:
    """What was combined, and the profiles that need no combining: their adapter is in the target's own rows, which
    the decoder has checked."""
    silent = sequence.plan.silent
    return (
        replace(outcome.receipt, profiles=(*silent, *outcome.receipt.profiles)) if silent else outcome.receipt
    )
