"""Starts `uld-serve serve` in a process of its own on a free loopback port and stops it again. Used by the demo and
by bench serve. Knows the command, nothing inside.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from uld_serve.errors import EngineStopped

START_TIMEOUT_S = 540.0
STOP_TIMEOUT_S = 30.0
LAST_LOG_LINES = 5


@contextmanager
def running_server(
    arguments: Sequence[str] = (), *, say: Callable[[float], None] = lambda _: None
) -> Iterator[str]:
    """Its URL. `say` is told the seconds waited. Raises EngineStopped with its last words when it does not start."""
    port = _free_port()
    command = "import sys; from uld_serve.cli import main; sys.exit(main())"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", command, "serve", "--port", str(port), *arguments],
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if name != "ULD_SERVE_API_KEY"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(url, process, log, say)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(
    url: str, process: subprocess.Popen[bytes], log: IO[bytes], say: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while not _is_ready(url):
        say(time.monotonic() - started)
        if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()[-LAST_LOG_LINES:]
            raise EngineStopped("the server did not start: " + " | ".join(lines))
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
