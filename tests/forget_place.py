"""A server that makes profiles on request, as a process of its own, killed and started again, and what it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import openai
from served_process import Served, start

PATIENCE_S = 1800.0
Pair = Mapping[str, str]


class Place:
    """Data, settings and the server that is started with them, again and again."""

    def __init__(
        self,
        folder: Path,
        *,
        data: Mapping[str, Sequence[Pair]],
        settings: str,
        gate: Mapping[str, float],
        num_questions: int,
    ) -> None:
        """`data`: the pairs of "forget" and "retain"; `settings`: the top of server.toml."""
        self.folder = folder
        for name, rows in data.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        gates = "".join(f"{name} = {value}\n" for name, value in gate.items())
        (folder / "server.toml").write_text(
            f'{settings}\n[fine_tuning]\nfolder = "{folder / "work"}"\nnum_questions = {num_questions}\n'
            f"[fine_tuning.gate]\n{gates}"
        )
        self.start()

    def start(self) -> None:
        config = str(self.folder / "server.toml")
        self.served: Served = start("--config", config, timeout_s=PATIENCE_S)

    def kill(self) -> None:
        self.served.process.kill()
        self.served.process.communicate()

    def stop(self) -> None:
        self.served.process.terminate()
        self.served.process.communicate(timeout=60)

    def submit(self, *, model: str, name: str, hyperparameters: Mapping[str, object]) -> str:
        client = self.served.client
        forget, retain = (
            client.files.create(file=self.folder / f"{side}.jsonl", purpose="fine-tune")
            for side in ("forget", "retain")
        )
        return client.fine_tuning.jobs.create(
            model=model,
            training_file=forget.id,
            validation_file=retain.id,
            suffix=name,
            method={"type": "margin", "margin": {"hyperparameters": dict(hyperparameters)}},
        ).id

    def job(self, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
        return self.served.client.fine_tuning.jobs.retrieve(job_id)

    def messages(self, job_id: str) -> list[str]:
        """Oldest first."""
        events = self.served.client.fine_tuning.jobs.list_events(job_id, limit=100)
        return [event.message for event in events][::-1]

    def has_told(self, job_id: str, opening: str) -> bool:
        return any(message.startswith(opening) for message in self.messages(job_id))

    def ended(self, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
        until(lambda: self.job(job_id).status not in ("queued", "running"))
        return self.job(job_id)

    def trainer(self) -> int | None:
        """The pid of the process that trains."""
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                is_there = Path(os.readlink(path / "cwd")).is_relative_to(self.folder / "work")
                if path.name.isdecimal() and is_there and b"train" in (path / "cmdline").read_bytes():
                    return int(path.name)
        return None


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)
