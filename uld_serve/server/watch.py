"""What operators see of one request from its admission to its end: audit lines, metrics, spans and a log line. Made by
telemetry, fed by generation. Sees tokens go by and keeps none."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from uld_serve.engine.request import Delta, Receipt, Timing
from uld_serve.server.audit import AuditLog, AuditUnavailable
from uld_serve.server.metrics import Metrics
from uld_serve.server.tracing import RequestSpan

logger = logging.getLogger("uld_serve.request")

OK, GONE = "ok", "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of an admitted request. `decided`: the profiles that must be applied, as receipts write them."""

    request_id: str
    route: str
    key: str
    user: str | None
    model: str
    decided: str
    prompt_tokens: int


@dataclass(slots=True)
class Watch:
    """`saw` every delta, then `end`, once."""

    facts: Facts
    metrics: Metrics
    audit: AuditLog | None
    span: RequestSpan | None
    started_s: float = field(default_factory=time.monotonic)
    receipt: Receipt | None = None
    completion_tokens: int = 0
    timings: list[Timing] = field(default_factory=list)
    _last_s: dict[int, float] = field(default_factory=dict)

    def saw(self, index: int, delta: Delta) -> None:
        """`delta` of choice `index`."""
        now_s = time.monotonic()
        self.receipt = self.receipt or delta.receipt
        if delta.token_ids:
            self._count(index, len(delta.token_ids), now_s)
        if delta.measure is not None:
            self.metrics.measured(self.applied, delta.measure)
        if delta.usage is not None:
            self.metrics.prompt_tokens.inc(delta.usage.prompt_tokens)
            self.metrics.cached_prompt_tokens.inc(delta.usage.cached_tokens)
        if delta.timing is not None:
            self.timings.append(delta.timing)
            self.metrics.queue_s.observe(delta.timing.queued_s)

    def end(self, outcome: str) -> None:
        """`outcome` is "ok", "gone" (the client left) or an error's code.

        Raises AuditUnavailable when a request that went well cannot be recorded: then it did not go well.
        """
        seconds = time.monotonic() - self.started_s
        failure = self._record(outcome, seconds)
        outcome = failure.code or outcome if failure is not None and outcome == OK else outcome
        self.metrics.ended(self.applied, outcome, seconds)
        if self.span is not None:
            self.span.end(outcome, self.applied, self.completion_tokens, self.timings)
        fields = self._fields(outcome, seconds)
        del fields["user"]  # the client's own words, for the audit log alone
        logger.info("request ended", extra={"fields": fields})
        if failure is not None and outcome == failure.code:
            raise failure

    @property
    def applied(self) -> str:
        """By the sampler's receipt; what was decided while there is none."""
        return self.facts.decided if self.receipt is None else self.receipt.header

    def _count(self, index: int, num_tokens: int, now_s: float) -> None:
        self.completion_tokens += num_tokens
        self.metrics.generation_tokens.inc(num_tokens)
        last_s = self._last_s.get(index)
        if last_s is None:
            self.metrics.first_token_s.observe(now_s - self.started_s)
        else:
            self.metrics.inter_token_s.observe((now_s - last_s) / num_tokens)
        self._last_s[index] = now_s

    def _record(self, outcome: str, seconds: float) -> AuditUnavailable | None:
        if self.audit is None:
            return None
        try:
            self.audit.write("ended", **self._fields(outcome, seconds))
        except AuditUnavailable as error:
            self.metrics.audit_failures.inc()
            logger.error("the end of request %s was not recorded: %s", self.facts.request_id, error)
            return error
        return None

    def _fields(self, outcome: str, seconds: float) -> dict[str, str | int | float | None]:
        facts = self.facts
        return {
            "id": facts.request_id,
            "route": facts.route,
            "key": facts.key,
            "user": facts.user,
            "model": facts.model,
            "forget": "unknown" if self.receipt is None else self.receipt.header,
            "prompt_tokens": facts.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "outcome": outcome,
            "seconds": round(seconds, 3),
        }
