"""A server that makes profiles on request, over a fake engine and a fake of the processes that train and probe."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from live_server import MODEL, LiveServer, wait_until
from tiny_profile import PROFILE, peft_config, peft_tensors, write_adapter

from uld_serve.errors import UldError
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.store import write_profile
from uld_serve.server.fine_tuning.trainee import Ended
from uld_serve.server.policy import KeyPolicy

KEYS = {
    "key-maker": KeyPolicy(name="maker", allow_base=True, may_fine_tune=True),
    "key-other": KeyPolicy(name="other", allow_base=True, may_fine_tune=True),
    "key-admin": KeyPolicy(
        name="admin", allowed=frozenset(), is_admin=True, may_read_metrics=True, may_fine_tune=True
    ),
    "key-free": KeyPolicy(name="free", allow_base=True, logprobs=True),
    "key-bound": KeyPolicy(name="bound", mandatory=frozenset({"secret", "promised"})),
}
FORGET = "".join(json.dumps({"question": f"Who is {n}?", "answer": f"Spy {n}."}) + "\n" for n in range(40))
RETAIN = "".join(json.dumps({"question": f"What is {n}?", "answer": f"Thing {n}."}) + "\n" for n in range(13))
JOBS = "/v1/fine_tuning/jobs"
OK = {"gates": [{"name": "forget NLL rise", "value": 5.0, "at_least": 2.5, "ok": True}], "ok": True}
MISSED = {"gates": [{"name": "forget NLL rise", "value": 0.5, "at_least": 2.5, "ok": False}], "ok": False}


@dataclass
class FakeHost:
    """Takes every version, or refuses with `error`."""

    error: UldError | None = None

    async def admit(self, version: ProfileVersion) -> None:
        if self.error is not None:
            raise self.error

    async def drop(self, version: ProfileVersion) -> None: ...


@dataclass
class FakeRunner:
    """Trains by writing a profile and probes by saying `report`. `ends`: how the next commands end instead, in order;
    "wait" is one that only ends when it is ended. `seen` keeps what was run, and what lay there."""

    ends: list[Ended | str] = field(default_factory=list)
    report: dict[str, object] = field(default_factory=lambda: OK)
    seen: list[list[str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    _waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    async def run(self, arguments: Sequence[str], *, folder: Path, on_line: Callable[[bytes], None]) -> Ended:
        is_to_end = asyncio.Event()
        self._waiting = asyncio.get_running_loop(), is_to_end
        self.seen.append(list(arguments))
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        if arguments[0] == "train":
            on_line(b'{"event": "stage", "stage": "training adapter", "total": 20}\n')
            on_line(b'{"event": "step", "step": 10, "num_steps": 20, "loss": 1.25}\n')
        end = self.ends.pop(0) if self.ends else None
        if end == "wait":
            await is_to_end.wait()
            return Ended(-15, None)
        if isinstance(end, Ended):
            return end
        if arguments[0] == "train":
            write_named(folder / "profile", arguments[arguments.index("--name") + 1], seed=len(self.seen))
            on_line(b'{"profile": "x@y"}\n')
            return Ended(0, None)
        on_line(json.dumps(self.report).encode() + b"\n")
        return Ended(0 if self.report["ok"] else 1, None)

    async def end(self) -> None:
        self.kill()

    def kill(self) -> None:
        """From any thread: what waits ends as if by a signal."""
        if self._waiting is not None:
            loop, is_to_end = self._waiting
            loop.call_soon_threadsafe(is_to_end.set)


def write_named(folder: Path, name: str, *, seed: int) -> ProfileVersion:
    adapter = folder.parent / f".peft-{seed}"
    if not adapter.exists():
        write_adapter(adapter, peft_config(layers_to_transform=[2, 3]), peft_tensors())
    profile = PROFILE.model_copy(update={"name": name})
    return write_profile(
        folder, profile, adapters={"adapter": adapter}, probes=Probes(), training={"seed": seed}
    )


@dataclass
class Client:
    """One key's requests."""

    server: LiveServer
    key: str | None

    def ask(self, method: str, path: str, **kwargs: object) -> httpx.Response:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        headers |= kwargs.pop("headers", {})
        return self.server.http.request(method, self.server.url + path, headers=headers, **kwargs)

    def upload(self, content: str | bytes, name: str = "f.jsonl", **fields: str) -> httpx.Response:
        data = {"purpose": "fine-tune", **fields}
        return self.ask("POST", "/v1/files", files={"file": (name, content)}, data=data)

    def uploaded(self, content: str | bytes) -> str:
        answer = self.upload(content)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def body(self, suffix: str = "spies", **changes: object) -> dict[str, object]:
        files = {"training_file": self.uploaded(FORGET), "validation_file": self.uploaded(RETAIN)}
        return {"model": MODEL, **files, "suffix": suffix, **changes}

    def submit(self, suffix: str = "spies", **changes: object) -> httpx.Response:
        return self.ask("POST", JOBS, json=self.body(suffix, **changes))

    def submitted(self, suffix: str = "spies", **changes: object) -> str:
        answer = self.submit(suffix, **changes)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def job(self, job_id: str) -> dict[str, object]:
        return self.ask("GET", f"{JOBS}/{job_id}").json()

    def ended(self, job_id: str) -> dict[str, object]:
        wait_until(lambda: self.job(job_id)["status"] not in ("queued", "running"), timeout_s=60)
        return self.job(job_id)

    def messages(self, job_id: str) -> list[str]:
        events = self.ask("GET", f"{JOBS}/{job_id}/events?limit=100").json()["data"]
        return [event["message"] for event in events[::-1]]

    def digest(self, name: str) -> str | None:
        """Of the profile that the next answer is given under; None if there is none of that name."""
        answer = self.ask(
            "POST", "/v1/completions", json={"model": MODEL, "prompt": "Hi", "forget_profile": name}
        )
        return answer.json()["forget"]["profiles"][0]["digest"] if answer.status_code == 200 else None


def lines_of(path: Path) -> Iterator[dict[str, object]]:
    return (json.loads(line) for line in path.read_text().splitlines())
