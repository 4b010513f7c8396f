"""The processes of one server that share its model: started by torchrun, or by the first of them. Called by
`uld-serve serve`. Knows no request.

Rank 0 listens, schedules and samples; the others have no socket and no key. When one dies the others end: rank 0 with
an error for every request that runs and exit status 1, at the latest after LOST_GRACE_S.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from uld_serve.engine.following import follow
from uld_serve.engine.ranks import Ranks
from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import load_base, model_dir
from uld_serve.model.shards import check_divides
from uld_serve.server.settings import ServerSettings

logger = logging.getLogger(__name__)

LOST_GRACE_S = 10.0
STOP_TIMEOUT_S = 20.0
LOCAL_HOST = "127.0.0.1"


@dataclass(slots=True)
class Sharing:
    """`environment` has torchrun's variables, or none of them."""

    settings: ServerSettings
    environment: Mapping[str, str]
    size: int
    is_lost: bool = False

    @classmethod
    def of(cls, settings: ServerSettings, environment: Mapping[str, str]) -> Sharing:
        """Raises InvalidRequest for sizes that contradict each other."""
        world = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
        size = settings.tensor_parallel or world
        if world not in (1, size):
            raise InvalidRequest(
                f"torchrun has started {world} processes, and --tensor-parallel is {size}; leave one of them out"
            )
        if size > 1 and settings.device not in ("auto", "cpu", "cuda"):
            raise InvalidRequest(
                f"{size} processes cannot share {settings.device}: each takes a device of its own"
            )
        return cls(settings, dict(environment), size)

    @property
    def follows(self) -> bool:
        return self.size > 1 and self.environment.get("RANK", "0") != "0"

    def follow(self) -> int:
        """What every rank but the first does, until rank 0 stops."""
        check_divides(model_dir(self.settings.model), self.size)
        ranks = self._join(lambda: os._exit(1))
        # Rank 0 ends first, when its requests are done, and then tells.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        settings = self.settings
        base = load_base(settings.model, dtype=settings.dtype, device=settings.device, part=ranks.part)
        follow(base, ranks, settings.engine)
        return 0

    @contextmanager
    def led(self) -> Iterator[Ranks | None]:
        """Rank 0's company while the server runs; None where it needs none."""
        if self.size == 1:
            yield None
            return
        check_divides(model_dir(self.settings.model), self.size)  # before anybody waits for anybody
        started = [] if "RANK" in self.environment else self._start_others()
        try:
            ranks = self._join(self._end_soon)
            try:
                yield ranks
            finally:
                ranks.leave()
        finally:
            for process in started:
                _end(process)

    def _join(self, on_lost: Callable[[], None]) -> Ranks:
        return Ranks.join(self.size, self.environment, device=self.settings.device, on_lost=on_lost)

    def _start_others(self) -> list[subprocess.Popen[bytes]]:
        """The same command, once a rank, on this machine; afterwards this process is rank 0."""
        with socket.socket() as probe:
            probe.bind((LOCAL_HOST, 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": LOCAL_HOST, "MASTER_PORT": port, "WORLD_SIZE": str(self.size)}
        command = [sys.executable, "-m", "uld_serve", *sys.argv[1:]]
        started = [
            # A session of its own: Ctrl-C is for rank 0, which tells the others when it has ended.
            subprocess.Popen(
                command, env={**self.environment, **shared, **_place(rank)}, start_new_session=True
            )
            for rank in range(1, self.size)
        ]
        os.environ.update({**shared, **_place(0)})  # torch reads them there
        self.environment = {**self.environment, **shared, **_place(0)}
        return started

    def _end_soon(self) -> None:
        """From a thread: the one that steps may wait for a sum that never comes."""
        logger.error("a process that shares this model is gone; this one ends")
        self.is_lost = True
        last = threading.Timer(LOST_GRACE_S, os._exit, [1])
        last.daemon = True
        last.start()
        os.kill(os.getpid(), signal.SIGTERM)


def _place(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
