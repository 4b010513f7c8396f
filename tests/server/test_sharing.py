"""`uld-serve serve --tensor-parallel 2`: answers as one process gives them, and an end when one of the two dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import served_process
from tiny_base import Tiny

from uld_serve.errors import InvalidRequest, ModelUnsupported
from uld_serve.llm import LLM, SamplingParams
from uld_serve.model.shards import check_divides
from uld_serve.server.listener import bound_socket
from uld_serve.server.settings import ServerSettings
from uld_serve.server.sharing import LOST_GRACE_S, Sharing

PROMPT = "What is it?"


@pytest.fixture
def shared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[served_process.Served]:
    monkeypatch.setattr(served_process, "START_TIMEOUT_S", 150)
    profile = str(tiny.profiles["late-fork"][0])
    served = served_process.start(
        "--model", str(tiny.folder), "--profiles", profile, "--dtype", "float32",
        "--kv-cache-bytes", str(2**24), "--tensor-parallel", "2",
    )  # fmt: skip
    yield served
    served.process.kill()
    served.process.communicate()


def complete(url: str, **fields: object) -> httpx.Response:
    body = {"model": "tiny-llama:late-fork", "prompt": PROMPT, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def other_process(pid: int) -> int:
    (child,) = children(pid)
    return child


@pytest.mark.timeout(400)
def test_two_processes_answer_as_one_and_end_when_one_dies(shared: served_process.Served, tiny: Tiny) -> None:
    llm = LLM(str(tiny.folder), profiles=tiny.profiles["late-fork"][0], dtype="float32")
    alone = llm.generate([PROMPT], SamplingParams(max_tokens=24, temperature=0.0), profile="late-fork")[0]
    answer = complete(shared.url, max_tokens=24)
    assert answer.json()["choices"][0]["text"] == alone.text
    assert answer.headers["X-Forget-Profile"] == alone.receipt.header

    other = other_process(shared.process.pid)
    body = {
        "model": "tiny-llama:late-fork", "prompt": PROMPT, "max_tokens": 400, "stream": True,
        "temperature": 1, "ignore_eos": True,
    }  # fmt: skip
    rest = []
    with httpx.stream("POST", f"{shared.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(other, signal.SIGKILL)
        with contextlib.suppress(httpx.RemoteProtocolError):  # it is cut off behind its error
            for line in lines:
                rest.append(line)
    assert "data: [DONE]" not in rest
    assert any('"ranks_lost"' in line or '"engine_stopped"' in line for line in rest)
    began = time.monotonic()
    assert shared.process.wait(timeout=60) == 1
    assert time.monotonic() - began < LOST_GRACE_S + 5


@pytest.mark.timeout(400)
def test_the_other_process_ends_when_the_first_is_killed(shared: served_process.Served) -> None:
    other = other_process(shared.process.pid)
    shared.process.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{other}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists()


@pytest.mark.timeout(400)
def test_torchrun_starts_the_same_and_an_orderly_stop_ends_all(tiny: Tiny) -> None:
    with bound_socket("127.0.0.1", 0) as sock, bound_socket("127.0.0.1", 0) as other:
        port, master = sock.getsockname()[1], other.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(master),
            "-m", "uld_serve", "serve", "--port", str(port), "--model", str(tiny.folder),
            "--profiles", str(tiny.profiles["late-fork"][0]), "--dtype", "float32",
            "--kv-cache-bytes", str(2**24),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, process)
        ranks = children(process.pid)
        assert len(ranks) == 2
        assert complete(url, max_tokens=4).status_code == 200
        listening = [rank for rank in ranks if owns_port(rank, port)]
        assert len(listening) == 1
        os.kill(listening[0], signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    finally:
        process.kill()
        process.communicate()


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[0])


def children(pid: int) -> list[int]:
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in words if b"uld_serve" in Path(f"/proc/{word}/cmdline").read_bytes()]


def owns_port(pid: int, port: int) -> bool:
    """Whether one of the process's sockets listens there."""
    inodes = {
        fields[9]
        for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
        if int(fields[1].split(":")[1], 16) == port and fields[3] == "0A"
    }
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    return any(link.removeprefix("socket:[").rstrip("]") in inodes for link in links)


def test_a_model_whose_heads_do_not_divide_is_refused_with_the_numbers(tiny: Tiny) -> None:
    with pytest.raises(
        ModelUnsupported, match=r"3 does not divide 4 \(query heads\) nor 2 \(key/value heads\)"
    ):
        check_divides(tiny.folder, 3)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="started 2 processes, and --tensor-parallel is 4"):
        Sharing.of(ServerSettings(tensor_parallel=4), {"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(InvalidRequest, match="cannot share cuda:1"):
        Sharing.of(ServerSettings(tensor_parallel=2, device="cuda:1"), {})


def test_torchrun_alone_says_how_many_share_a_model() -> None:
    assert Sharing.of(ServerSettings(), {"RANK": "1", "WORLD_SIZE": "2"}).follows
    assert not Sharing.of(ServerSettings(), {"RANK": "0", "WORLD_SIZE": "2"}).follows
    assert Sharing.of(ServerSettings(), {}).size == 1
