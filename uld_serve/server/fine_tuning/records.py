"""What is known of an uploaded file, of a job, of its events and of the profiles that jobs have made. Rows of the
ledger; times in Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """OpenAI's words. Files are checked before a job is there, so no job is validating them."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """Of a running job. What is going live can no longer be cancelled."""

    TRAINING = "training"
    PROBING = "probing"
    GOING_LIVE = "going live"


ACTIVE = (Status.QUEUED, Status.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """`owner`: the name of the key that uploaded it."""

    id: str
    owner: str
    filename: str
    num_bytes: int
    num_lines: int
    sha256: str
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`request` is the checked request's JSON. `num_starts` counts how often its training was begun or gone on with;
    `digest` is of the profile that it made, `previous` of the one that this took the place of; `probes` is what
    `profiles verify` found."""

    id: str
    owner: str
    name: str
    request: str
    training_file: str
    retain_file: str
    seed: int
    created_at: int
    status: Status = Status.QUEUED
    phase: Phase | None = None
    started_at: int | None = None
    finished_at: int | None = None
    num_starts: int = 0
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    digest: str | None = None
    previous: str | None = None
    probes: str | None = None
    error_code: str | None = None
    error_message: str | None = None

    @property
    def is_active(self) -> bool:
        return self.status in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`number` orders all events of a server."""

    number: int
    job_id: str
    created_at: int
    level: str
    message: str
    data: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeProfile:
    """What a name means since a job went live: a folder's name in the store."""

    name: str
    directory: str
    digest: str
    owner: str
    job_id: str
