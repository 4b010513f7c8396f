"""Evaluates models and profiles on TOFU, section by section, so that a run that was interrupted goes on. Called by the
eval command. Knows no command line.

    OUT/<subject>/<section>.json   what was measured, with a key of what was asked of whom
    OUT/<subject>/eval_log.json    all sections, in the form that `eval tofu-logs` reads"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import fsum
from pathlib import Path
from typing import Any

from uld_serve.evaluation.asker import Advance, Model, Subject
from uld_serve.evaluation.eval_log import EvalLog, samples_of, section_record, write_log
from uld_serve.evaluation.kept import kept_or_made, key_of
from uld_serve.evaluation.questions import Question, digest
from uld_serve.evaluation.tofu import TruthRatio
from uld_serve.evaluation.tofu_asker import Measured, ask
from uld_serve.evaluation.tofu_report import TofuReport

FORM = 2
"""Counts up when what is measured changes, so that older parts are made anew."""

Parts = Mapping[str, Measured]
"""By section."""


def measure(
    model: Model,
    subject: Subject,
    version: Mapping[str, object],
    sections: Mapping[str, Sequence[Question]],
    *,
    folder: Path,
    max_tokens: int,
    advance: Advance,
) -> dict[str, Measured]:
    """Every section of a subject; `version` tells its weights, tokens and profile from others. Writes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Measured] = {}
    for name, questions in sections.items():
        parts[name] = kept_or_made(
            folder / f"{name}.json",
            key_of("tofu", FORM, version, digest(questions), max_tokens),
            partial(ask, model, subject, questions, max_tokens=max_tokens, advance=advance),
            restore=_restored,
            record=_record,
            when_kept=partial(advance, len(questions)),
        )
    write_log(folder / "eval_log.json", {name: part.samples for name, part in parts.items()})
    return parts


def summary(parts: Parts, reference: EvalLog | None, *, name: str, variant: TruthRatio) -> dict[str, object]:
    """All figures of one subject."""
    log = EvalLog(name, {section: part.samples for section, part in parts.items()})
    report = TofuReport.of(log, reference, variant=variant).record()
    forget = parts["forget"]
    return {
        **report,
        "extraction_strength": _mean(forget.extraction_strength),
        "exact_memorization": _mean(forget.exact_memorization),
        "impossible": forget.impossible,
    }


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _record(measured: Measured) -> dict[str, object]:
    return {
        "samples": section_record(measured.samples),
        "extraction_strength": measured.extraction_strength,
        "exact_memorization": measured.exact_memorization,
        "answers": measured.answers,
        "impossible": measured.impossible,
    }


def _restored(record: Mapping[str, Any]) -> Measured:
    return Measured(**{**record, "samples": samples_of(record["samples"], "what was kept")})
