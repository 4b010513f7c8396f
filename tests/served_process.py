"""`uld-serve serve` as a process of its own, with nothing faked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from uld_serve.server.listener import bound_socket

START_TIMEOUT_S = 60


@dataclass
class Served:
    url: str
    process: subprocess.Popen[str]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)


def start(*arguments: str, timeout_s: float = START_TIMEOUT_S) -> Served:
    """`uld-serve serve` on a free port, ready or failed."""
    with bound_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    command = [str(Path(sys.executable).parent / "uld-serve"), "serve", "--port", str(port), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return Served(url, process)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server did not start: {process.communicate()[0]}")
