"""Evaluates models and profiles on MUSE, part by part, so that a run that was interrupted goes on, and makes the
figures. Called by muse_command. Knows no command line.

    OUT/<subject>/<part>.json   texts and scores, with a key of what was asked of whom"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial
from math import fsum
from pathlib import Path
from typing import Any, TypeVar

from uld_serve.evaluation.asker import Advance, Model, Subject
from uld_serve.evaluation.kept import kept_or_made, key_of
from uld_serve.evaluation.membership import area_under_curve, privacy_leak
from uld_serve.evaluation.muse_asker import Familiar, Said, answer, go_on, read
from uld_serve.evaluation.muse_data import SIDES, Muse

T = TypeVar("T", Said, Familiar)
FORM = 1
"""Counts up when what is measured changes, so that older parts are made anew."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, and the share of them that Min-K% looks at."""

    verbmem: int
    knowmem: int
    share: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one subject; what is not in the data is None or not there."""

    verbmem: Said | None
    knowmem: Mapping[str, Said]
    privleak: Mapping[str, Familiar]


def measure(
    model: Model,
    subject: Subject,
    version: Mapping[str, object],
    muse: Muse,
    *,
    folder: Path,
    lengths: Lengths,
    advance: Advance,
) -> Measured:
    """`version` tells the subject's weights, tokens and profile from others. Writes the folder."""
    run = _Run(model, subject, version, muse, folder, lengths, advance)
    return Measured(
        run.verbmem() if muse.verbmem else None,
        {side: run.knowmem(side) for side in muse.knowmem},
        {split: run.privleak(split) for split in muse.privleak},
    )


@dataclass(frozen=True, slots=True)
class _Run:
    model: Model
    subject: Subject
    version: Mapping[str, object]
    muse: Muse
    folder: Path
    lengths: Lengths
    advance: Advance

    def verbmem(self) -> Said:
        pairs, max_tokens = self.muse.verbmem, self.lengths.verbmem
        make = partial(go_on, *self._asked, pairs, max_tokens=max_tokens, advance=self.advance)
        return self._keep("verbmem", [list(map(astuple, pairs)), max_tokens], len(pairs), make, _said)

    def knowmem(self, side: str) -> Said:
        pairs, examples = self.muse.knowmem[side], self.muse.examples.get(side, [])
        max_tokens = self.lengths.knowmem
        make = partial(answer, *self._asked, pairs, examples, max_tokens=max_tokens, advance=self.advance)
        facts = [list(map(astuple, examples)), list(map(astuple, pairs)), max_tokens]
        return self._keep(f"knowmem_{side}", facts, len(pairs), make, _said)

    def privleak(self, split: str) -> Familiar:
        texts, share = self.muse.privleak[split], self.lengths.share
        make = partial(read, *self._asked, texts, share=share, advance=self.advance)
        return self._keep(f"privleak_{split}", [texts, share], len(texts), make, _familiar)

    @property
    def _asked(self) -> tuple[Model, Subject]:
        return self.model, self.subject

    def _keep(
        self,
        name: str,
        facts: object,
        size: int,
        make: Callable[[], T],
        restore: Callable[[Mapping[str, Any]], T],
    ) -> T:
        return kept_or_made(
            self.folder / f"{name}.json",
            key_of("muse", FORM, self.version, name, facts),
            make,
            restore=restore,
            record=asdict,
            when_kept=partial(self.advance, size),
        )


def _said(record: Mapping[str, Any]) -> Said:
    return Said(**record)


def _familiar(record: Mapping[str, Any]) -> Familiar:
    return Familiar(**record)


def figures_of(measured: Measured, retrained_area: float | None) -> dict[str, object]:
    """`area` is of texts not seen, as MUSE has it: 0 where every forget text looks more familiar than any held out."""
    area = area_of(measured)
    # Where the retrained model's area is 0 nothing can be relative to it.
    leak = None if area is None or not retrained_area else privacy_leak(area, retrained_area)
    return {
        "verbmem": _mean_scores(measured.verbmem),
        "knowmem": {side: _mean_scores(measured.knowmem.get(side)) for side in SIDES},
        "privleak": {"leak": leak, "area": area},
    }


def area_of(measured: Measured) -> float | None:
    """None without texts to attack."""
    if not measured.privleak:
        return None
    return 1.0 - area_under_curve(measured.privleak["forget"].min_k, measured.privleak["holdout"].min_k)


def _mean_scores(said: Said | None) -> dict[str, float | int | None]:
    if said is None:
        return {"f1": None, "recall": None, "n": 0}
    n = len(said.f1)
    return {"f1": fsum(said.f1) / n, "recall": fsum(said.recall) / n, "n": n}
