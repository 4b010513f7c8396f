"""A peer as a process of its own that stands still while others are timed. Used by run.py. Knows no peer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peer import READY, Job

LAST_LOG_LINES = 3
CLOSE_TIMEOUT_S = 10.0


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


@dataclass(frozen=True)
class Speed:
    """One job's outcome. `is_whole`: every prompt got all its tokens before the time limit."""

    tokens: int
    seconds: float
    is_whole: bool

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Worker:
    """Starts the process, waits until its model is loaded, and stops it (SIGSTOP) between jobs: threads that spin
    while they wait for work would take the next peer's processors. Raises Unavailable with the process's last words.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- `close` closes it
        # A session of its own: the signals reach the processes that a peer starts, too.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            self._answer(READY[:8])
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def run(self, job: Job) -> Speed:
        """Raises Unavailable; the worker is then closed."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(job.line + "\n")
            self._process.stdin.flush()
            found = json.loads(self._answer('{"tokens"'))
        except (Unavailable, BrokenPipeError) as error:
            self.close()
            raise Unavailable(str(error)) from None
        self._signal(signal.SIGSTOP)
        is_whole = found["tokens"] == len(job.prompts) * job.new_tokens
        return Speed(found["tokens"], found["seconds"], is_whole)

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # what the peer has started may outlive it
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self, beginning: str) -> str:
        """The next line with this beginning; a peer's library may print lines of its own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line
        status = self._process.wait()
        self._log.seek(0)
        words = " | ".join(self._log.read().strip().splitlines()[-LAST_LOG_LINES:])
        raise Unavailable(words or f"exit status {status}")
