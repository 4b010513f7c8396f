"""The engine's state of one request: tokens so far, blocks held, how much is computed and how much is in flight. Knows
no tensor."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from uld_serve.engine.block_pool import BlockKeys
from uld_serve.engine.detokenizer import Detokenizer
from uld_serve.engine.grammar import GrammarState
from uld_serve.engine.request import Receipt, SamplingParams, Timing, TokenLogprob, Usage
from uld_serve.engine.streams import Plan


@dataclass(slots=True, eq=False)
class Lane:
    """What a sequence holds of one pool for one of its plan's lanes: blocks, and the keys of those that are full."""

    pool: str
    keys: BlockKeys
    block_ids: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)  # one a row and step: freezing costs as much as all else that makes it
class Scheduled:
    """Tokens [first, first + count) of a sequence, to be run in one step. `scored`: the positions among them whose
    following prompt token is scored; `draws`: whether a token is drawn after the last."""

    sequence: Sequence
    first: int
    count: int
    scored: range
    draws: bool

    @property
    def num_rows(self) -> int:
        """Of the widened batch: `count` target rows, as many for each stream with keys and values of its own, and one
        row a borrowing stream at every scored position."""
        plan = self.sequence.plan
        return self.count * len(plan.lanes) + (len(self.scored) + self.draws) * plan.num_borrowing

    @property
    def is_live(self) -> bool:
        """Whether anybody waits for what it gives: not after its sequence has ended or given its blocks back."""
        return self in self.sequence.in_flight


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` tokens have their keys and values in the blocks of every lane, and the engine has seen that they
    went well; those `in_flight` were given to the device; the rest are still to be run.

    All lanes cover the same positions; the first is the target's. `max_len` is how many tokens it can get to.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    plan: Plan
    seed: int
    detokenizer: Detokenizer
    max_len: int
    grammar: GrammarState | None = None
    tenant: str = ""
    is_preempted: bool = False
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    in_flight: list[Scheduled] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    num_cached: int | None = None
    prompt_scores: list[TokenLogprob | None] = field(init=False)
    """None where there is no score: of the first token, and of those before `scored_from`."""
    receipt: Receipt | None = None
    added_ns: int = field(default_factory=time.time_ns)
    added_at: int = field(default_factory=time.monotonic_ns)
    started_at: int | None = None
    """When it first ran, and below when its first token was drawn; monotonic, in nanoseconds."""
    drew_at: int | None = None

    def __post_init__(self) -> None:
        unscored = min(self.params.scored_from, len(self.prompt_ids) - 1)
        self.prompt_scores = [None] * max(1, unscored)

    @property
    def block_ids(self) -> list[int]:
        """The target's blocks."""
        return self.lanes[0].block_ids

    @property
    def num_tokens(self) -> int:
        """Those that the host knows."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens drawn, or to be drawn by what is in flight, that the host does not know yet."""
        return sum(item.draws for item in self.in_flight) if self.params.max_tokens else 0

    @property
    def num_started(self) -> int:
        """Tokens that have been given to the device."""
        return self.in_flight[-1].first + self.in_flight[-1].count if self.in_flight else self.num_computed

    @property
    def remaining(self) -> int:
        """Tokens still to be run before the next one can be drawn, a pending one counted; none once the last one that
        it may have is pending."""
        if not self.in_flight:
            return self.num_tokens - self.num_computed
        num_pending = self.num_pending
        if num_pending and self.is_full(num_pending):
            return 0
        return self.num_tokens + num_pending - self.num_started

    def is_full(self, num_pending: int = 0) -> bool:
        """Whether it ends for its length, once the pending tokens are known."""
        num_outputs = len(self.output_ids) + num_pending
        return num_outputs >= self.params.max_tokens or len(self.prompt_ids) + num_outputs >= self.max_len

    @property
    def scores_prompt(self) -> bool:
        """Prompt positions are scored when asked for, and when there is nothing else to do."""
        return self.params.prompt_logprobs is not None or self.params.max_tokens == 0

    @property
    def num_reusable(self) -> int:
        """Tokens at its beginning that need not be run if their keys and values are there: the last one must be, and
        whatever a score is made of."""
        return min(len(self.prompt_scores) if self.scores_prompt else self.num_tokens, self.num_tokens) - 1

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_ids), len(self.output_ids), self.num_cached or 0)

    @property
    def timing(self) -> Timing:
        """Until now, which is its end."""
        now = time.monotonic_ns()
        started, drew = self.started_at, self.drew_at
        return Timing(
            added_ns=self.added_ns,
            queue_ns=(now if started is None else started) - self.added_at,
            prefill_ns=None if started is None else (now if drew is None else drew) - started,
            decode_ns=None if drew is None else now - drew,
        )

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids at positions [start, start + count)."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.output_ids[start - prompt : start - prompt + count]
        if start + count <= prompt:
            return self.prompt_ids[start : start + count]
        return self.prompt_ids[start:] + self.output_ids[: start + count - prompt]

    def next(self, count: int) -> Scheduled:
        """The next `count` tokens. Those of a prompt that is only scored are followed by no draw, but that a prompt of
        one token has nothing to score: its draw is made for the receipt and thrown away."""
        first = self.num_started
        scored = self._scored_positions(first, count) if self.scores_prompt else range(0)
        draws = self.params.max_tokens > 0 or len(self.prompt_ids) == 1
        return Scheduled(self, first, count, scored, draws and count == self.remaining)

    def _scored_positions(self, first: int, count: int) -> range:
        """Of `count` positions, those whose following prompt token is to be scored now. A preempted sequence runs its
        prompt again but does not score it again."""
        return range(max(first, len(self.prompt_scores) - 1), min(first + count, len(self.prompt_ids) - 1))
