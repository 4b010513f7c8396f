"""Throughput, latency and prefix-cache hits of one replica and of several, with and without routing by prefix.

    python benchmarks/fleet.py --model DIR --profiles DIR --profile NAME [--replicas 1 2] [--seconds 20]

Clients ask without pause; each request is one of a few long beginnings and an end of its own. Every replica has one
thread and one core of Ray's. A table for people, one JSON line last. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from uld_serve.bench.environment import Environment
from uld_serve.fleet import ray_app, ray_service
from uld_serve.fleet.settings import FleetSettings
from uld_serve.server.listener import bound_socket
from uld_serve.server.settings import ServerSettings

WORDS = (
    *(
        "the",
        "of",
        "and",
        "to",
        "in",
        "that",
        "is",
        "was",
        "he",
        "for",
        "it",
        "with",
        "as",
        "his",
        "on",
        "be",
    ),
    *("at", "by", "had", "not", "are", "but", "from", "or", "have", "an", "they", "which", "one", "you"),
)
WARM_UP = 2


@dataclass
class Load:
    url: str
    args: argparse.Namespace
    latencies_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        end_s = time.monotonic() + self.args.seconds
        threads = [threading.Thread(target=self._client, args=(n, end_s)) for n in range(self.args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int, end_s: float) -> None:
        dice = random.Random(1000 + number)
        with httpx.Client(timeout=300) as http:
            while time.monotonic() < end_s:
                started_s = time.monotonic()
                answer = http.post(f"{self.url}/v1/completions", json=self._body(dice))
                self._note(time.monotonic() - started_s, answer)

    def _body(self, dice: random.Random) -> dict[str, object]:
        which = dice.randrange(self.args.prefixes)
        beginning = " ".join(random.Random(which).choices(WORDS, k=self.args.prefix_words))
        return {
            "model": f"{Path(self.args.model).name}:{self.args.profile}",
            "prompt": f"{beginning} {dice.random()}",
            "max_tokens": self.args.max_tokens,
            "ignore_eos": True,
            "seed": 1,
        }

    def _note(self, seconds: float, answer: httpx.Response) -> None:
        with self._lock:
            if answer.status_code != 200:
                status = str(answer.status_code)
                self.errors[status] = self.errors.get(status, 0) + 1
                return
            self.latencies_s.append(seconds)
            self.num_tokens += answer.json()["usage"]["completion_tokens"]


@contextmanager
def fleet(
    args: argparse.Namespace, num_replicas: int, routing: str, folder: Path
) -> Iterator[tuple[str, str]]:
    """URLs of the API and of the operators' listener."""
    ports = []
    for _ in range(2):
        with bound_socket("127.0.0.1", 0) as sock:
            ports.append(sock.getsockname()[1])
    settings = ServerSettings.model_validate(
        {
            "model": args.model,
            "profiles": [args.profiles],
            "dtype": args.dtype,
            "kv_cache_bytes": args.kv_cache_bytes,
            "port": ports[0],
            "admin": {"port": ports[1]},
        }
    )
    chosen = FleetSettings.model_validate(
        {
            "active_file": folder / f"{num_replicas}-{routing}.json",
            "min_replicas": num_replicas,
            "max_replicas": num_replicas,
            "max_ongoing_requests": args.clients,
            "slack": args.slack,
            "routing": routing,
            "lease_s": 60.0,
            "start_s": 1800.0,
        }
    )
    with ray_service.running(ray_app.plan_of(chosen, settings), is_ours=True):
        yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"


def counted(url: str) -> dict[str, float]:
    """Prompt tokens and cached ones of all replicas so far."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    wanted = ("uld_prompt_tokens", "uld_cached_prompt_tokens")
    return {
        one.name: sum(sample.value for sample in one.samples if sample.name.endswith("_total"))
        for one in families
        if one.name in wanted
    }


def measured(args: argparse.Namespace, num_replicas: int, routing: str, folder: Path) -> dict[str, object]:
    with fleet(args, num_replicas, routing, folder) as (url, admin_url):
        warm = argparse.Namespace(**{**vars(args), "seconds": WARM_UP, "prefixes": 1, "prefix_words": 4})
        Load(url, warm).run()
        time.sleep(3)  # replicas tell the ledger of their metrics once a second
        before, load_average, started_s = counted(admin_url), os.getloadavg()[0], time.monotonic()
        load = Load(url, args)
        load.run()
        seconds = time.monotonic() - started_s
        time.sleep(3)
        after = counted(admin_url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    centiles = statistics.quantiles(load.latencies_s, n=100, method="inclusive")
    return {
        "replicas": num_replicas,
        "routing": routing,
        "requests": len(load.latencies_s),
        "errors": load.errors,
        "tokens_per_s": round(load.num_tokens / seconds, 2),
        "requests_per_s": round(len(load.latencies_s) / seconds, 3),
        "latency_ms": {"p50": round(1000 * centiles[49], 1), "p99": round(1000 * centiles[98], 1)},
        "prompt_tokens": grown["uld_prompt_tokens"],
        "hit_rate": round(grown["uld_cached_prompt_tokens"] / grown["uld_prompt_tokens"], 4),
        "load_average": round(load_average, 2),
    }


def main() -> None:
    args = parsed()
    runs = [(n, how) for n in args.replicas for how in (("prefix", "load") if n > 1 else ("prefix",))]
    results = []
    with tempfile.TemporaryDirectory() as folder, ray_service.cluster(args.address):
        for num_replicas, routing in runs:
            results.append(measured(args, num_replicas, routing, Path(folder)))
            print(results[-1], flush=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings["model"] = Path(args.model).name
    del settings["profiles"], settings["address"]
    print(
        json.dumps(
            {
                "results": results,
                "settings": settings,
                "environment": Environment.look(torch.device("cpu")).record,
            }
        )
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--address", help="of a running cluster; default: one of this machine")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--prefixes", type=int, default=12)
    parser.add_argument("--prefix-words", type=int, default=80)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--slack", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-bytes", type=int, default=2**26)
    return parser.parse_args()


if __name__ == "__main__":
    main()
