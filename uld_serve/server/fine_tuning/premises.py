"""The folder of [fine_tuning]: ledger, uploads, jobs at work and the profiles that they have made. One server at a time
holds it. Opened by command before anything is loaded; knows no HTTP and no process.

    jobs.sqlite3  lock  files/<id>  jobs/<id>/…  profiles/<name>-<digest12>/
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from uld_serve.errors import InvalidRequest
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.server.fine_tuning.file_store import FileStore
from uld_serve.server.fine_tuning.ledger import Ledger
from uld_serve.server.fine_tuning.records import Job, MadeProfile
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.fine_tuning.trainee import LOG, end_strays


@dataclass(slots=True)
class Lock:
    """Held until it is given back or this process ends, however it ends."""

    _descriptor: int | None

    @classmethod
    def on(cls, folder: Path) -> Lock:
        """Raises InvalidRequest where another process has it, OSError."""
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InvalidRequest(f"another server uses the fine_tuning.folder {folder}") from None
        return cls(descriptor)

    def give_back(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True, slots=True)
class Premises:
    folder: Path
    ledger: Ledger
    files: FileStore
    _lock: Lock

    @classmethod
    def open(cls, settings: FineTuningSettings) -> Premises:
        """Ends what a killed server left running there, and removes what it left lying. Raises InvalidRequest."""
        folder = settings.folder.resolve()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = Lock.on(folder)
            for name in ("jobs", "profiles"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"fine_tuning.folder {folder} cannot be used: {error.strerror}") from None
        end_strays(folder)
        ledger = Ledger(folder / "jobs.sqlite3")
        files = FileStore(
            folder / "files", ledger, max_lines=settings.max_file_lines, max_bytes=settings.max_stored_bytes
        )
        made = cls(folder, ledger, files, lock)
        files.tidy()
        made._tidy()
        return made

    @property
    def profiles(self) -> Path:
        return self.folder / "profiles"

    @property
    def live(self) -> list[Path]:
        """The folders of what a start serves."""
        return [self.profiles / one.directory for one in self.ledger.made().values()]

    def of_job(self, job: Job) -> Path:
        return self.folder / "jobs" / job.id

    def clear(self, job: Job, *, keep_log: bool = False) -> None:
        """Nothing of its data stays."""
        for path in self.of_job(job).glob("*") if keep_log else [self.of_job(job)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOG:
                with suppress(
                    OSError
                ):  # as above: a job's outcome does not hang on it, and a start clears again
                    path.unlink()

    def record(self, name: str, version: ProfileVersion | None) -> None:
        """What a name means from now on; a version that lies elsewhere is none of ours."""
        made = None
        if (
            version is not None
            and version.directory is not None
            and version.directory.parent == self.profiles
        ):
            jobs = [job for job in self.ledger.jobs() if (job.name, job.digest) == (name, version.digest)]
            owner, job_id = (jobs[-1].owner, jobs[-1].id) if jobs else ("", "")
            made = MadeProfile(
                name=name,
                directory=version.directory.name,
                digest=version.digest,
                owner=owner,
                job_id=job_id,
            )
        self.ledger.serve(name, made)

    def close(self) -> None:
        """May be called again."""
        self.ledger.close()
        self._lock.give_back()

    def _tidy(self) -> None:
        active = {job.id for job in self.ledger.jobs() if job.is_active}
        ended = {job.id: job for job in self.ledger.jobs() if not job.is_active}
        for path in (self.folder / "jobs").iterdir():
            if path.name in ended:
                self.clear(ended[path.name], keep_log=True)
            elif path.name not in active:
                shutil.rmtree(path, ignore_errors=True)
