"""`bench serve` sends an open-loop load, counts every failure, and times from when a request was due."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from tiny_base import Tiny

from uld_serve import cli
from uld_serve.bench.load import Load, drive

Bench = Callable[..., dict]


def sse(*events: object) -> bytes:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return b"".join(f"data: {line}\n\n".encode() for line in lines)


TOKEN = {"choices": [{"text": "x"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


@dataclass
class FakeServer:
    """Answers each completion with the next of `answers`; the last one again and again. A float is a pause in
    seconds, bytes are sent, and then the connection is closed."""

    answers: list[list[bytes | float]] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.answer(reader, writer)
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/models "):
            body = json.dumps({"data": [{"id": "base"}]}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
            )
        else:
            (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            self.bodies.append(json.loads(await reader.readexactly(int(length.split(b":")[1]))))
            self.headers.append(head)
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
            for part in self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]:
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    writer.write(part)
                    await writer.drain()
            self.num_open -= 1


def chunked(*parts: bytes | float) -> list[bytes | float]:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [
        head,
        *(p if isinstance(p, float) else b"%x\r\n%s\r\n" % (len(p), p) for p in parts),
        b"0\r\n\r\n",
    ]


GOOD = chunked(sse(TOKEN), 0.1, sse(TOKEN, TOKEN), sse(USAGE, "[DONE]"))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake, ready = FakeServer(), threading.Event()
    stops: list[Callable[[], object]] = []

    async def listen() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(fake.handle, "127.0.0.1", 0) as listening:
            fake.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            stops.append(lambda: loop.call_soon_threadsafe(stop.set))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    assert ready.wait(10)
    yield fake
    stops[0]()
    thread.join()


def load(**changes: object) -> Load:
    settings: dict = {
        "models": ("base",), "rate": 1000.0, "num_requests": 4, "concurrency_cap": 8, "prompt_tokens": 5,
        "max_tokens": 3, "timeout_s": 10.0,
    }  # fmt: skip
    return Load(**(settings | changes))


def test_arrivals_are_a_poisson_process_of_the_rate_asked_for() -> None:
    times = load(rate=4.0, num_requests=4000).due_times()
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)  # of an exponential both are equal
    assert times[0] == 0.0


def test_the_same_seed_gives_the_same_load() -> None:
    assert load(seed=3).due_times() == load(seed=3).due_times() != load(seed=4).due_times()
    assert load(seed=3).body(1) == load(seed=3).body(1) != load(seed=4).body(1)
    assert load().body(0)["prompt"] != load().body(1)["prompt"]


def test_answers_are_timed_event_by_event(server: FakeServer) -> None:
    server.answers = [GOOD]
    run = drive(f"{server.url}/v1", load(), headers={"Authorization": "Bearer k"}, on_done=lambda: None)
    assert [record.failure for record in run.records] == [None] * 4
    for record in run.records:
        assert record.streamed is not None
        assert len(record.streamed.event_times) == record.streamed.completion_tokens == 3
        assert record.gaps_s[0] >= 0.03  # a busy machine may read the first event late
        assert 0 < record.first_token_s < record.total_s
    assert all(b"Authorization: Bearer k" in head for head in server.headers)
    assert server.bodies[0]["ignore_eos"] is True
    assert len(server.bodies[0]["prompt"]) == 5


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"], "http 429"),
        (chunked(sse(TOKEN, {"error": {"message": "no"}})), "error event"),
        (chunked(sse(TOKEN)), "broken stream"),
        (chunked(sse(TOKEN))[:-1], "broken stream"),
        (chunked(sse("[DONE]")), "broken stream"),
        ([b"nonsense\r\n\r\n"], "broken stream"),
        ([2.0], "timeout"),
    ],
)
def test_every_failure_has_a_name(server: FakeServer, answer: list[bytes | float], failure: str) -> None:
    server.answers = [answer]
    run = drive(f"{server.url}/v1", load(num_requests=1, timeout_s=0.3), headers={}, on_done=lambda: None)
    assert [record.failure for record in run.records] == [failure]


def test_a_gap_is_shared_by_the_tokens_that_it_brought(server: FakeServer) -> None:
    def after(tokens: int) -> dict:
        return TOKEN | {"usage": {"completion_tokens": tokens}}

    server.answers = [chunked(sse(after(1)), 0.06, sse(after(4)), 0.02, sse(after(5), "[DONE]"))]
    run = drive(f"{server.url}/v1", load(num_requests=1), headers={}, on_done=lambda: None)
    (record,) = run.records
    assert record.streamed is not None
    first, second, third = record.streamed.event_times
    assert record.gaps_s == pytest.approx([(second - first) / 3] * 3 + [third - second])
    assert server.bodies[0]["stream_options"]["continuous_usage_stats"] is True


def test_nobody_listening_is_a_failure_too() -> None:
    run = drive("http://127.0.0.1:1/v1", load(num_requests=2), headers={}, on_done=lambda: None)
    assert [record.failure for record in run.records] == ["connection"] * 2


def test_waiting_for_a_free_place_counts(server: FakeServer) -> None:
    server.answers = [chunked(0.1, sse(TOKEN, USAGE, "[DONE]"))]
    capped = load(concurrency_cap=1, num_requests=3)
    run = drive(f"{server.url}/v1", capped, headers={}, on_done=lambda: None)
    assert server.most_open == 1
    assert sorted(record.first_token_s for record in run.records)[-1] >= 0.29


def test_command_reports_profiles_and_errors(server: FakeServer, bench: Bench) -> None:
    refused = [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"]
    server.answers = [GOOD, refused, GOOD]
    found = bench(
        "serve", "--url", server.url, "--rate", "20", "--requests", "5", "--profile", "none", "--profile", "hp",
        "--prompt-tokens", "4", "--max-tokens", "3", status=1,
    )  # fmt: skip
    assert [one["mode"] for one in found["results"]] == ["none", "hp", "all"]
    assert [one["requests"] for one in found["results"]] == [3, 2, 5]
    assert found["results"][-1]["errors"] == 1
    assert found["errors"] == {"http 503": 1}
    assert found["results"][-1]["tokens_per_s"] == pytest.approx(12 / found["duration_s"], rel=0.01)
    times = found["results"][-1]["ttft_ms"]
    assert times["p50"] <= times["p90"] <= times["p99"]
    assert {body["model"] for body in server.bodies} == {"base", "base:hp"}


def test_command_without_a_single_answer_still_reports(server: FakeServer, bench: Bench) -> None:
    server.answers = [[b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"]]
    found = bench("serve", "--url", server.url, "--rate", "50", "--requests", "2", status=1)
    assert found["results"][0]["ttft_ms"] is None
    assert found["errors"] == {"http 500": 2}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rate", "0"], "--rate"),
        (["--requests", "0"], "--requests"),
        (["--url", "http://127.0.0.1:1", "--model", "x"], "--model"),
        (["--url", "http://127.0.0.1:1"], "lists no model"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "serve", *arguments]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
def test_command_starts_a_real_server(tiny: Tiny, bench: Bench) -> None:
    folder = tiny.profiles["late-fork"][0].parent
    found = bench(
        "serve", "--model", str(tiny.folder), "--profiles", str(folder), "--device", "cpu", "--rate", "20",
        "--requests", "6", "--prompt-tokens", "40", "--max-tokens", "8", "--profile", "late-fork", "--profile", "none",
    )  # fmt: skip
    assert found["errors"] == {}
    assert [one["mode"] for one in found["results"]] == ["late-fork", "none", "all"]
    assert found["results"][-1]["tokens_per_s"] == pytest.approx(48 / found["duration_s"], rel=0.01)
