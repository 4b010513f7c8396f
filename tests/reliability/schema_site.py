"""A server on which everything is switched on, over the real engine on the tiny base, and what Schemathesis finds when
it asks every operation of its OpenAPI documents. Nothing trains: jobs end in a stand-in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import schemathesis
from live_server import MODEL, LiveServer, make_catalog
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from tiny_base import Tiny
from workshop_site import FakeRunner

from uld_serve.config import EngineSettings
from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.model.loading import load_base
from uld_serve.profiles.registry import Registry
from uld_serve.server.audit import AuditLog
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.loader import EngineHost
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.settings import Limits
from uld_serve.server.telemetry import Telemetry

ALL = KeyPolicy(
    name="all", allow_base=True, logprobs=True, is_admin=True, may_read_metrics=True, may_fine_tune=True
)
BOUND = KeyPolicy(name="bound", mandatory=frozenset({"late-fork"}), may_fine_tune=True)
KEYS = {"key-all": ALL, "key-bound": BOUND}
SEED = 20_261_122
# "valid" requests may still be refused: a document cannot say that a file must exist, or a prompt fit the context.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
)


@dataclass
class Found:
    """What came of a run: answers by status, and what was wrong, once for each operation and kind."""

    statuses: Counter[int | None] = field(default_factory=Counter)
    operations: set[str] = field(default_factory=set)
    problems: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def num_cases(self) -> int:
        return self.statuses.total()

    def add(self, event: events.EngineEvent) -> None:
        if isinstance(event, events.NonFatalError | events.FatalError):
            self.problems.setdefault((type(event).__name__, str(getattr(event, "label", ""))), str(event))
        if not isinstance(event, events.ScenarioFinished):
            return
        for case_id, interaction in event.recorder.interactions.items():
            answer = interaction.response
            self.statuses[None if answer is None else answer.status_code] += 1
            self.operations.add(event.recorder.cases[case_id].value.operation.label)
        for checks in event.recorder.checks.values():
            for check in checks:
                if check.failure_info is not None:
                    shown = f"{check.failure_info.failure}\n{check.failure_info.code_sample}"
                    self.problems.setdefault((check.name, event.recorder.label), shown)


@dataclass
class SchemaSite:
    live: LiveServer

    def run(self, *, key: str, is_admin: bool = False, **settings: object) -> Found:
        """Every operation of one of the two documents; `settings` as in schemathesis.toml."""
        document = self._document(is_admin=is_admin)
        port = self.live.admin_port if is_admin else self.live.port
        config = SchemathesisConfig.from_dict(
            {
                "seed": SEED,
                "base-url": f"http://127.0.0.1:{port}",
                "headers": {"Authorization": f"Bearer {key}"},
                "continue-on-failure": True,
                "request-timeout": 30,
                "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
                **settings,
            }
        )
        schema = schemathesis.openapi.from_dict(document, config=config)
        schema.hooks.register_hook_with_name(self._take_requests_again, "after_call")
        found = Found()
        for event in from_schema(schema).execute():
            found.add(event)
        return found

    def _document(self, *, is_admin: bool) -> dict[str, object]:
        """As it is served, but with the names that there are: with others every request ends at the first check."""
        app = self.live.apps[1 if is_admin else 0]
        document = json.loads(json.dumps(app.openapi()))
        names = sorted(version.name for version in self.live.apps[0].state.catalog.registry)
        for schema in document["components"]["schemas"].values():
            if schema.get("additionalProperties") is False and "model" in schema["properties"]:
                schema["properties"]["model"]["enum"] = [MODEL, f"{MODEL}:{names[0]}"]
        if is_admin:
            for path, item in document["paths"].items():
                for operation in item.values() if "{name}" in path else ():
                    operation["parameters"][0]["schema"]["enum"] = [*names, "unknown"]
        return document

    def _take_requests_again(self, context: object, case: object, response: object) -> None:
        """After a drain, which has no way back, all others would be refused."""
        self.live.backend.is_draining = False


@contextmanager
def schema_site(tiny: Tiny, folder: Path) -> Iterator[SchemaSite]:
    base = load_base(str(tiny.folder), dtype="float32", device="cpu")
    engine = Engine.of(base, EngineSettings(kv_cache_bytes=2**22, max_model_len=64))
    asynchronous = AsyncEngine(engine)
    telemetry = Telemetry(audit=AuditLog(folder / "audit.jsonl"))
    catalog = make_catalog(
        keys=KEYS,
        profiles=Registry(version for _, version in tiny.profiles.values()),
        tokenizer=engine.tokenizer,
        limits=Limits(read_timeout_s=2.0),
    )
    live = LiveServer.start(
        catalog,
        asynchronous,
        telemetry=telemetry,
        host=EngineHost(asynchronous, base),
        roots=(next(iter(tiny.profiles.values()))[0].parent,),
        unload_wait_s=0.2,
        fine_tuning=FineTuningSettings(folder=folder / "fine-tuning"),
        runner=FakeRunner(),
    )
    try:
        yield SchemaSite(live)
    finally:
        live.stop()
        telemetry.audit.close()
