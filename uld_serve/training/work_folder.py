"""A run's work in progress, beside the profile that it will write: made anew, or found again by --resume. Called by
run. Knows no tensor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState

from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.training.settings import Settings
from uld_serve.training.sources import Sources


@dataclass(frozen=True, slots=True)
class WorkFolder:
    path: Path

    @classmethod
    def beside(cls, out: Path) -> WorkFolder:
        return cls(out.parent / f".{out.name}.training")

    @property
    def answers(self) -> Path:
        return self.path / "answers.json"

    def lesson(self, adapter: str) -> Path:
        """Where one adapter's checkpoints are."""
        return self.path / adapter

    def open(self, base: Base, settings: Settings, sources: Sources, *, resume: bool) -> None:
        """Raises DataError: nothing to resume, or the run there was told something else."""
        told, marker = _told(base, settings, sources), self._marker
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not marker.is_file():
            raise DataError(f"there is nothing to resume: {self.path} does not exist; start without --resume")
        elif marker.read_text() != told:
            raise DataError(
                f"the run in {self.path} had another base, other options, other files or another number of processes; "
                "repeat them, or start without --resume"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        marker.write_text(told)

    def is_of(self, base: Base, settings: Settings, sources: Sources) -> bool:
        """Whether there is a run to be resumed that was told the same."""
        return self._marker.is_file() and self._marker.read_text() == _told(base, settings, sources)

    @property
    def _marker(self) -> Path:
        return self.path / "run.json"

    def remove(self) -> None:
        shutil.rmtree(self.path)


def _told(base: Base, settings: Settings, sources: Sources) -> str:
    facts = {
        "base": [base.fingerprint, str(base.dtype)],
        "settings": asdict(settings),
        "sources": asdict(sources),
        "contents": [content_digest(path) for path in sources.files],
        "processes": PartialState().num_processes,
    }
    return json.dumps(facts, default=str, sort_keys=True)


def content_digest(path: Path) -> str:
    """Of a file, or of the files of a folder, names included; of nothing where a dataset is not a folder."""
    digest = hashlib.sha256()
    for name, data in _contents(path):
        digest.update(len(name).to_bytes(8, "big") + name + hashlib.sha256(data).digest())
    return digest.hexdigest()


def _contents(path: Path) -> Iterable[tuple[bytes, bytes]]:
    root = (
        path if path.exists() else Path(str(path).split(":")[0])
    )  # a folder with a configuration and a split
    files = sorted(one for one in root.rglob("*") if one.is_file()) if root.is_dir() else [root]
    for file in files:
        name = str(file.relative_to(root)) if root.is_dir() else ""
        yield name.encode(), file.read_bytes() if file.is_file() else b""
