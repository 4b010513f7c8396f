"""What a measurement was made on: device, threads, copy bandwidth, load, versions. Called first by every bench
command. Knows nothing of what is measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import uld_serve
from uld_serve.bench.timing import synchronize

# Larger than any last-level cache that we know of, so that the copy goes to memory.
COPY_BYTES = 256 * 2**20
COPY_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Environment:
    """`copy_gb_per_s` counts bytes read and bytes written; `load_average` is of the last minute, before the run."""

    device: str
    device_name: str
    threads: int
    cores: int
    copy_gb_per_s: float
    load_average: float
    versions: dict[str, str]
    commit: str | None

    @classmethod
    def look(cls, device: torch.device) -> Environment:
        load = os.getloadavg()[0]  # before the copy below adds to it
        return cls(
            device=str(device),
            device_name=_device_name(device),
            threads=torch.get_num_threads(),
            cores=os.cpu_count() or 1,
            copy_gb_per_s=round(copy_bandwidth(device) / 1e9, 2),
            load_average=round(load, 2),
            versions={
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "uld_serve": uld_serve.__version__,
            },
            commit=_commit(),
        )

    @property
    def is_busy(self) -> bool:
        """Whether other work takes so much of the machine that times mean little."""
        return self.load_average > self.cores / 2

    @property
    def line(self) -> str:
        return (
            f"{self.device} ({self.device_name}), {self.threads} threads, "
            f"copy {self.copy_gb_per_s:.1f} GB/s, load {self.load_average:.2f} on {self.cores} cores"
        )

    def record(self) -> dict[str, str | int | float | dict[str, str] | None]:
        return asdict(self)


def copy_bandwidth(device: torch.device, num_bytes: int = COPY_BYTES) -> float:
    """Bytes a second, read and written, of the fastest of a few copies."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = float("inf")
    for _ in range(COPY_ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * num_bytes / best


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Of the source tree that this runs from; None for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
