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
        facts = {
            "base": [base.fingerprint, str(base.dtype)],
            "settings": asdict(settings),
            "sources": asdict(sources),
            "contents": [content_digest(path) for path in sources.files],
        }
        told = json.dumps(facts, default=str, sort_keys=True)
        marker = self.path / "run.json"
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not marker.is_file():
            raise DataError(f"there is nothing to resume: {self.path} does not exist; start without --resume")
        elif marker.read_text() != told:
            raise DataError(
                f"the run in {self.path} had another base, other options or other files; repeat them, or start "
                "without --resume"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        marker.write_text(told)

    def remove(self) -> None:
        shutil.rmtree(self.path)


def content_digest(path: Path) -> str:
    """Of a file, or of the .txt files of a folder, names included."""
    digest = hashlib.sha256()
    for name, data in _contents(path):
        digest.update(len(name).to_bytes(8, "big") + name + hashlib.sha256(data).digest())
    return digest.hexdigest()


def _contents(path: Path) -> Iterable[tuple[bytes, bytes]]:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else ""
        yield name.encode(), file.read_bytes() if file.is_file() else b""
