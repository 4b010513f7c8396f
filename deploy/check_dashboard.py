"""Asks Prometheus every query of Grafana's dashboard, as Grafana would, and says which give no data. Standard library
only: it runs on an operator's machine. Exit status 0 when every query has data."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "uld-serve.json"
# What Grafana puts in for its variables: four scrapes, and all profiles.
VARIABLES = {"$__rate_interval": "1m", "$profile": ".*"}
INTERVAL_S = 5.0


def queries(dashboard: Path) -> Iterator[tuple[str, str]]:
    """(panel's title, PromQL) of every target, variables filled in."""
    for panel in json.loads(dashboard.read_text("utf-8"))["panels"]:
        for target in panel.get("targets", []):
            expression: str = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield f"{panel['title']} ({target['legendFormat']})", expression


def values(prometheus: str, expression: str) -> list[float]:
    """Those of an instant query. Raises OSError when Prometheus does not answer, or refuses the query."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as response:
        answer = json.load(response)
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def has_data(prometheus: str, expression: str) -> bool:
    """Whether some series has a number: a share of nothing is NaN."""
    return any(math.isfinite(value) for value in values(prometheus, expression))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, metavar="FILE")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for data to come")
    args = parser.parse_args(arguments)
    asked = list(queries(args.dashboard))
    until = time.monotonic() + args.wait
    missing = asked
    while missing:
        try:
            missing = [(title, one) for title, one in missing if not has_data(args.prometheus, one)]
        except OSError as error:
            print(f"{args.prometheus}: {error}", file=sys.stderr)
        if not missing or time.monotonic() > until:
            break
        time.sleep(INTERVAL_S)
    for title, expression in missing:
        print(f"no data: {title}: {expression}", file=sys.stderr)
    print(f"{len(asked) - len(missing)} of {len(asked)} queries have data")
    return 1 if missing or not asked else 0


if __name__ == "__main__":
    sys.exit(main())
