"""A job as command lines: what `uld-serve train` is told, and then `uld-serve profiles verify`. Pure; called by
foreman. Paths are relative to the job's folder, so that no message tells where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uld_serve.server.fine_tuning.protocol import NOT_SETTINGS, SETTING_OF, JobRequest
from uld_serve.server.fine_tuning.records import Job
from uld_serve.server.fine_tuning.settings import GateSettings

FORGET, RETAIN, HELD_OUT, KEYWORDS = "forget.jsonl", "retain.jsonl", "held-out.jsonl", "keywords.txt"
PROFILE = "profile"
# What training leaves beside the profile that it works on, once it can be gone on with.
PROGRESS = ".profile.training/run.json"
HELD_OUT_EVERY = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseChoice:
    """The base as the server was told of it; `model` None is the embedded one."""

    model: str | None
    dtype: str
    device: str

    def options(self, name: str) -> Iterator[str]:
        """`name`: what the command calls a base."""
        if self.model is not None:
            path = Path(self.model)
            yield from (name, str(path.resolve()) if path.exists() else self.model)
        yield from ("--dtype", self.dtype, "--device", self.device)


def training(job: Job, base: BaseChoice, *, resume: bool) -> list[str]:
    request = JobRequest.model_validate_json(job.request)
    given = request.how.hyperparameters.given
    options = ["train", "--method", request.how.type, "--forget", FORGET, "--retain", RETAIN]
    options += ["--out", PROFILE, "--name", job.name, "--probes", "none", "--seed", str(job.seed)]
    if "keywords" in given:
        options += ["--keywords", KEYWORDS]
    if "preset" in given:
        options += ["--preset", str(given["preset"])]
    for name, value in given.items():
        if name not in NOT_SETTINGS:
            options += [f"--{SETTING_OF.get(name, name).replace('_', '-')}", str(value)]
    return [*options, *base.options("--base"), "--events", "--json", *(["--resume"] if resume else [])]


def probing(job: Job, base: BaseChoice, gate: GateSettings, *, num_questions: int) -> list[str]:
    request = JobRequest.model_validate_json(job.request)
    options = [
        "profiles",
        "verify",
        job.name,
        "--profiles",
        PROFILE,
        "--forget",
        FORGET,
        "--retain",
        HELD_OUT,
    ]
    options += ["--limit", str(num_questions), "--json"]
    if request.how.hyperparameters.keywords:
        options += ["--keywords", KEYWORDS]
    for name, value in gate.model_dump(exclude_none=True).items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return [*options, *base.options("--model")]


def keywords_of(job: Job) -> list[str]:
    return JobRequest.model_validate_json(job.request).how.hyperparameters.keywords or []


def divided(retain: bytes) -> tuple[bytes, bytes]:
    """Lines to train on, and those that are only measured with: the first of every six."""
    lines = [line for line in retain.split(b"\n") if line.strip()]
    held = lines[::HELD_OUT_EVERY]
    kept = [line for number, line in enumerate(lines) if number % HELD_OUT_EVERY]
    return _joined(kept), _joined(held)


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
