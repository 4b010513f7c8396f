"""A server as a process of its own, ended and starved in the ways in which machines do it: told to stop under load,
killed while it loads, without disk, without descriptors, under a clock that jumps."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from canary import CanaryModel
from canary_server import Question, Said
from raw_client import Reply, ask
from scale import scaled

from uld_serve.profiles.store import read_profile

NUM_TERMS = scaled(fast=1, gate=5, aim=200)
NUM_KILLS = scaled(fast=2, gate=10, aim=100)
START_S, STOP_S = 90, 40
SERVE = "import sys; from uld_serve.cli import main; sys.exit(main())"


@dataclass
class Process:
    process: subprocess.Popen[bytes]
    port: int
    admin_port: int
    log: Path

    async def ask(self, question: Question) -> Said:
        return Said.of(question, await ask(self.port, question.path, question.json))

    async def load(self, name: str, directory: str) -> Reply:
        return await ask(self.admin_port, f"/admin/forget_profiles/{name}/load", {"directory": directory})

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if asyncio.run(ask(self.port, "/ready", b"", method="GET")).status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(self.log.read_text(errors="replace")[-2000:])


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture
def roots(canary: CanaryModel, tmp_path: Path) -> Path:
    """Profiles to start with, and beside them, for the operators to load, second versions of them."""
    for name in ("late", "own"):
        shutil.copytree(canary.profiles / name, tmp_path / "profiles" / name)
    return tmp_path / "profiles"


@pytest.fixture
def serve(canary: CanaryModel, tmp_path: Path, roots: Path) -> Callable[..., object]:
    @contextmanager
    def started(
        *,
        code: str = SERVE,
        limits: Callable[[], None] | None = None,
        is_awaited: bool = True,
        **settings: object,
    ) -> Iterator[Process]:
        port, admin_port = free_ports()
        text = {"host": "127.0.0.1", "port": port, "model": str(canary.folder), "profiles": [str(roots)]}
        text |= {"dtype": "float32", "kv_cache_bytes": 2**20, "own_kv_bytes": 2**20, **settings}
        config = tmp_path / "server.toml"
        lines = [f"{name} = {json.dumps(value)}" for name, value in text.items()]
        config.write_text("\n".join([*lines, "[admin]", f"port = {admin_port}", "[limits]", "grace_s = 4"]))
        log = tmp_path / "log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", code, "serve", "--config", str(config)],
                stdout=file,
                stderr=file,
                preexec_fn=limits,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        found = Process(process, port, admin_port, log)
        try:
            if is_awaited:
                found.wait_ready()
            yield found
        finally:
            process.kill()
            process.wait()

    return started


@pytest.mark.row("SIGTERM under load")
@pytest.mark.timeout(7200)
def test_told_to_stop_it_finishes_what_it_can_and_says_so_to_the_others(
    serve: Callable[..., object], record_property: Callable[[str, object], None]
) -> None:
    async def under_load(server: Process) -> list[Said]:
        short = [Question(("late",), {"stream": True}, max_tokens=8) for _ in range(12)]
        endless = [Question(("own",), {"stream": True, "n": 2}, max_tokens=480) for _ in range(24)]
        asking = [asyncio.create_task(server.ask(question)) for question in [*short, *endless]]
        await asyncio.sleep(0.15)
        server.process.terminate()
        return list(await asyncio.gather(*asking))

    finished = ended = 0
    for _ in range(NUM_TERMS):
        with serve() as server:
            found = asyncio.run(under_load(server))
            assert server.process.wait(STOP_S) == 0, server.log.read_text()[-2000:]
        for said in found:
            assert not said.problems, said.problems
            is_told = b'"error"' in said.reply.data
            assert said.is_answered or is_told or said.reply.status == 0, said.reply
            finished += said.is_answered
            ended += is_told
    assert finished > 0, "nothing was finished within the grace"
    record_property("count", NUM_TERMS)
    record_property("finished", finished)
    record_property("told of an error", ended)


@pytest.mark.row("SIGKILL during load or swap")
@pytest.mark.timeout(7200)
def test_killed_at_any_time_it_starts_again_with_the_profiles_that_it_had(
    canary: CanaryModel,
    roots: Path,
    serve: Callable[..., object],
    record_property: Callable[[str, object], None],
) -> None:
    shutil.copytree(canary.profiles / "late-2", roots.parent / "late-2")

    async def while_swapping(server: Process, after_s: float) -> list[Said]:
        asking = [
            asyncio.create_task(server.ask(Question(("late",), {"stream": True}, max_tokens=60)))
            for _ in range(8)
        ]
        shutil.copytree(roots.parent / "late-2", roots / "late-2")
        loading = asyncio.create_task(server.load("late", "late-2"))
        await asyncio.sleep(after_s)
        server.process.send_signal(signal.SIGKILL)
        found = await asyncio.gather(*asking, loading, return_exceptions=True)
        return [one for one in found if isinstance(one, Said)]

    for number in range(NUM_KILLS):
        if number % 2:
            with serve(is_awaited=False) as server:  # before it is ready
                time.sleep(0.4 + 0.5 * number)
                server.process.kill()
        else:
            with serve() as server:
                for said in asyncio.run(while_swapping(server, 0.02 * number)):
                    assert not said.problems, said.problems
                    assert not (said.is_answered and said.num_finished != 1)
            shutil.rmtree(roots / "late-2")
        for path in roots.iterdir():
            read_profile(path)
        with serve(audit_log=str(roots.parent / "audit.jsonl")) as server:
            for name in ("late", "own"):
                said = asyncio.run(server.ask(Question((name,))))
                assert said.is_answered, said.reply
                assert not said.problems, said.problems
    record_property("count", NUM_KILLS)


@pytest.mark.row("disk full")
@pytest.mark.timeout(600)
def test_without_disk_for_the_audit_log_nothing_is_answered_until_there_is_some(
    roots: Path, serve: Callable[..., object], record_property: Callable[[str, object], None]
) -> None:
    """A limit on the size of files stands for the full disk: writes fail half way through a line."""
    audit = roots.parent / "audit.jsonl"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 2**30))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    with serve(limits=small_files, audit_log=str(audit)) as server:
        statuses = [asyncio.run(server.ask(Question(("late",)))).reply.status for _ in range(12)]
        assert statuses[0] == 200
        assert statuses[-1] == 503
        assert set(statuses) == {200, 503}
        assert asyncio.run(ask(server.port, "/health", b"", method="GET")).status == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2**30, 2**30))
        said = asyncio.run(server.ask(Question(("late",))))
        assert said.is_answered, said.reply
        assert not said.problems
    lines = audit.read_text().splitlines()
    whole = [line for line in lines if line.endswith("}")]
    assert all(json.loads(line)["event"] for line in whole)
    assert len(lines) - len(whole) <= 12
    record_property("count", len(statuses))


@pytest.mark.slow
@pytest.mark.row("EMFILE")
@pytest.mark.timeout(600)
def test_without_descriptors_it_waits_and_serves_again_when_there_are_some(
    serve: Callable[..., object], record_property: Callable[[str, object], None]
) -> None:
    with serve() as server:
        num_open = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (num_open + 8, 65536))
        sockets = []
        for _ in range(40):
            sockets.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        time.sleep(1.5)
        assert server.process.poll() is None, server.log.read_text()[-2000:]
        for one in sockets:
            one.close()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            said = asyncio.run(server.ask(Question(("late",))))
            if said.is_answered:
                break
            time.sleep(0.2)
        assert said.is_answered, said.reply
        assert not said.problems
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (1024, 65536))
        assert asyncio.run(server.ask(Question(("own",)))).is_answered
    record_property("count", len(sockets))


CLOCK_JUMPS = """
import itertools, signal, sys, time
real, jumps = (time.time, time.time_ns), itertools.cycle((86400, -86400, 0))
shift = [0]
def jump(*_):
    shift[0] = next(jumps)
time.time = lambda: real[0]() + shift[0]
time.time_ns = lambda: real[1]() + shift[0] * 10**9
gmtime = time.gmtime
time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)
signal.signal(signal.SIGUSR1, jump)
from uld_serve.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.row("clock ± 1 day")
@pytest.mark.timeout(600)
def test_a_clock_that_jumps_a_day_either_way_ends_no_request(
    roots: Path, serve: Callable[..., object], record_property: Callable[[str, object], None]
) -> None:
    audit = roots.parent / "audit.jsonl"

    async def while_jumping(server: Process) -> list[Said]:
        asking = [
            asyncio.create_task(server.ask(Question((name,), {"stream": True}, max_tokens=60)))
            for name in ("late", "own") * 4
        ]
        for _ in range(6):
            await asyncio.sleep(0.05)
            server.process.send_signal(signal.SIGUSR1)
        return list(await asyncio.gather(*asking))

    with serve(code=CLOCK_JUMPS, audit_log=str(audit)) as server:
        for said in asyncio.run(while_jumping(server)):
            assert said.is_answered, said.reply
            assert not said.problems
        assert asyncio.run(ask(server.port, "/health", b"", method="GET")).status == 200
        server.process.terminate()
        assert server.process.wait(STOP_S) == 0
    days = {line["time"][:10] for line in map(json.loads, audit.read_text().splitlines())}
    assert len(days) >= 2, "the clock did not jump"
    record_property("count", 6)
