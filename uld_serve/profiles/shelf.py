"""The adapters of a stored profile, read from disk each time that one is asked for. Made by store when it has verified
the directory; so hundreds of profiles cost no memory until they are used. Knows no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from uld_serve.errors import ProfileCorrupt
from uld_serve.profiles.adapter import AdapterConfig, LoraAdapter, parse_tensors


@dataclass(frozen=True, slots=True)
class Shelved:
    """Where one adapter lies and what its bytes were when the profile was verified."""

    path: Path
    size: int
    sha256: str
    config: AdapterConfig
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterShelf(Mapping[str, LoraAdapter]):
    """Stream name -> adapter. Looking one up reads its file; raises ProfileCorrupt if that is no longer what was
    verified, so a profile that was altered or removed under a running server is never half applied."""

    profile: str
    shelved: Mapping[str, Shelved]

    def __getitem__(self, stream: str) -> LoraAdapter:
        one = self.shelved[stream]
        try:
            data = one.path.read_bytes() if one.path.stat().st_size == one.size else b""
        except OSError as error:
            raise self._changed(one, error.strerror or "it cannot be read") from error
        if hashlib.sha256(data).hexdigest() != one.sha256:
            raise self._changed(one, "its bytes differ")
        return parse_tensors(data, one.config, layers=one.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shelved)

    def __len__(self) -> int:
        return len(self.shelved)

    def _changed(self, one: Shelved, reason: str) -> ProfileCorrupt:
        return ProfileCorrupt(
            f"profile '{self.profile}': {one.path.parent.name}/{one.path.name} has changed since it was loaded "
            f"({reason}); restore it, or restart with the new version"
        )
