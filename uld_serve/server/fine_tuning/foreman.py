"""Works through the jobs, one at a time: trains, probes, lets the profile go live. Started and stopped with the
application. Knows no HTTP and no tensor: training and probing are processes of their own.

A job is gone on with where it was, whether its process was killed, the server, or both. Whatever goes wrong, the
version that served before serves on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from uld_serve.errors import UldError
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.store import read_profile
from uld_serve.server.fine_tuning import order
from uld_serve.server.fine_tuning.failures import JobFailed, JobGone, broken_off, told_gates
from uld_serve.server.fine_tuning.file_store import write_private
from uld_serve.server.fine_tuning.ledger import LedgerUnavailable, Value
from uld_serve.server.fine_tuning.names import Names
from uld_serve.server.fine_tuning.premises import Premises
from uld_serve.server.fine_tuning.records import ACTIVE, Job, Phase, Status
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.fine_tuning.trainee import Ended
from uld_serve.server.loader import Change

logger = logging.getLogger(__name__)

LEDGER_RETRY_S = 5.0

Record = Callable[[str, Job], None]
"""record(event, job): into the audit log. Raises AuditUnavailable."""


class Runner(Protocol):
    """trainee.Trainee."""

    async def run(
        self, arguments: Sequence[str], *, folder: Path, on_line: Callable[[bytes], None]
    ) -> Ended: ...

    async def end(self) -> None: ...


class Live(Protocol):
    """The part of Loader that is used here."""

    async def load(
        self,
        name: str,
        *,
        directory: str | None = None,
        digest: str | None = None,
        still: Callable[[], None] = lambda: None,
    ) -> Change: ...


@dataclass(slots=True, kw_only=True)
class Foreman:
    premises: Premises
    settings: FineTuningSettings
    base: order.BaseChoice
    runner: Runner
    live: Live
    names: Names
    record: Record
    on_end: Callable[[Status], None] = lambda _status: None
    _has_news: asyncio.Event = field(default_factory=asyncio.Event)
    _current: str | None = None

    async def work(self) -> None:
        """For ever."""
        while True:
            self._has_news.clear()
            job = await self._next()
            if job is None:
                await self._has_news.wait()
                continue
            self._current = job.id
            try:
                await self._do(job)
            except LedgerUnavailable as error:
                logger.error("job %s waits: %s", job.id, error.message)
                await asyncio.sleep(LEDGER_RETRY_S)
            except Exception:  # of clearing up: the next job must not wait for a start because of it
                logger.exception("job %s was not put away", job.id)
                await asyncio.sleep(LEDGER_RETRY_S)
            finally:
                self._current = None

    def wake(self) -> None:
        """There is a new job."""
        self._has_news.set()

    async def cancel(self, job_id: str) -> bool:
        """Whether it was there to be cancelled."""
        to: Mapping[str, Value] = {"status": Status.CANCELLED, "finished_at": int(time.time())}
        if not self.premises.ledger.change(
            job_id, to=to, among=ACTIVE, event=("info", "the job was cancelled")
        ):
            return False
        self.on_end(Status.CANCELLED)
        if self._current == job_id:
            await self.runner.end()
        return True

    def note_stop(self) -> None:
        """Before `work` is cancelled: the job goes on with the next start, and this end does not count against it."""
        if self._current is None:
            return
        job = self.premises.ledger.job(self._current)
        to = {"num_starts": max(0, job.num_starts - 1)}
        event = ("info", "the server stops; the job goes on when it is started again")
        self.premises.ledger.change(job.id, to=to, among=(Status.RUNNING,), event=event)

    async def _next(self) -> Job | None:
        """What was begun comes first, then what was asked for first."""
        while True:
            try:
                jobs = self.premises.ledger.jobs(statuses=ACTIVE)
            except LedgerUnavailable as error:
                logger.error("jobs wait: %s", error.message)
                await asyncio.sleep(LEDGER_RETRY_S)
            else:
                return min(jobs, key=lambda job: job.status is not Status.RUNNING, default=None)

    async def _do(self, job: Job) -> None:
        try:
            if job.phase is not Phase.GOING_LIVE:
                self._begin(job)
                await self._train(job)
                await self._probe(job)
            await self._go_live(job)
        except JobGone:
            await asyncio.to_thread(self.premises.clear, job)
        except LedgerUnavailable:
            raise
        except UldError as error:
            await self._fail(job, error)
        except Exception:
            logger.exception("job %s failed", job.id)
            await self._fail(job, JobFailed("the server failed; its log says why", code="server_error"))

    def _begin(self, job: Job) -> None:
        is_new = job.status is Status.QUEUED
        to: dict[str, Value] = {"status": Status.RUNNING}
        if is_new:
            to["started_at"] = int(time.time())
        words = "the job began" if is_new else "the server was started again; the job goes on where it was"
        self._change(job, to, event=("info", words))

    async def _train(self, job: Job) -> None:
        if self._has_profile(job):
            return
        self._enter(job, Phase.TRAINING)
        await asyncio.to_thread(self._lay_out, job)
        folder = self.premises.of_job(job)

        def arguments() -> list[str]:
            return order.training(job, self.base, resume=(folder / order.PROGRESS).is_file())

        ended, _ = await self._run(job, arguments)
        if ended.status != 0 or not self._has_profile(job):
            raise broken_off("training", ended, code="training_failed")

    async def _probe(self, job: Job) -> None:
        self._enter(job, Phase.PROBING)
        count = self.settings.num_questions

        def arguments() -> list[str]:
            return order.probing(job, self.base, self.settings.gate, num_questions=count)

        ended, told = await self._run(job, arguments)
        if not isinstance(told.get("gates"), list):
            raise broken_off("probing", ended, code="probing_failed")
        self._change(job, {"probes": json.dumps(told)})
        missed = [gate for gate in told["gates"] if not gate["ok"]]
        if missed or ended.status != 0:
            raise JobFailed(
                f"the profile did not pass its probes: {told_gates(missed)}", code="probes_failed"
            )
        self.premises.ledger.note(job.id, "the profile passed its probes", data={"gates": told["gates"]})

    async def _go_live(self, job: Job) -> None:
        """Under its name from the next request on. What cannot be recorded does not go live."""
        ledger, profiles = self.premises.ledger, self.premises.profiles
        made = self.premises.of_job(job) / order.PROFILE
        if job.phase is not Phase.GOING_LIVE:
            version: ProfileVersion = await asyncio.to_thread(read_profile, made)
            before = ledger.made().get(job.name)
            previous = None if before is None else before.digest
            to: Mapping[str, Value] = {
                "phase": Phase.GOING_LIVE,
                "digest": version.digest,
                "previous": previous,
            }
            self._change(job, to)
        job = ledger.job(job.id)
        assert job.digest is not None
        directory = f"{job.name}-{job.digest.removeprefix('sha256:')[:12]}"
        still = partial(self.names.require_free, job.name, job.owner)
        try:
            still()
            await asyncio.to_thread(_move, made, profiles / directory)
            self.record("job_going_live", job)
            await self.live.load(job.name, directory=directory, digest=job.digest, still=still)
        except LedgerUnavailable:
            raise  # it is tried again, with what lies there
        except Exception:
            if not any(one.directory == directory for one in ledger.made().values()):
                await asyncio.to_thread(shutil.rmtree, profiles / directory, ignore_errors=True)
            raise
        ended: Mapping[str, Value] = {"status": Status.SUCCEEDED, "finished_at": int(time.time())}
        ledger.end_going_live(job.id, to=ended, event=("info", f"{job.name}@{job.digest} is live"))
        self.on_end(Status.SUCCEEDED)
        with suppress(UldError):  # it is live, and the line before said that it would be
            self.record("job_live", ledger.job(job.id))
        await asyncio.to_thread(self.premises.clear, job)

    async def _run(self, job: Job, arguments: Callable[[], list[str]]) -> tuple[Ended, dict[str, Any]]:
        """A command to its end, begun again if it is killed, and the last thing that it printed."""
        told: dict[str, Any] = {}

        def on_line(line: bytes) -> None:
            with suppress(ValueError):
                found = json.loads(line)
                told.clear()
                told.update(found)
                self._note_progress(job, found)

        while True:
            self._count_start(job)
            ended = await self.runner.run(arguments(), folder=self.premises.of_job(job), on_line=on_line)
            if not self._is_running(job):
                raise JobGone
            if not ended.was_killed:
                return ended, told
            words = f"the process was ended by signal {-ended.status}; it goes on from its last checkpoint"
            self.premises.ledger.note(job.id, words, level="warn")

    def _count_start(self, job: Job) -> None:
        num_starts = self.premises.ledger.job(job.id).num_starts
        if num_starts >= self.settings.max_starts:
            raise JobFailed(
                f"its process was ended {num_starts} times from outside, and is not begun again",
                code="killed",
            )
        self._change(job, {"num_starts": num_starts + 1})

    def _note_progress(self, job: Job, told: Mapping[str, object]) -> None:
        """A line of `uld-serve train --events`."""
        ledger = self.premises.ledger
        if told.get("event") == "stage":
            ledger.note(job.id, f"{told['stage']} ({told['total']})")
        elif told.get("event") == "step":
            step, total, loss = int(str(told["step"])), int(str(told["num_steps"])), float(str(told["loss"]))
            ledger.change(
                job.id, to={"step": step, "num_steps": total, "loss": loss}, among=(Status.RUNNING,)
            )
            data = {"step": step, "total_steps": total, "train_loss": loss}
            ledger.note(job.id, f"Step {step}/{total}: training loss={loss:.4f}", data=data)

    def _lay_out(self, job: Job) -> None:
        """The job's files, written anew: what an interrupted start left may be half of one."""
        folder, files, ledger = self.premises.of_job(job), self.premises.files, self.premises.ledger
        folder.mkdir(mode=0o700, exist_ok=True)
        retain, held_out = order.divided(files.content(ledger.file(job.retain_file)))
        contents = {
            order.FORGET: files.content(ledger.file(job.training_file)),
            order.RETAIN: retain,
            order.HELD_OUT: held_out,
            order.KEYWORDS: "\n".join(order.keywords_of(job)).encode(),
        }
        for name, content in contents.items():
            (folder / name).unlink(missing_ok=True)
            write_private(folder / name, content)

    def _has_profile(self, job: Job) -> bool:
        return (self.premises.of_job(job) / order.PROFILE / "profile.json").is_file()

    def _enter(self, job: Job, phase: Phase) -> None:
        if self.premises.ledger.job(job.id).phase is not phase:
            self._change(job, {"phase": phase, "num_starts": 0})

    def _change(self, job: Job, to: Mapping[str, Value], *, event: tuple[str, str] | None = None) -> None:
        if not self.premises.ledger.change(job.id, to=to, among=ACTIVE, event=event):
            raise JobGone

    def _is_running(self, job: Job) -> bool:
        return self.premises.ledger.job(job.id).status is Status.RUNNING

    async def _fail(self, job: Job, error: UldError) -> None:
        to: Mapping[str, Value] = {
            "status": Status.FAILED,
            "finished_at": int(time.time()),
            "error_code": error.code or "job_failed",
            "error_message": error.message,
        }
        ledger, event = self.premises.ledger, ("error", f"the job failed: {error.message}")
        if ledger.job(job.id).phase is Phase.GOING_LIVE:
            ledger.end_going_live(job.id, to=to, event=event)
        elif not ledger.change(job.id, to=to, among=ACTIVE, event=event):
            await asyncio.to_thread(self.premises.clear, job)
            return
        self.on_end(Status.FAILED)
        with suppress(UldError):  # nothing was done that a log should tell of
            self.record("job_failed", ledger.job(job.id))
        keeps_log = isinstance(error, JobFailed) and error.keeps_log
        await asyncio.to_thread(lambda: self.premises.clear(job, keep_log=keeps_log))


def _move(made: Path, target: Path) -> None:
    """Into the store, on the disk when this returns; a folder of the same digest is the same profile."""
    if made.is_dir() and not target.exists():
        made.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
