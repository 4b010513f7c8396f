"""The audit log: JSON lines of who asked for what and which profiles were applied, and of what operators did. No prompt
and no answer is in it. Written by telemetry and admin.

Fails closed: a request's first line is written before anything is generated for it, and what cannot be recorded is not
answered.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from uld_serve.errors import InvalidRequest, UldError
from uld_serve.server.settings import AuditSettings

OWNER_ONLY = 0o600
Value = str | int | float | None


class AuditUnavailable(UldError):
    status = 503
    code = "audit_unavailable"


class AuditLog:
    """One file that is appended to, and `max_files` older ones beside it: FILE.1 is the youngest of them. Not
    thread-safe: the event loop calls it."""

    def __init__(self, path: Path, settings: AuditSettings | None = None) -> None:
        """Raises InvalidRequest if the file cannot be opened."""
        self.path = path
        self._settings = settings or AuditSettings()
        self._descriptor: int | None = None
        self._is_torn = False
        try:
            self._open()
        except OSError as error:
            raise InvalidRequest(f"cannot write the audit log {path}: {error.strerror}") from None

    def write(self, event: str, **fields: Value) -> None:
        """Append one line; with `fsync` it is on the disk when this returns. Raises AuditUnavailable."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": stamp, "event": event, **fields}).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            raise AuditUnavailable(
                f"the audit log cannot be written ({error.strerror}), and nothing is answered without it; try later"
            ) from None

    def reopen(self) -> None:
        """Go on in the file that has the name now, as after a tool moved the old one away."""
        self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, line: bytes) -> None:
        descriptor = self._open()
        if not os.fstat(
            descriptor
        ).st_nlink:  # it was deleted: what is written there is gone once we close it
            self.close()
            descriptor = self._open()
        size = os.fstat(descriptor).st_size
        if size and size + len(line) > self._settings.max_bytes:
            descriptor = self._begin_anew()
        if self._is_torn:
            line = b"\n" + line
        self._is_torn = True
        written = os.write(descriptor, line)
        if written < len(line):
            written += os.write(descriptor, line[written:])  # raises what stopped the first
        self._is_torn = written < len(line)
        if self._is_torn:
            raise OSError(0, "a line was cut short")
        if self._settings.fsync:
            os.fsync(descriptor)

    def _begin_anew(self) -> int:
        """FILE.1 becomes FILE.2 and so on, the oldest is gone, and FILE is empty."""
        self.close()
        for number in range(self._settings.max_files, 0, -1):
            older = self._numbered(number - 1) if number > 1 else self.path
            if older.exists():
                older.replace(self._numbered(number))
        return self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _open(self) -> int:
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, OWNER_ONLY)
            size = os.fstat(descriptor).st_size
            # A crash may have left half a line behind.
            self._is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            self._descriptor = descriptor
        return self._descriptor
