"""What Prometheus reads, under the names that routers know, and per set of profiles what forgetting did. Moved by watch
and edge; shown by admin. Knows no request."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from uld_serve.engine.request import Load, Measure

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NATS = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
TOKENS = (1, 3, 10, 32, 100, 316, 1000, 3162, 10_000, 31_623, 100_000)
# Each has thirty series, and clients may ask for any set of profiles.
MAX_SETS = 64
OTHER_SETS = "other"


class Metrics:
    """One server's; `profile` labels are receipts: `name@digest12,…`, or `none`. Every profile has its own, and the
    first MAX_SETS sets of several; all other sets are `other`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sets: set[str] = set()
        self.generation_tokens = self._counter("generation_tokens", "tokens drawn")
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens of requests that ended, by choice")
        self.cached_prompt_tokens = self._counter(
            "cached_prompt_tokens", "of these, found in the prefix cache"
        )
        self.requests = self._counter("requests", "requests that ended", "outcome")
        self.http_responses = self._counter("http_responses", "answers of both listeners", "status")
        self.audit_failures = self._counter("audit_failures", "audit lines that could not be written")
        self.jobs = self._counter("fine_tuning_jobs", "jobs that ended", "status")
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "admission to first token", SECONDS
        )
        self.inter_token_s = self._histogram(
            "inter_token_latency_seconds", "between a choice's tokens", SECONDS
        )
        self.queue_s = self._histogram("request_queue_time_seconds", "in the engine, before it ran", SECONDS)
        self.request_s = self._histogram("e2e_request_latency_seconds", "admission to end", SECONDS)
        self.profile_requests = self._counter("profile_requests", "requests that ended", "profile")
        self.profile_errors = self._counter("profile_numerical_errors", "ended by NaN or infinity", "profile")
        self.profile_measured = self._counter(
            "profile_measured_tokens", "tokens that were measured", "profile"
        )
        self.profile_changed = self._counter(
            "profile_argmax_changed_tokens",
            "of these, whose likeliest token is another than the base's",
            "profile",
        )
        self.profile_kl = self._histogram(
            "profile_kl_nats", "KL(fused || target) at measured tokens", NATS, "profile"
        )
        self.profile_kept = self._histogram(
            "profile_kept_tokens", "tokens that filters and rules left, at measured tokens", TOKENS, "profile"
        )

    def watch_engine(self, load: Callable[[], Load]) -> None:
        """Gauges that ask the engine whenever they are read."""
        for name, what, value in (
            ("num_requests_running", "requests in the batch", lambda: load().num_running),
            ("num_requests_waiting", "requests in the queue", lambda: load().num_waiting),
            ("kv_cache_usage_perc", "share of the target's cache in use, 0 to 1", lambda: load().cache_usage),
            (
                "num_preemptions",
                "running requests that gave their blocks back",
                lambda: load().num_preemptions,
            ),
        ):
            Gauge(f"uld_{name}", what, registry=self.registry).set_function(value)

    def watch_profiles(self, refs: Callable[[], Iterable[str]], in_use: Callable[[], int]) -> None:
        """How many profiles there are to ask for, and how many leases are held on versions."""
        for name, what, value in (
            ("profiles_loaded", "profiles that may be asked for", lambda: len(list(refs()))),
            ("profile_leases", "requests that hold a version of a profile", in_use),
        ):
            Gauge(f"uld_{name}", what, registry=self.registry).set_function(value)

    def measured(self, profile: str, measure: Measure) -> None:
        profile = self._label(profile)
        self.profile_measured.labels(profile).inc()
        self.profile_changed.labels(profile).inc(measure.argmax_changed)
        self.profile_kl.labels(profile).observe(measure.kl_nats)
        self.profile_kept.labels(profile).observe(measure.num_kept)

    def ended(self, profile: str, outcome: str, seconds: float) -> None:
        self.requests.labels(outcome).inc()
        self.request_s.observe(seconds)
        profile = self._label(profile)
        self.profile_requests.labels(profile).inc()
        if outcome == "numerical_error":
            self.profile_errors.labels(profile).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _label(self, profile: str) -> str:
        if "," not in profile or profile in self._sets:
            return profile
        if len(self._sets) >= MAX_SETS:
            return OTHER_SETS
        self._sets.add(profile)
        return profile

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"uld_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"uld_{name}", what, labels, buckets=buckets, registry=self.registry)
