"""Schemathesis on every operation of both OpenAPI documents, with valid and with invalid data: no answer is a 5xx, and
each is one that the document promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from scale import SCALE, scaled
from schema_site import SchemaSite, schema_site
from tiny_base import Tiny

NUM_EXAMPLES = scaled(fast=2, gate=15, aim=150)  # an operation, of random data
LEAST_CASES = scaled(fast=60, gate=2_000, aim=10_000)
RUNS = (("key-all", False), ("key-bound", False), ("key-all", True))


def settings() -> dict[str, object]:
    is_full = SCALE != "fast"
    return {
        "generation": {
            "mode": "all",
            "max-examples": NUM_EXAMPLES,
            "allow-x00": True,
            "database": "none",
            "no-shrink": True,
        },
        # The systematic cases, and chains of operations that pass ids on, take minutes.
        "phases": {"coverage": {"enabled": is_full}, "stateful": {"enabled": is_full}},
    }


@pytest.mark.row("schemathesis")
@pytest.mark.timeout(36000)
def test_every_operation_answers_as_its_document_says(
    tiny: Tiny, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    num_cases, problems, statuses = 0, {}, {}
    with schema_site(tiny, tmp_path) as site:
        for key, is_admin in RUNS:
            found = site.run(key=key, is_admin=is_admin, **settings())
            assert found.operations == operations(site, is_admin=is_admin)
            num_cases += found.num_cases
            problems |= {(key, *which): shown for which, shown in found.problems.items()}
            statuses |= {f"{key}{' admin' * is_admin}": dict(found.statuses)}
    record_property("count", num_cases)
    record_property("statuses", statuses)
    assert not problems, "\n\n".join(f"{which}: {shown}" for which, shown in problems.items())
    assert num_cases >= LEAST_CASES
    assert all(None not in by_status and max(by_status) < 500 for by_status in statuses.values()), statuses


def operations(site: SchemaSite, *, is_admin: bool) -> set[str]:
    paths = site.live.apps[1 if is_admin else 0].openapi()["paths"]
    return {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
