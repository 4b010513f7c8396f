"""Reads all files of an untrusted directory into memory, safely. Called by store; knows nothing of profiles.

Everything is opened relative to a directory descriptor and without following links, so a path cannot be
swapped for a link between looking and reading. No mmap: a mapped file that is truncated later kills the
process.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

MAX_ENTRIES = 64
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES = 16 * 2**20


def read_files(directory: Path, *, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Relative path -> bytes, for the files in `directory` and in its folders, which hold no folders
    themselves.

    `limits` maps the file names that may occur to their size in bytes. Raises ValueError naming the file if
    it is not a regular file, has another name, is too large or changed while it was read; OSError if it
    cannot be read.
    """
    files: dict[str, bytes] = {}
    root = _open_folder(str(directory), dir_fd=None, shown=directory.name)
    try:
        for name in _entries(root, directory.name):
            if stat.S_ISDIR(_mode(name, root)):
                files |= _read_folder(name, root, limits)
            else:
                files[name] = _read_file(name, root, limits, shown=name)
    finally:
        os.close(root)
    return files


def _read_folder(folder: str, root: int, limits: Mapping[str, int]) -> dict[str, bytes]:
    descriptor = _open_folder(folder, dir_fd=root, shown=folder)
    try:
        return {
            f"{folder}/{name}": _read_file(name, descriptor, limits, shown=f"{folder}/{name}")
            for name in _entries(descriptor, folder)
        }
    finally:
        os.close(descriptor)


def _open_folder(path: str, *, dir_fd: int | None, shown: str) -> int:
    try:
        return os.open(path, _FLAGS | os.O_DIRECTORY, dir_fd=dir_fd)
    except OSError as error:
        raise ValueError(f"{_printable(shown)} cannot be opened as a directory ({error.strerror})") from error


def _entries(descriptor: int, shown: str) -> list[str]:
    names = sorted(os.listdir(descriptor))
    if len(names) > MAX_ENTRIES:
        raise ValueError(
            f"{_printable(shown)} has {len(names)} entries; at most {MAX_ENTRIES} can belong there"
        )
    return names


def _mode(name: str, dir_fd: int) -> int:
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode


def _read_file(name: str, dir_fd: int, limits: Mapping[str, int], *, shown: str) -> bytes:
    shown = _printable(shown)
    if name not in limits:
        raise ValueError(f"{shown} does not belong in a profile")
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(name, _FLAGS | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as error:
        raise ValueError(f"{shown} cannot be opened as a regular file ({error.strerror})") from error
    try:
        return _read_regular(descriptor, limits[name], shown)
    finally:
        os.close(descriptor)


def _read_regular(descriptor: int, limit: int, shown: str) -> bytes:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{shown} is not a regular file")
    if facts.st_size > limit:
        raise ValueError(f"{shown} has {facts.st_size} bytes; the limit is {limit}")
    data = bytearray()
    while chunk := os.read(descriptor, min(_CHUNK_BYTES, facts.st_size + 1 - len(data))):
        data += chunk
        if len(data) > facts.st_size:
            break
    if len(data) != facts.st_size:
        raise ValueError(f"{shown} changed while it was read")
    return bytes(data)


def _printable(name: str) -> str:
    return name.encode("unicode_escape").decode("ascii")[:80]
