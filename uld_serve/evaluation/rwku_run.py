"""Evaluates models and profiles on RWKU, person by person, so that a run that was interrupted goes on. Called by
rwku_command. Knows no command line.

    OUT/<subject>/<person>/<section>.json   answers and scores, with a key of what was asked of whom"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uld_serve.evaluation.asker import Advance, Model, Subject
from uld_serve.evaluation.kept import kept_or_made, key_of
from uld_serve.evaluation.rwku_asker import Answered, Attacked, ask, attack
from uld_serve.evaluation.rwku_data import Person

FORM = 1
"""Counts up when what is measured changes, so that older parts are made anew."""


@dataclass(frozen=True, slots=True)
class Known:
    """What one subject showed of one person, by section."""

    person: Person
    answered: Mapping[str, Answered]
    attacked: Mapping[str, Attacked]


def measure(
    model: Model,
    subject: Subject,
    version: Mapping[str, object],
    people: Sequence[Person],
    *,
    folder: Path,
    max_tokens: int,
    advance: Advance,
) -> list[Known]:
    """`version` tells the subject's weights, tokens and profile from others. Writes the folder."""
    run = _Run(model, subject, version, max_tokens, advance)
    return [run.person(person, folder / re.sub(r"\W+", "_", person.name)) for person in people]


@dataclass(frozen=True, slots=True)
class _Run:
    model: Model
    subject: Subject
    version: Mapping[str, object]
    max_tokens: int
    advance: Advance

    def person(self, person: Person, folder: Path) -> Known:
        answered = {name: self._answered(person, name, folder) for name in person.probes}
        attacked = {name: self._attacked(person, name, folder) for name in person.texts}
        return Known(person, answered, attacked)

    def _answered(self, person: Person, name: str, folder: Path) -> Answered:
        probes = person.probes[name]
        asked = [astuple(probe) for probe in probes]
        return kept_or_made(
            folder / f"{name}.json",
            key_of("rwku", FORM, self.version, name, asked, self.max_tokens),
            partial(
                ask,
                self.model,
                self.subject,
                name,
                probes,
                max_tokens=self.max_tokens,
                advance=self.advance,
            ),
            restore=_restored_answers,
            record=asdict,
            when_kept=partial(self.advance, len(probes)),
        )

    def _attacked(self, person: Person, name: str, folder: Path) -> Attacked:
        texts = person.texts[name]
        return kept_or_made(
            folder / f"{name}.json",
            key_of("rwku", FORM, self.version, name, texts),
            partial(attack, self.model, self.subject, texts, advance=self.advance),
            restore=_restored_scores,
            record=asdict,
            when_kept=partial(self.advance, len(texts)),
        )


def _restored_answers(record: Mapping[str, Any]) -> Answered:
    return Answered(**record)


def _restored_scores(record: Mapping[str, Any]) -> Attacked:
    return Attacked(**record)
