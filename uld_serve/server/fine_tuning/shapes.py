"""Files, jobs and events as clients see them: OpenAI's objects, and under `forget` what is ours. Made by the routes."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import JsonValue

from uld_serve.server.fine_tuning.protocol import JobRequest
from uld_serve.server.fine_tuning.records import Event, Job, Status
from uld_serve.server.responses import Shape

ORGANIZATION = "uld-serve"
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class FileObject(Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"]
    num_lines: int


class FileList(Shape):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Shape):
    id: str
    object: Literal["file"]
    deleted: bool


class JobError(Shape):
    code: str
    message: str
    param: str | None


class JobForget(Shape):
    """Which profile, how far it is, and what its probes found. `digest` is what receipts name once it is live;
    `previous` is of the one whose place it took."""

    profile: str
    digest: str | None
    previous: str | None
    phase: str | None
    step: int | None
    num_steps: int | None
    loss: float | None
    gates: list[dict[str, JsonValue]] | None


class JobObject(Shape):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: JobStatus
    training_file: str
    validation_file: str
    result_files: list[str]
    hyperparameters: dict[str, JsonValue]
    method: dict[str, JsonValue]
    seed: int
    metadata: dict[str, str] | None
    trained_tokens: int | None
    error: JobError | None
    forget: JobForget


class JobList(Shape):
    object: Literal["list"]
    data: list[JobObject]
    has_more: bool


class EventObject(Shape):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue] | None


class EventList(Shape):
    object: Literal["list"]
    data: list[EventObject]
    has_more: bool


def job_object(job: Job, *, model: str) -> JobObject:
    request = JobRequest.model_validate_json(job.request)
    asked = json.loads(job.request)
    given = request.how.hyperparameters.given
    failed = job.error_message is not None
    return JobObject(
        id=job.id,
        object="fine_tuning.job",
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=model,
        fine_tuned_model=f"{model}:{job.name}" if job.status is Status.SUCCEEDED else None,
        organization_id=ORGANIZATION,
        status=job.status.value,
        training_file=job.training_file,
        validation_file=job.retain_file,
        result_files=[],
        hyperparameters={
            name: given.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
        },
        method=asked.get("method") or {"type": request.how.type},
        seed=job.seed,
        metadata=request.metadata,
        trained_tokens=None,
        error=JobError(code=job.error_code or "", message=job.error_message or "", param=None)
        if failed
        else None,
        forget=_forget(job),
    )


def event_object(event: Event) -> EventObject:
    is_metrics = event.data is not None and "train_loss" in event.data
    return EventObject.model_validate(
        {
            "id": event_id(event),
            "object": "fine_tuning.job.event",
            "created_at": event.created_at,
            "level": event.level,
            "message": event.message,
            "type": "metrics" if is_metrics else "message",
            "data": event.data,
        }
    )


def event_id(event: Event) -> str:
    return f"ftevent-{event.number}"


def _forget(job: Job) -> JobForget:
    return JobForget(
        profile=job.name,
        digest=job.digest,
        previous=job.previous if job.status is Status.SUCCEEDED else None,
        phase=None if job.phase is None or not job.is_active else job.phase.value,
        step=job.step,
        num_steps=job.num_steps,
        loss=job.loss,
        gates=None if job.probes is None else json.loads(job.probes).get("gates"),
    )
