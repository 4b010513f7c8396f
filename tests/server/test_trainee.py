"""Processes that train: what they are given, what is heard of them, and how they end."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uld_serve.server.fine_tuning import trainee
from uld_serve.server.fine_tuning.trainee import Ended, Trainee, end_strays


def instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Another program in place of the command line: importing that takes seconds."""
    monkeypatch.setattr(trainee, "_COMMAND", code)


def run(folder: Path, *arguments: str, threads: int | None = None) -> tuple[Ended, list[bytes]]:
    lines: list[bytes] = []
    ended = asyncio.run(Trainee(threads).run(arguments, folder=folder, on_line=lines.append))
    return ended, lines


def test_lines_come_out_and_words_stay_in_a_private_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead(monkeypatch, "import sys; print(*sys.argv[1:]); print('two'); print('a secret', file=sys.stderr)")
    assert run(tmp_path, "train", "--x") == (Ended(0, None), [b"train --x\n", b"two\n"])
    log = tmp_path / "log.txt"
    assert log.read_text() == "a secret\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_refusal_has_the_commands_words_and_a_crash_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "import sys; print('uld-serve: --lr must be positive', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    )
    instead(monkeypatch, said)
    assert run(tmp_path, "2")[0] == Ended(2, "--lr must be positive")
    assert run(tmp_path, "1")[0] == Ended(1, None)


def test_it_has_no_keys_few_threads_and_low_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULD_SERVE_API_KEY", "k" * 20)
    monkeypatch.setenv("ULD_SERVE_ADMIN_KEY", "k" * 20)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    instead(
        monkeypatch,
        "import os, time; time.sleep(0.3); "
        "print([n for n in os.environ if 'ULD_SERVE' in n or 'RANK' in n or 'ELASTIC' in n or 'MASTER' in n], "
        "os.environ['OMP_NUM_THREADS'], os.getpriority(os.PRIO_PROCESS, 0), os.getcwd())",
    )
    _, [line] = run(tmp_path, threads=2)
    words = line.decode().split()
    assert words[:2] == ["[]", "2"]
    assert int(words[2]) >= trainee.NICENESS
    assert words[3] == str(tmp_path)


@pytest.mark.parametrize("delay_s", [0.0, 1.0])
def test_it_ends_when_told_to_also_while_it_is_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    instead(monkeypatch, "import time; time.sleep(600)")

    async def ended() -> Ended:
        one = Trainee()
        running = asyncio.create_task(one.run([], folder=tmp_path, on_line=lambda _: None))
        await asyncio.sleep(delay_s)
        await one.end()
        return await asyncio.wait_for(running, 60)

    assert asyncio.run(ended()).was_killed


def test_it_does_not_outlive_a_cancelled_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")

    async def pid_of_cancelled() -> int:
        lines: asyncio.Queue[bytes] = asyncio.Queue()
        running = asyncio.create_task(Trainee().run([], folder=tmp_path, on_line=lines.put_nowait))
        pid = int(await asyncio.wait_for(lines.get(), 60))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return pid

    pid = asyncio.run(pid_of_cancelled())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_strays_are_ended_and_nobody_else(tmp_path: Path) -> None:
    """One of our commands in the folder, another program there, and one of our commands elsewhere."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    sleep = "; import time; time.sleep(600)"
    ours = trainee._COMMAND.replace("; sys.exit(main())", sleep).replace(
        "from uld_serve.cli import main", "0"
    )
    codes = {"jobs": ours, ".": "import time; time.sleep(600)", "elsewhere": ours}
    started = {
        where: subprocess.Popen(
            [sys.executable, "-c", code, trainee._COMMAND if code == ours else "x"], cwd=tmp_path / where
        )
        for where, code in codes.items()
    }
    try:
        time.sleep(0.5)
        assert end_strays(tmp_path / "jobs") == 1
        assert started["jobs"].wait(10) == -9
        assert started["."].poll() is started["elsewhere"].poll() is None
    finally:
        for process in started.values():
            process.kill()
            process.wait()
