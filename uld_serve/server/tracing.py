"""OpenTelemetry spans of requests: one for the request, and for each choice one for queue, prefill and decode. Opened
by telemetry, ended by watch. No text is in them. The packages are the extra `uld-serve[otel]`, imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uld_serve import __version__
from uld_serve.engine.request import Timing
from uld_serve.errors import InvalidRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

SERVICE = "uld-serve"


@dataclass(frozen=True, slots=True)
class RequestSpan:
    span: Span
    tracer: Tracer

    def end(self, outcome: str, forget: str, num_tokens: int, timings: Sequence[Timing]) -> None:
        """`forget` as receipts write it; `timings`, one a choice, become the spans below this one."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        self.span.set_attributes({"uld.forget": forget, "uld.outcome": outcome})
        self.span.set_attribute("uld.completion_tokens", num_tokens)
        if outcome not in ("ok", "gone"):
            self.span.set_status(Status(StatusCode.ERROR, outcome))
        context = set_span_in_context(self.span)
        for timing in timings:
            for name, start_ns, end_ns in timing.phases:
                phase = self.tracer.start_span(
                    name, context, start_time=start_ns, attributes={"uld.forget": forget}
                )
                phase.end(end_ns)
        self.span.end()


@dataclass(frozen=True, slots=True)
class Tracing:
    tracer: Tracer

    @classmethod
    def of(cls, provider: TracerProvider) -> Tracing:
        return cls(provider.get_tracer("uld_serve", __version__))

    @classmethod
    def start(cls) -> Tracing:
        """Export to where OTEL_EXPORTER_OTLP_ENDPOINT and its like say. Raises InvalidRequest without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise InvalidRequest("tracing needs OpenTelemetry: pip install 'uld-serve[otel]'") from None
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: SERVICE}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls.of(provider)

    def request(self, route: str, request_id: str, headers: Mapping[str, str]) -> RequestSpan:
        """A span below the caller's, if `headers` has a traceparent."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        attributes = {"http.route": route, "uld.request_id": request_id}
        span = self.tracer.start_span(f"POST {route}", context, kind=SpanKind.SERVER, attributes=attributes)
        return RequestSpan(span, self.tracer)
