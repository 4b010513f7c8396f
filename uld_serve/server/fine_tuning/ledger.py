"""Files, jobs, events and live profiles in SQLite, so that they outlive the server. Used by workshop and foreman. Knows
no file's content and no process.

Every change is one transaction, on the disk when the call returns; what a job may become is decided here, by comparing
what it is, so that a cancellation and an end that meet have one outcome.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import TypeVar

from uld_serve.errors import InvalidRequest, NotFound, UldError
from uld_serve.server.fine_tuning.records import Event, Job, MadeProfile, Phase, Status, StoredFile

RecordT = TypeVar("RecordT", StoredFile, Job, MadeProfile)
Value = str | int | float | None
VERSION = 1
SCHEMA = """
CREATE TABLE files (id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, num_bytes INTEGER NOT NULL,
  num_lines INTEGER NOT NULL, sha256 TEXT NOT NULL, created_at INTEGER NOT NULL);
CREATE TABLE jobs (id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, request TEXT NOT NULL,
  training_file TEXT NOT NULL, retain_file TEXT NOT NULL, seed INTEGER NOT NULL, created_at INTEGER NOT NULL,
  status TEXT NOT NULL, phase TEXT, started_at INTEGER, finished_at INTEGER, num_starts INTEGER NOT NULL, step INTEGER,
  num_steps INTEGER, loss REAL, digest TEXT, previous TEXT, probes TEXT, error_code TEXT, error_message TEXT);
CREATE TABLE events (number INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, created_at INTEGER NOT NULL,
  level TEXT NOT NULL, message TEXT NOT NULL, data TEXT);
CREATE INDEX events_of_jobs ON events (job_id, number);
CREATE TABLE profiles (name TEXT PRIMARY KEY, directory TEXT NOT NULL, digest TEXT NOT NULL, owner TEXT NOT NULL,
  job_id TEXT NOT NULL);
"""


class LedgerUnavailable(UldError):
    status = 503
    code = "storage_unavailable"


class Ledger:
    """Any thread may call; one at a time is served. Every method raises LedgerUnavailable where the disk takes or gives
    nothing; then nothing has changed."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidRequest for a file that cannot be used."""
        self._lock = threading.Lock()
        try:
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._create()
        except (OSError, sqlite3.Error, LedgerUnavailable) as error:
            raise InvalidRequest(f"cannot keep jobs in {path}: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def add_file(self, file: StoredFile) -> None:
        self._insert("files", file)

    def file(self, file_id: str) -> StoredFile:
        """Raises NotFound."""
        return self._one("files", StoredFile, file_id)

    def files(self, owner: str | None = None) -> list[StoredFile]:
        """All of a key's, or of all keys, oldest first."""
        return self._all("files", StoredFile, owner)

    def remove_file(self, file_id: str) -> None:
        with self._transaction() as run:
            run.execute("DELETE FROM files WHERE id = ?", (file_id,))

    def add_job(self, job: Job) -> None:
        with self._transaction() as run:
            _insert(run, "jobs", job)
            _add_event(run, job.id, "info", "the job was created", None)

    def job(self, job_id: str) -> Job:
        """Raises NotFound."""
        return self._one("jobs", Job, job_id)

    def jobs(self, owner: str | None = None, *, statuses: Sequence[Status] = tuple(Status)) -> list[Job]:
        """Oldest first."""
        return [job for job in self._all("jobs", Job, owner) if job.status in statuses]

    def change(
        self,
        job_id: str,
        *,
        to: Mapping[str, Value],
        among: Sequence[Status],
        event: tuple[str, str] | None = None,
    ) -> bool:
        """Whether the job had one of these statuses and was not going live; then it has the new values and the
        event (level, message)."""
        with self._transaction() as run:
            marks = ",".join("?" * len(among))
            found = run.execute(
                f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in to)} "
                f"WHERE id = ? AND status IN ({marks}) AND phase IS NOT ?",
                (*to.values(), job_id, *among, Phase.GOING_LIVE),
            )
            is_changed = found.rowcount == 1
            if is_changed and event is not None:
                _add_event(run, job_id, *event, None)
        return is_changed

    def end_going_live(self, job_id: str, *, to: Mapping[str, Value], event: tuple[str, str]) -> None:
        """How a job ends that was going live."""
        with self._transaction() as run:
            run.execute(
                f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in to)} WHERE id = ? AND phase = ?",
                (*to.values(), job_id, Phase.GOING_LIVE),
            )
            _add_event(run, job_id, *event, None)

    def serve(self, name: str, made: MadeProfile | None) -> None:
        """What a name means from now on, also after a start; None: nothing that a job has made."""
        with self._transaction() as run:
            run.execute("DELETE FROM profiles WHERE name = ?", (name,))
            if made is not None:
                _insert(run, "profiles", made)

    def note(
        self, job_id: str, message: str, *, level: str = "info", data: Mapping[str, object] | None = None
    ) -> None:
        """An event that changes nothing."""
        with self._transaction() as run:
            _add_event(run, job_id, level, message, data)

    def events(self, job_id: str) -> list[Event]:
        """Oldest first."""
        with self._transaction() as run:
            rows = run.execute(
                "SELECT number, job_id, created_at, level, message, data FROM events WHERE job_id = ? ORDER BY number",
                (job_id,),
            ).fetchall()
        return [
            Event(
                number=number,
                job_id=job,
                created_at=created_at,
                level=level,
                message=message,
                data=None if data is None else json.loads(data),
            )
            for number, job, created_at, level, message, data in rows
        ]

    def made(self) -> dict[str, MadeProfile]:
        """By name: what jobs have put live."""
        return {one.name: one for one in self._all("profiles", MadeProfile, None)}

    def _create(self) -> None:
        with self._transaction() as run:
            (version,) = run.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"it is of version {version}, and this server knows {VERSION}")
            if version == 0:
                for statement in SCHEMA.split(";"):
                    run.execute(statement)
                run.execute(f"PRAGMA user_version = {VERSION}")

    def _insert(self, table: str, record: RecordT) -> None:
        with self._transaction() as run:
            _insert(run, table, record)

    def _one(self, table: str, kind: type[RecordT], record_id: str) -> RecordT:
        with self._transaction() as run:
            row = run.execute(f"SELECT {_columns(kind)} FROM {table} WHERE id = ?", (record_id,)).fetchone()
        if row is None:
            raise NotFound(f"there is no such {table.removesuffix('s')} of this key")
        return _record(kind, row)

    def _all(self, table: str, kind: type[RecordT], owner: str | None) -> list[RecordT]:
        where, values = ("", ()) if owner is None else ("WHERE owner = ?", (owner,))
        with self._transaction() as run:
            rows = run.execute(
                f"SELECT {_columns(kind)} FROM {table} {where} ORDER BY rowid",
                values,
            ).fetchall()
        return [_record(kind, row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                raise LedgerUnavailable(f"jobs cannot be recorded ({error}); try later") from error
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")


def _columns(kind: type[StoredFile] | type[Job] | type[MadeProfile]) -> str:
    return ", ".join(field.name for field in fields(kind))


def _insert(run: sqlite3.Connection, table: str, record: StoredFile | Job | MadeProfile) -> None:
    values = astuple(record)
    marks = ",".join("?" * len(values))
    run.execute(f"INSERT INTO {table} ({_columns(type(record))}) VALUES ({marks})", values)


def _add_event(
    run: sqlite3.Connection, job_id: str, level: str, message: str, data: Mapping[str, object] | None
) -> None:
    run.execute(
        "INSERT INTO events (job_id, created_at, level, message, data) VALUES (?, ?, ?, ?, ?)",
        (job_id, int(time.time()), level, message, None if data is None else json.dumps(data)),
    )


def _record(kind: type[RecordT], row: Sequence[object]) -> RecordT:
    values = dict(zip((field.name for field in fields(kind)), row, strict=True))
    if kind is Job:
        values["status"] = Status(str(values["status"]))
        values["phase"] = None if values["phase"] is None else Phase(str(values["phase"]))
    return kind(**values)  # type: ignore[arg-type]
