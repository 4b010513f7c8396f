"""Where requests are reported to: the metrics, and the audit log and the tracer if there are. Held by the backend; it
opens a Watch for every request that is about to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from uld_serve.server.audit import AuditLog, AuditUnavailable, Value
from uld_serve.server.metrics import Metrics
from uld_serve.server.tracing import Tracing
from uld_serve.server.watch import Facts, Watch


@dataclass(frozen=True, slots=True)
class Telemetry:
    metrics: Metrics = field(default_factory=Metrics)
    audit: AuditLog | None = None
    tracing: Tracing | None = None

    def record(self, event: str, **fields: Value) -> None:
        """What was done beside answering. Raises AuditUnavailable: then it may not be done."""
        if self.audit is None:
            return
        try:
            self.audit.write(event, **fields)
        except AuditUnavailable:
            self.metrics.audit_failures.inc()
            raise

    def begin(self, facts: Facts, headers: Mapping[str, str]) -> Watch:
        """`headers` may carry a caller's trace. Raises AuditUnavailable: then nothing may be generated."""
        self.record(
            "admitted",
            id=facts.request_id,
            route=facts.route,
            key=facts.key,
            user=facts.user,
            model=facts.model,
            decided=facts.decided,
            prompt_tokens=facts.prompt_tokens,
        )
        span = None if self.tracing is None else self.tracing.request(facts.route, facts.request_id, headers)
        return Watch(facts, self.metrics, self.audit, span)
