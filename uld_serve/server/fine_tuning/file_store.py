"""The bytes of uploaded files on the disk, each readable by the server's user alone, and their rows in the ledger.
Called by workshop. Knows no HTTP and no job."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uld_serve.data.documents import Document, parse_lines
from uld_serve.errors import DataError, InvalidRequest, Overloaded, PayloadTooLarge, UldError
from uld_serve.server.fine_tuning.ledger import Ledger
from uld_serve.server.fine_tuning.records import StoredFile

OWNER_ONLY = 0o600
MAX_NAME_CHARS = 255
FULL_RETRY_S = 3600


@dataclass(frozen=True, slots=True)
class FileStore:
    """`max_bytes` of all files together."""

    folder: Path
    ledger: Ledger
    max_lines: int
    max_bytes: int

    def tidy(self) -> None:
        """Remove what a crash left between a file and its row: at start, before anything is asked."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        known = {file.id for file in self.ledger.files()}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()

    def add(self, owner: str, filename: str, content: bytes) -> StoredFile:
        """Raises InvalidRequest naming the first line that is wrong, PayloadTooLarge, Overloaded when there is no more
        room, UldError when the disk takes nothing."""
        documents = documents_of(content, name="line ", max_lines=self.max_lines)
        if sum(file.num_bytes for file in self.ledger.files()) + len(content) > self.max_bytes:
            raise Overloaded("there is no room for more files; delete some", retry_after_s=FULL_RETRY_S)
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            owner=owner,
            filename=_safe_name(filename),
            num_bytes=len(content),
            num_lines=len(documents),
            sha256=hashlib.sha256(content).hexdigest(),
            created_at=int(time.time()),
        )
        try:
            write_private(self.folder / file.id, content)
        except OSError as error:
            (self.folder / file.id).unlink(missing_ok=True)
            raise _unwritable(error) from None
        self.ledger.add_file(file)
        return file

    def content(self, file: StoredFile) -> bytes:
        """Raises UldError where the bytes are not those that were uploaded."""
        try:
            content = (self.folder / file.id).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise UldError("this file's bytes are no longer those that were uploaded; upload it again")
        return content

    def remove(self, file: StoredFile) -> None:
        self.ledger.remove_file(file.id)
        (self.folder / file.id).unlink(missing_ok=True)


def documents_of(content: bytes, *, name: str, max_lines: int | None = None) -> Sequence[Document]:
    """The lines that hold one; `name` stands before a line's number in errors. Raises InvalidRequest."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise InvalidRequest("the file is not UTF-8", param="file") from None
    if max_lines is not None and len(lines) > max_lines + 1:
        raise PayloadTooLarge(f"the file has more than {max_lines} lines", param="file")
    try:
        found = list(parse_lines(lines, name=name))
    except DataError as error:
        raise InvalidRequest(error.message, param="file", code="invalid_file_format") from None
    if not found:
        raise InvalidRequest("the file is empty", param="file", code="invalid_file_format")
    return found


def write_private(path: Path, content: bytes) -> None:
    """For the server's user alone, and on the disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, OWNER_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _safe_name(filename: str) -> str:
    """As told, for lists: it never becomes a path."""
    return "".join(c if c.isprintable() else "?" for c in filename[:MAX_NAME_CHARS])


def _unwritable(error: OSError) -> UldError:
    fault = UldError(f"the file cannot be kept ({error.strerror}); try later", code="storage_unavailable")
    fault.status = 503
    return fault
