"""Mixed traffic with faults for a long time, and what memory and descriptors do meanwhile: `make soak`.

The canary model serves in a process of its own, where a fault is put in place every second or two, at any point that
may not stop the engine. This process asks: streams and whole answers, clients that leave, swaps of profiles, requests
that are wrong. Any canary ends the run. Memory is looked at every few seconds; the slope is that of the second
half."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("", "server", "profiles"))]

import torch  # noqa: E402
from canary import NAMES, CanaryModel  # noqa: E402
from canary_server import CHAT, COMPLETIONS, Question, Said, canary_server  # noqa: E402
from fault_points import POINTS, Fault  # noqa: E402
from raw_client import ask  # noqa: E402

SAMPLE_S, NUM_CLIENTS = 5.0, 12
MEMORY_NOISE = 0.005
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STRIKING = [point for point in POINTS.values() if not point.stops and point.needs != "failure"]


def serve(folder: Path, *, with_faults: bool) -> None:
    """In the server's process: until its standard input is closed."""
    torch.set_num_threads(1)
    model = CanaryModel.found(folder)
    is_over = threading.Event()
    with canary_server(model, audit=folder / "audit.jsonl", max_num_seqs=32) as server:
        print(json.dumps({"port": server.port, "admin": server.live.admin_port}), flush=True)
        if with_faults:
            threading.Thread(target=strike, args=(is_over,), daemon=True).start()
        sys.stdin.read()
        is_over.set()


def strike(is_over: threading.Event) -> None:
    rng = random.Random(4)
    while not is_over.wait(rng.uniform(0.5, 2.0)):
        point = rng.choice(STRIKING)
        kinds = [kind for kind in point.kinds if kind != "cancel"]
        with Fault(point, rng.choice(kinds), rng.randrange(1, 6), lambda: None).in_place():
            is_over.wait(0.5)


@dataclass
class Totals:
    requests: int = 0
    answered: int = 0
    failed: int = 0
    left: int = 0
    swaps: int = 0
    problems: list[str] = field(default_factory=list)

    def take(self, said: Said) -> None:
        self.requests += 1
        self.answered += said.is_answered
        self.failed += not said.is_answered
        self.problems += said.problems


@dataclass
class Soak:
    port: int
    admin_port: int
    until: float
    totals: Totals = field(default_factory=Totals)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until or bool(self.totals.problems)

    async def run(self, pid: int) -> list[tuple[float, int, int]]:
        clients = [self.client(random.Random(number)) for number in range(NUM_CLIENTS)]
        samples, *_ = await asyncio.gather(self.look(pid), self.operate(), *clients)
        return samples

    async def client(self, rng: random.Random) -> None:
        while not self.is_over:
            names = tuple(rng.sample(NAMES[:4], rng.randrange(3))) or (rng.choice(NAMES),)
            body = {
                "n": rng.choice([1, 1, 2]),
                "stream": rng.random() < 0.5,
                "temperature": rng.choice([0, 1]),
            }
            question = Question(
                names, body, path=rng.choice([COMPLETIONS, CHAT]), max_tokens=rng.randrange(1, 40)
            )
            if rng.random() < 0.05:
                await ask(self.port, question.path, {"model": "x", "nonsense": rng.random()})
            stay_s = rng.random() * 0.3 if rng.random() < 0.1 else 60.0
            try:
                async with asyncio.timeout(stay_s):
                    self.totals.take(Said.of(question, await ask(self.port, question.path, question.json)))
            except TimeoutError:
                self.totals.left += 1
                if stay_s == 60.0:
                    self.totals.problems.append("a request hangs")

    async def operate(self) -> None:
        number = 0
        while not self.is_over:
            await asyncio.sleep(1)
            name = NAMES[number // 2 % 4]
            directory = name if number % 2 else f"{name}-2"
            with contextlib.suppress(OSError):
                path = f"/admin/forget_profiles/{name}/load"
                await ask(self.admin_port, path, {"directory": directory})
            self.totals.swaps += 1
            number += 1

    async def look(self, pid: int) -> list[tuple[float, int, int]]:
        """(seconds, resident bytes, descriptors), from time to time."""
        started, samples = time.monotonic(), []
        while not self.is_over:
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
            samples.append((time.monotonic() - started, resident, len(os.listdir(f"/proc/{pid}/fd"))))
            await asyncio.sleep(SAMPLE_S)
        return samples


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, per hour."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    below = sum((x - mean_x) ** 2 for x, _ in points)
    return 3600 * sum((x - mean_x) * (y - mean_y) for x, y in points) / below


def summary(samples: list[tuple[float, int, int]], totals: Totals) -> dict[str, object]:
    half = samples[len(samples) // 2 :]
    return {
        "row": "soak, mixed traffic + faults",
        "seconds": round(samples[-1][0]),
        **asdict(totals),
        "resident MB": [round(samples[at][1] / 2**20, 1) for at in (0, len(samples) // 2, -1)],
        "resident MB per hour": round(slope([(s, b / 2**20) for s, b, _ in half]), 2),
        "descriptors": [samples[at][2] for at in (0, len(samples) // 2, -1)],
        "descriptors per hour": round(slope([(s, d) for s, _, d in half]), 2),
        "outcome": "passed" if not totals.problems and is_level(half) else "failed",
    }


def is_level(half: list[tuple[float, int, int]]) -> bool:
    """Whether neither memory nor descriptors have risen, but for what one request more or less holds."""
    first, last = half[0], half[-1]
    return last[1] <= first[1] * (1 + MEMORY_NOISE) and last[2] <= first[2] + NUM_CLIENTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--without-faults", action="store_true")
    parser.add_argument("--serve", type=Path, help="used by itself: the model's folder")
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, with_faults=not args.without_faults)
        return 0
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "second").mkdir()
        CanaryModel.write(folder).second_versions(folder / "second")
        command = [sys.executable, __file__, "--serve", work, *(["--without-faults"] * args.without_faults)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            assert server.stdout is not None
            ports = json.loads(server.stdout.readline())
            soak = Soak(ports["port"], ports["admin"], time.monotonic() + args.seconds)
            samples = asyncio.run(soak.run(server.pid))
        finally:
            server.kill()
            server.wait()
    found = summary(samples, soak.totals)
    print(json.dumps(found))
    return 0 if found["outcome"] == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
