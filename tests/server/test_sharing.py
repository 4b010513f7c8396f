"""`uld-serve serve --tensor-parallel 2`: answers as one process gives them, and an end when one of the two dies."""

from __future__ import annotations

import contextlib
import os
import signal
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
    (child,) = (
        int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if b"--tensor-parallel" in Path(f"/proc/{word}/cmdline").read_bytes()
    )  # fmt: skip
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
