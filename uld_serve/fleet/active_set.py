"""Which profiles a fleet serves: names, digests and folders, under a number that no other set of this fleet ever had.
Kept in one file by the ledger; read by nobody else. Knows no engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uld_serve.errors import ProfileError
from uld_serve.profiles.registry import Registry, profile_directories
from uld_serve.profiles.store import read_profile

_FROZEN = ConfigDict(extra="forbid", frozen=True)
OWNER_ONLY = 0o600


class Entry(BaseModel):
    """A version, and the folder under a configured root that it was in when it was loaded."""

    model_config = _FROZEN

    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    directory: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class ActiveSet(BaseModel):
    model_config = _FROZEN

    number: Annotated[int, Field(ge=1)]
    entries: Mapping[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")], Entry]

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(entry.digest for entry in self.entries.values())


def first_set(roots: Iterable[Path]) -> ActiveSet:
    """All profiles in the roots, as a server alone serves them. Raises ProfileError."""
    found: dict[str, Entry] = {}
    registry = Registry()
    for directory in (one for root in roots for one in profile_directories(root)):
        version = read_profile(directory)
        registry.add(version)
        found[version.name] = Entry(digest=version.digest, directory=directory.name)
    return ActiveSet(number=1, entries=found)


def read_set(path: Path) -> ActiveSet | None:
    """None where there is no file. Raises ProfileError for one that cannot be read: to begin anew might bring back what
    was unloaded."""
    try:
        return ActiveSet.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProfileError(f"cannot read the active profiles in {path}: {error.strerror}") from None
    except ValidationError:
        raise ProfileError(
            f"{path} does not say which profiles are active; restore it, or remove it to begin with those in the roots"
        ) from None


def write_set(path: Path, active: ActiveSet) -> None:
    """Whole or not at all, and on the disk when this returns. Raises ProfileError."""
    made = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(active.model_dump(), indent=1, sort_keys=True) + "\n"
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, OWNER_ONLY)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ProfileError(f"cannot record the active profiles in {path}: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def same_directories(roots: Sequence[Path]) -> list[str]:
    """Names that two folders of the roots share: which of them an entry means would be a guess."""
    names = [one.name for root in roots for one in profile_directories(root)]
    return sorted({name for name in names if names.count(name) > 1})
