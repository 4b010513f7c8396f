"""Alerts and dashboard ask for metrics that the server has; and the script that asks the dashboard's queries."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from uld_serve.engine.request import Load
from uld_serve.server.metrics import Metrics

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "uld-serve.json"
SERIES = re.compile(r"\b(uld_[a-z0-9_]+)(?:\{([^}]*)\})?")
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Every series that the server can have, and its labels."""
    metrics = Metrics()
    metrics.watch_engine(lambda: Load(num_running=0, num_waiting=0, cache_usage=0.0, num_preemptions=0))
    metrics.watch_profiles(lambda: [], lambda: 0)
    metrics.http_responses.labels("200")
    metrics.ended("p", "numerical_error", 1.0)
    for one in (metrics.profile_measured, metrics.profile_changed, metrics.profile_kl, metrics.profile_kept):
        one.labels("p")
    found: dict[str, set[str]] = {}
    for line in metrics.text().decode().splitlines():
        if not line.startswith("#"):
            name, _, labels = line.partition("{")
            found.setdefault(name.split(" ")[0], set()).update(re.findall(r'(\w+)="', labels))
    return found


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dashboard", DEPLOY / "check_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_known(expression: str, known: dict[str, set[str]]) -> None:
    used = SERIES.findall(expression)
    assert used or "up{" in expression, expression
    for name, labels in used:
        assert name in known, name
        assert set(re.findall(r"(\w+)[=!]", labels)) <= known[name], expression
    for grouping in re.findall(r"by \(([\w, ]+)\)", expression):
        assert set(grouping.split(", ")) <= set().union(*(known[name] for name, _ in used)), expression


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_alert_asks_for_what_there_is(rule: dict[str, str], known: dict[str, set[str]]) -> None:
    assert_known(rule["expr"], known)


def test_every_alert_is_tested_for_when_it_fires() -> None:
    cases = [
        case
        for test in yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text("utf-8"))["tests"]
        for case in test["alert_rule_test"]
    ]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fires == {rule["alert"] for rule in ALERTS}


def test_dashboard_asks_for_what_there_is(script: ModuleType, known: dict[str, set[str]]) -> None:
    asked = list(script.queries(DASHBOARD))
    assert len(asked) > 20
    for _, expression in asked:
        assert "$" not in expression
        assert_known(expression, known)


def test_dashboard_shows_what_operators_were_promised() -> None:
    text = DASHBOARD.read_text("utf-8")
    for name in (
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "profile_argmax_changed_tokens_total",
        "profile_kl_nats_bucket",
        "kv_cache_usage_perc",
        "http_responses_total",
    ):
        assert f"uld_{name}" in text


def test_panels_do_not_overlap_and_use_the_provisioned_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, panel["title"]
        assert max(x for x, _ in covered) < 24
        cells |= covered
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    (uid,) = {one["uid"] for one in source["datasources"]}
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"} == {uid}


class FakePrometheus(BaseHTTPRequestHandler):
    """Answers NaN to what divides, nothing to what has `kv`, and 1 to all else."""

    def do_GET(self) -> None:
        (query,) = parse_qs(urlsplit(self.path).query)["query"]
        values = [] if "kv_cache" in query else ["NaN"] if " / " in query else ["1"]
        result = [{"metric": {}, "value": [0, value]} for value in values]
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), FakePrometheus) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_queries_without_a_number_are_named(
    script: ModuleType, prometheus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--prometheus", prometheus]) == 1
    told = capsys.readouterr().err
    missing = {line.removeprefix("no data: ").split(" (")[0] for line in told.splitlines()}
    assert {"Cache in use", "Share of tokens that forgetting changed"} <= missing
    assert "To the first token" not in missing


def test_no_answer_is_no_data(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--prometheus", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().out.startswith("0 of ")
