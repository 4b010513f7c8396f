"""Spans, log lines and metrics of requests: what is in them, and that no text of a client is."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from fake_engine import FakeEngine
from live_server import MODEL, LiveServer, wait_until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from uld_serve.engine.request import Measure, Timing
from uld_serve.errors import NumericalError
from uld_serve.server import logs
from uld_serve.server.metrics import MAX_SETS, Metrics
from uld_serve.server.settings import LogSettings
from uld_serve.server.telemetry import Telemetry
from uld_serve.server.tracing import Tracing

ACME = "acme@" + "a" * 12
ASK = {"model": MODEL, "prompt": "private words", "forget_profile": "acme", "max_tokens": 5}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Timed(FakeEngine):
    """Ends every answer with a timing and measures its first token, as the engine does."""

    async def stream(self, *args: object, **kwargs: object) -> object:
        from dataclasses import replace

        measure = Measure(kl_nats=0.25, num_kept=40, argmax_changed=True)
        async for delta in super().stream(*args, **kwargs):
            if delta.finish_reason is not None:
                delta = replace(delta, timing=Timing(10**18, 10**9, 2 * 10**9, 3 * 10**9), measure=measure)
            yield delta


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(start_server: Callable[..., LiveServer], spans: InMemorySpanExporter) -> LiveServer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return start_server(engine=Timed(), telemetry=Telemetry(tracing=Tracing.of(provider)))


@pytest.mark.parametrize("stream", [False, True])
def test_spans_of_a_request_hang_together_and_hold_no_text(
    traced: LiveServer, spans: InMemorySpanExporter, stream: bool
) -> None:
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    answer = traced.post("/v1/completions", ASK | {"n": 2, "stream": stream}, headers=headers)
    assert answer.status_code == 200
    wait_until(lambda: len(spans.get_finished_spans()) == 7)
    *phases, request = spans.get_finished_spans()
    assert request.name == "POST /v1/completions"
    assert format(request.context.trace_id, "032x") == TRACE
    assert request.parent is not None
    assert request.attributes["uld.request_id"] in answer.text
    assert (request.attributes["uld.outcome"], request.attributes["uld.completion_tokens"]) == ("ok", 10)
    assert [span.name for span in phases] == ["queue", "prefill", "decode"] * 2
    for span, length in zip(phases, (1, 2, 3) * 2, strict=True):
        assert span.parent.span_id == request.context.span_id
        assert span.end_time - span.start_time == length * 10**9
    assert phases[0].end_time == phases[1].start_time
    assert {span.attributes["uld.forget"] for span in (request, *phases)} == {ACME}
    assert "private" not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_failed_request_is_a_span_with_an_error(traced: LiveServer, spans: InMemorySpanExporter) -> None:
    traced.engine.fail_after = (0, NumericalError("not finite"))
    traced.post("/v1/completions", ASK)
    (span,) = spans.get_finished_spans()
    assert (span.status.is_ok, span.attributes["uld.outcome"]) == (False, "numerical_error")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[LogSettings], io.StringIO]]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def configure(settings: LogSettings) -> io.StringIO:
        stream = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            logs.configure(settings)
        return stream

    yield configure
    root.handlers[:] = before
    root.setLevel(level)


def test_json_log_has_a_line_a_request_and_no_text(
    start_server: Callable[..., LiveServer], logged: Callable[[LogSettings], io.StringIO]
) -> None:
    stderr = logged(LogSettings(format="json", level="info"))
    server = start_server(engine=FakeEngine())
    answer = server.post("/v1/completions", ASK | {"user": "private Ann"}).json()
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    (line,) = [line for line in lines if line["logger"] == "uld_serve.request"]
    assert (line["id"], line["outcome"], line["forget"]) == (answer["id"], "ok", ACME)
    assert (line["completion_tokens"], line["key"]) == (5, "development")
    assert "private" not in stderr.getvalue()


def test_a_field_of_a_text_log_is_one_word(logged: Callable[[LogSettings], io.StringIO]) -> None:
    stderr = logged(LogSettings())
    fields = {"key": "team a\n2026-01-01 error forged=1", "n": 2, "model": "m:a+b"}
    logging.getLogger("here").warning("ended", extra={"fields": fields})
    line = stderr.getvalue()
    assert line.count("\n") == 1
    assert line.endswith(r'ended key="team a\n2026-01-01 error forged=1" n=2 model=m:a+b' + "\n")


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("error_text", [False, True])
def test_unexpected_error_is_told_by_type_and_place_and_by_its_words_only_if_asked(
    start_server: Callable[..., LiveServer],
    logged: Callable[[LogSettings], io.StringIO],
    form: str,
    error_text: bool,
) -> None:
    stderr = logged(LogSettings.model_validate({"format": form, "error_text": error_text}))
    server = start_server(engine=FakeEngine(crash_after=1))
    assert server.post("/v1/completions", ASK).status_code == 500
    wait_until(lambda: "RuntimeError" in stderr.getvalue())
    assert "fake_engine.py" in stderr.getvalue()
    assert ("secret words" in stderr.getvalue()) == error_text
    assert "private" not in stderr.getvalue()


def values(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_every_metric_moves(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(engine=Timed())
    metrics = server.backend.telemetry.metrics
    names = {name.split("{")[0] for name in values(metrics)}
    assert server.post("/v1/completions", ASK | {"n": 2}).status_code == 200
    server.engine.fail_after = (1, NumericalError("not finite"))
    server.post("/v1/completions", ASK)
    server.engine.fail_after, server.engine.hang_after = None, 2
    with server.client() as client:
        running = client.completions.create(model=MODEL, prompt="Hi", stream=True)
        next(iter(running))
        during = values(metrics)
        running.close()
    wait_until(lambda: server.engine.num_running == 0)
    server.post("/v1/nothing")
    found = values(metrics)
    label = f'{{profile="{ACME}"}}'
    assert found["uld_generation_tokens_total"] == 10 + 1 + 2
    assert found["uld_prompt_tokens_total"] == 2 * 13
    assert found["uld_time_to_first_token_seconds_count"] == 2 + 1 + 1
    assert found["uld_inter_token_latency_seconds_count"] == 2 * 4 + 1
    assert found["uld_request_queue_time_seconds_sum"] == 2.0
    assert found["uld_e2e_request_latency_seconds_count"] == 3
    for outcome in ("ok", "numerical_error", "gone"):
        assert found[f'uld_requests_total{{outcome="{outcome}"}}'] == 1
    assert found['uld_http_responses_total{status="200"}'] == 2
    assert found['uld_http_responses_total{status="404"}'] == 1
    assert found[f"uld_profile_requests_total{label}"] == 2
    assert found['uld_profile_requests_total{profile="none"}'] == 1
    assert found[f"uld_profile_numerical_errors_total{label}"] == 1
    assert found[f"uld_profile_measured_tokens_total{label}"] == 2
    assert found[f"uld_profile_argmax_changed_tokens_total{label}"] == 2
    assert found[f"uld_profile_kl_nats_sum{label}"] == 0.5
    assert found[f"uld_profile_kept_tokens_sum{label}"] == 80
    assert (during["uld_num_requests_running"], during["uld_kv_cache_usage_perc"]) == (1, 0.1)
    assert found["uld_num_requests_running"] == 0
    assert found["uld_profiles_loaded"] == 3
    assert names <= {name.split("{")[0] for name in found}


def test_clients_who_ask_for_every_set_of_profiles_do_not_make_a_series_each() -> None:
    metrics, measure = Metrics(), Measure(kl_nats=0.25, num_kept=40, argmax_changed=True)
    for number in range(MAX_SETS + 10):
        for profile in (f"a@1,b@{number}", f"c@{number}"):
            metrics.measured(profile, measure)
            metrics.ended(profile, "ok", 1.0)
    found = {
        name: value
        for name, value in values(metrics).items()
        if name.startswith("uld_profile_requests_total")
    }
    assert len(found) == (MAX_SETS + 10) + MAX_SETS + 1
    assert found['uld_profile_requests_total{profile="other"}'] == 10
    assert values(metrics)['uld_profile_kl_nats_count{profile="other"}'] == 10
