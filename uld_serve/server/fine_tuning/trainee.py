"""One command in a process of its own: low priority, without the server's keys, its standard output read line by
line. Started by foreman. Knows no job and no command.

A server that is killed leaves it behind. It ends by itself when it next writes to the pipe that nobody reads, and
`end_strays` ends it before anything else is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uld_serve.server.keys import ADMIN_KEY_VARIABLE, KEY_VARIABLE

# What torchrun tells the processes that share a model; a training is none of them, and would wait for the others.
OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
LOG = "log.txt"
NICENESS = 10
LINE_BYTES = 2**20
END_S = 5.0
REFUSED_STATUS = 2
"""The command line's, for an error that it has words for."""
_COMMAND = "import sys; from uld_serve.cli import main; sys.exit(main())"
_PREFIX = "uld-serve: "


@dataclass(frozen=True, slots=True)
class Ended:
    """`status` is negative for a signal; `reason` is what the command said that was wrong, if it had words."""

    status: int
    reason: str | None

    @property
    def was_killed(self) -> bool:
        return self.status < 0


@dataclass(slots=True)
class Trainee:
    """At most one process at a time, in the folder of its job."""

    threads: int | None = None
    _process: Process | None = field(default=None, init=False)
    _is_ended: bool = field(default=False, init=False)

    async def run(self, arguments: Sequence[str], *, folder: Path, on_line: Callable[[bytes], None]) -> Ended:
        """Until it ends, or `end` is called."""
        self._is_ended = False
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-c",
                _COMMAND,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=self._environment(),
                start_new_session=True,
                limit=LINE_BYTES,
            )
        finally:
            os.close(log)
        try:
            return await self._followed(self._process, folder, on_line)
        finally:
            if self._process.returncode is None:
                _signal(self._process, signal.SIGKILL)
                await self._process.wait()
            self._process = None

    async def end(self) -> None:
        """Ask it to end, and make it; returns when it has."""
        self._is_ended = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        _signal(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            _signal(process, signal.SIGKILL)
            await process.wait()

    async def _followed(self, process: Process, folder: Path, on_line: Callable[[bytes], None]) -> Ended:
        with contextlib.suppress(ProcessLookupError):
            niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, process.pid))
            os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
        if self._is_ended:  # asked for while it was being started
            _signal(process, signal.SIGTERM)
        assert process.stdout is not None
        async for line in process.stdout:
            on_line(line)
        status = await process.wait()
        return Ended(status, _last_words(folder / LOG) if status == REFUSED_STATUS else None)

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in (KEY_VARIABLE, ADMIN_KEY_VARIABLE) and not name.startswith(OF_A_GROUP)
        }
        return kept if self.threads is None else {**kept, "OMP_NUM_THREADS": str(self.threads)}


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_words(log: Path) -> str | None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
    return said[-1] if said else None


def end_strays(folder: Path, *, timeout_s: float = END_S) -> int:
    """Kill what a server that was killed left running in `folder` or below; how many there were. Where the system does
    not tell (no /proc) there is nothing to be found."""
    found = [pid for pid in _pids() if _is_ours(pid, folder.resolve())]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while any(_is_ours(pid, folder.resolve()) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    return len(found)


def _pids() -> list[int]:
    proc = Path("/proc")
    return [int(path.name) for path in proc.iterdir() if path.name.isdecimal()] if proc.is_dir() else []


def _is_ours(pid: int, folder: Path) -> bool:
    """Whether it is one of our commands and works below the folder; one that has ended has no working folder."""
    try:
        where = Path(os.readlink(f"/proc/{pid}/cwd"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return where.is_relative_to(folder) and _COMMAND.encode() in words
