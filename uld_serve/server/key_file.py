"""Adds keys to a TOML file and takes them out again, leaving its comments and its order as they are. Called by
keys_command. A file is replaced whole or not at all, and one writer waits for another."""

from __future__ import annotations

import fcntl
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from uld_serve.errors import InvalidRequest, NotFound
from uld_serve.server.settings import (
    KeyFile,
    KeySettings,
    ServerSettings,
    checked,
    checked_settings,
    read_settings,
    read_toml,
)

OWNER_ONLY = 0o600


def file_of_keys(config: Path) -> Path:
    """Where the keys of `config` are written: the file that it names as keys_file, else itself."""
    keys_file = checked_settings(read_toml(config), source=str(config)).keys_file if config.exists() else None
    return config if keys_file is None else config.parent / keys_file


def keys_of(config: Path) -> list[KeySettings]:
    """All keys that a server started with `config` would know; [] before the files are there."""
    if not config.exists():
        return []
    if not file_of_keys(config).exists():
        return checked_settings(read_toml(config), source=str(config)).keys
    return read_settings(config).keys


def add_key(config: Path, key: KeySettings) -> Path:
    """Append one [[keys]] entry; the file that it went to. Raises InvalidRequest for a name that is taken."""

    def append(document: tomlkit.TOMLDocument) -> None:
        if any(known.name == key.name for known in keys_of(config)):
            raise InvalidRequest(f"there is a key named '{key.name}' already; revoke it or take another name")
        entry = tomlkit.table()
        for field, value in key.model_dump(exclude_unset=True, exclude_none=True).items():
            entry.add(field, value)
        if "keys" not in document:
            document.add("keys", tomlkit.aot())
        document["keys"].append(entry)

    return _changed(config, append)


def remove_key(config: Path, name: str) -> Path:
    """Take one entry out; the file that it was in. Raises NotFound, and InvalidRequest for the last key: a server
    without keys lets everybody in."""

    def remove(document: tomlkit.TOMLDocument) -> None:
        if [key.name for key in keys_of(config)] == [name]:
            raise InvalidRequest(
                f"'{name}' is the last key, and a server without keys lets everybody in; make another one first"
            )
        entries = document.get("keys", [])
        index = next((i for i, entry in enumerate(entries) if entry["name"] == name), None)
        if index is None:
            raise NotFound(f"no key is named '{name}' in {file_of_keys(config)}")
        del entries[index]

    return _changed(config, remove)


def _changed(config: Path, change: Callable[[tomlkit.TOMLDocument], None]) -> Path:
    path = file_of_keys(config).resolve()
    model = ServerSettings if path == config.resolve() else KeyFile
    try:
        with _only_writer(path.parent):
            document = tomlkit.parse(path.read_text("utf-8") if path.exists() else "")
            change(document)
            text = tomlkit.dumps(document)
            checked(model, tomllib.loads(text), source=str(path))
            _rename_into(path, text)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
    except TOMLKitError as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from None
    return path


def _rename_into(path: Path, text: str) -> None:
    before = path.stat() if path.exists() else None
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if before is not None:
                _keep_owner(file.fileno(), before)
                os.fchmod(file.fileno(), before.st_mode & 0o777)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    with _opened(path.parent) as folder:
        os.fsync(folder)


def _keep_owner(descriptor: int, before: os.stat_result) -> None:
    """The server that reads the file may be another user than the one who adds a key, root for one."""
    now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """The folder itself is locked, so that no lock file stays behind."""
    with _opened(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
