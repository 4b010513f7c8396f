"""RWKU's probes of what a model knows about people (Jin et al. 2024, arXiv 2406.10890). Called by rwku_command. Knows
no model.

A folder for each person, or one with everybody's files, or the Hugging Face dataset jinzhuoran/RWKU. Files hold a list
of objects, or one object a line:

    forget_level1, forget_level2, forget_level3   {"subject", "query", "answer", "type"}
    neighbor_level1, neighbor_level2              the same
    forget_mia, retain_mia                        {"subject", "text"}"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.evaluation.rows import Row, dataset_rows, file_rows, find_file, text_of

PROBES = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
TEXTS = ("forget_mia", "retain_mia")
# What the dataset calls its configurations, where that is not the file's name.
CONFIGURATIONS = {"forget_mia": "mia_forget", "retain_mia": "mia_retain"}
DATASET_SPLIT = "test"


@dataclass(frozen=True, slots=True)
class Probe:
    """`kind` is the dataset's "type": for level 3 the attack."""

    query: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class Person:
    """Sections without rows are not there."""

    name: str
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """All that is asked about the person, for JSON and keys."""
        probes = {name: [astuple(probe) for probe in section] for name, section in self.probes.items()}
        return {"name": self.name, "probes": probes, "texts": self.texts}

    @property
    def size(self) -> int:
        """Questions and texts."""
        return sum(map(len, self.probes.values())) + sum(map(len, self.texts.values()))


def read_people(source: str, *, names: Sequence[str] = (), limit: int | None = None) -> list[Person]:
    """By name; `names` chooses, all without. `limit` is for each section of each person.

    Raises DataError: nothing there, a row of another form, somebody who is not there or has no forget probe.
    """
    people: dict[str, Person] = {}
    for section in (*PROBES, *TEXTS):
        for row, where in _rows(source, section):
            name = text_of(row, "subject", where)
            if not names or name in names:
                _add(people.setdefault(name, Person(name)), section, row, where, limit)
    _check(people, names, source)
    return [people[name] for name in sorted(people)]


def _add(person: Person, section: str, row: Row, where: str, limit: int | None) -> None:
    count = len(person.probes.get(section, ())) + len(person.texts.get(section, ()))
    if limit is not None and count >= limit:
        return
    if section in TEXTS:
        person.texts.setdefault(section, []).append(text_of(row, "text", where))
        return
    probe = Probe(text_of(row, "query", where), text_of(row, "answer", where), text_of(row, "type", where))
    person.probes.setdefault(section, []).append(probe)


def _check(people: Mapping[str, Person], names: Sequence[str], source: str) -> None:
    if missing := [name for name in names if name not in people]:
        raise DataError(f"{source} has nothing about {', '.join(missing)}; names are as the files spell them")
    for person in people.values():
        if not any(section.startswith("forget") for section in person.probes):
            raise DataError(f"{source} has no forget probe about {person.name}")


def _rows(source: str, section: str) -> Iterable[tuple[Row, str]]:
    """Rows with their place."""
    if not Path(source).is_dir():
        rows = dataset_rows(source, CONFIGURATIONS.get(section, section), split=DATASET_SPLIT)
        yield from ((row, f"{source}: {section}, row {number}") for number, row in enumerate(rows, start=1))
        return
    for folder in _folders(Path(source)):
        path = find_file(folder, section)
        if path is not None:
            rows = file_rows(path)
            yield from ((row, f"{path}, row {number}") for number, row in enumerate(rows, start=1))


def _folders(root: Path) -> list[Path]:
    """Raises DataError where none has forget probes."""
    found = [
        folder
        for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir()))
        if any(find_file(folder, name) for name in PROBES)
    ]
    if not found:
        raise DataError(f"{root} has no {PROBES[0]}.json, nor has a folder in it")
    return found
