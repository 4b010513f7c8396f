"""What a key may do with files and jobs: the whole of forgetting on request, behind its routes. Made by serving;
hands out nothing that generates. Knows no HTTP.

A key sees its own files and jobs; an admin's key sees all. What the audit log cannot record is not done.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from uld_serve.data.documents import Document, refuse_overlap
from uld_serve.errors import DataError, EngineStopped, InvalidRequest, NotFound, Overloaded, ProfileError
from uld_serve.server.fine_tuning.file_store import documents_of
from uld_serve.server.fine_tuning.foreman import Foreman, Runner
from uld_serve.server.fine_tuning.ledger import LedgerUnavailable
from uld_serve.server.fine_tuning.names import Names
from uld_serve.server.fine_tuning.order import BaseChoice
from uld_serve.server.fine_tuning.premises import Premises
from uld_serve.server.fine_tuning.protocol import JobRequest
from uld_serve.server.fine_tuning.records import ACTIVE, Event, Job, StoredFile
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.fine_tuning.trainee import Trainee
from uld_serve.server.loader import Loader
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.telemetry import Telemetry

QUEUE_RETRY_S = 60
MIN_RETAIN_LINES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """`is_draining`: whether nothing new is taken."""

    settings: FineTuningSettings
    premises: Premises
    foreman: Foreman
    telemetry: Telemetry
    is_draining: Callable[[], bool]

    @classmethod
    def of(
        cls,
        settings: FineTuningSettings,
        premises: Premises,
        *,
        base: BaseChoice,
        loader: Loader,
        policies: Callable[[], Iterable[KeyPolicy]],
        telemetry: Telemetry,
        is_draining: Callable[[], bool],
        runner: Runner | None = None,
    ) -> Workshop:
        """`runner`: what runs commands; processes, unless told."""

        def record(event: str, job: Job) -> None:
            telemetry.record(
                event, key=job.owner, job=job.id, profile=job.name, digest=job.digest, previous=job.previous
            )

        foreman = Foreman(
            premises=premises,
            settings=settings,
            base=base,
            runner=runner or Trainee(settings.threads),
            live=loader,
            names=Names(loader.registry, premises.ledger, policies),
            record=record,
            on_end=lambda status: telemetry.metrics.jobs.labels(status.value).inc(),
        )
        return cls(
            settings=settings,
            premises=premises,
            foreman=foreman,
            telemetry=telemetry,
            is_draining=is_draining,
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Jobs are worked on meanwhile; afterwards nothing of it runs any more."""
        work = asyncio.create_task(self.foreman.work())
        try:
            yield
        finally:
            with contextlib.suppress(LedgerUnavailable):  # then this end counts as one of the job's starts
                self.foreman.note_stop()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            self.premises.close()

    async def upload(self, policy: KeyPolicy, filename: str, content: bytes) -> StoredFile:
        """Raises InvalidRequest naming the first wrong line, PayloadTooLarge, Overloaded."""
        self._require_open()
        file = await asyncio.to_thread(self.premises.files.add, policy.name, filename, content)
        try:
            self.telemetry.record(
                "file_uploaded", key=policy.name, file=file.id, bytes=file.num_bytes, lines=file.num_lines
            )
        except BaseException:
            self.premises.files.remove(file)
            raise
        return file

    def files(self, policy: KeyPolicy) -> list[StoredFile]:
        return self.premises.ledger.files(_owner(policy))

    def file(self, policy: KeyPolicy, file_id: str) -> StoredFile:
        """Raises NotFound, also for another key's."""
        file = self.premises.ledger.file(file_id)
        if not _may_see(policy, file.owner):
            raise NotFound("there is no such file of this key")
        return file

    async def content(self, policy: KeyPolicy, file_id: str) -> bytes:
        file = self.file(policy, file_id)
        self.telemetry.record("file_read", key=policy.name, file=file.id)
        return await asyncio.to_thread(self.premises.files.content, file)

    async def delete(self, policy: KeyPolicy, file_id: str) -> StoredFile:
        """Raises ProfileError (409) while a job needs it."""
        file = self.file(policy, file_id)
        for job in self.premises.ledger.jobs(statuses=ACTIVE):
            if file.id in (job.training_file, job.retain_file):
                raise ProfileError(f"{job.id} needs this file; cancel it, or wait for it", code="file_in_use")
        self.telemetry.record("file_deleted", key=policy.name, file=file.id)
        self.premises.files.remove(file)
        return file

    async def submit(self, policy: KeyPolicy, request: JobRequest) -> Job:
        """Raises NotFound for a file, InvalidRequest for what is in it, ProfileError for a name that is taken,
        Overloaded when the queue is full."""
        self._require_open()
        training_file = self._named(policy, request.training_file, "training_file")
        retain_file = self._named(policy, request.validation_file, "validation_file")
        await asyncio.to_thread(self._require_usable, training_file, retain_file)
        # From here on nothing waits, so that two requests cannot both get the last place, or one name.
        if len(self.premises.ledger.jobs(statuses=ACTIVE)) >= self.settings.max_queued:
            raise Overloaded("the queue of jobs is full; try later", retry_after_s=QUEUE_RETRY_S)
        self.foreman.names.require_free(request.suffix, policy.name)
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        job = Job(
            id=f"ftjob-{secrets.token_hex(12)}",
            owner=policy.name,
            name=request.suffix,
            request=request.model_dump_json(by_alias=True, exclude_unset=True),
            training_file=training_file.id,
            retain_file=retain_file.id,
            seed=seed,
            created_at=int(time.time()),
        )
        for file in (training_file, retain_file):  # either may have been deleted meanwhile
            self.file(policy, file.id)
        self.telemetry.record(
            "job_created",
            key=policy.name,
            job=job.id,
            profile=job.name,
            method=request.how.type,
            training_file=job.training_file,
            retain_file=job.retain_file,
        )
        self.premises.ledger.add_job(job)
        self.foreman.wake()
        return job

    def jobs(self, policy: KeyPolicy) -> list[Job]:
        return self.premises.ledger.jobs(_owner(policy))

    def job(self, policy: KeyPolicy, job_id: str) -> Job:
        """Raises NotFound, also for another key's."""
        job = self.premises.ledger.job(job_id)
        if not _may_see(policy, job.owner):
            raise NotFound("there is no such job of this key")
        return job

    def events(self, policy: KeyPolicy, job_id: str) -> list[Event]:
        return self.premises.ledger.events(self.job(policy, job_id).id)

    async def cancel(self, policy: KeyPolicy, job_id: str) -> Job:
        """Raises ProfileError (409) for one that has ended or is going live."""
        job = self.job(policy, job_id)
        if job.is_active:
            self.telemetry.record("job_cancelling", key=policy.name, job=job.id)
        if not await self.foreman.cancel(job.id):
            job = self.job(policy, job_id)
            what = "is going live" if job.is_active else f"has {job.status}"
            raise ProfileError(f"this job {what}; it can no longer be cancelled", code="job_not_cancellable")
        return self.job(policy, job_id)

    def _require_open(self) -> None:
        if self.is_draining():
            raise EngineStopped("the server is draining: it finishes what it has and takes no more")

    def _named(self, policy: KeyPolicy, file_id: str, param: str) -> StoredFile:
        try:
            return self.file(policy, file_id)
        except NotFound as error:
            error.param = param
            raise

    def _require_usable(self, training_file: StoredFile, retain_file: StoredFile) -> None:
        files = self.premises.files
        forget, retain = (
            [replace(one, columns={}) for one in documents_of(files.content(file), name=f"{param} line ")]
            for file, param in ((training_file, "training_file"), (retain_file, "validation_file"))
        )
        if len(retain) < MIN_RETAIN_LINES:
            raise InvalidRequest(
                "validation_file has one line; some must be left to measure with", param="validation_file"
            )
        _require_apart(forget, retain)


def _require_apart(forget: Sequence[Document], retain: Sequence[Document]) -> None:
    try:
        refuse_overlap(forget, retain, names=("training_file", "validation_file"))
    except DataError as error:
        raise InvalidRequest(error.message, param="validation_file") from None


def _owner(policy: KeyPolicy) -> str | None:
    return None if policy.is_admin else policy.name


def _may_see(policy: KeyPolicy, owner: str) -> bool:
    return policy.is_admin or policy.name == owner
