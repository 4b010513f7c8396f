"""Evaluates models and profiles on TOFU, section by section, so that a run that was interrupted goes on. Called by the
eval command. Knows no command line.

    OUT/<subject>/<section>.json   what was measured, with a key of what was asked of whom
    OUT/<subject>/eval_log.json    all sections, in the form that `eval tofu-logs` reads"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from uld_serve.evaluation.asker import Measured, Model, Subject, ask
from uld_serve.evaluation.eval_log import EvalLog, samples_of, section_record, write_log
from uld_serve.evaluation.questions import Question, digest
from uld_serve.evaluation.tofu import TruthRatio
from uld_serve.evaluation.tofu_report import TofuReport

FORM = 1
"""Counts up when what is measured changes, so that older parts are made anew."""


@dataclass(frozen=True, slots=True)
class Part:
    """One section of one subject."""

    measured: Measured
    was_kept: bool
    """It lay in the folder already."""


def measure(
    model: Model,
    subject: Subject,
    version: str,
    sections: Mapping[str, Sequence[Question]],
    *,
    folder: Path,
    max_tokens: int,
    advance: Callable[[int], None],
) -> dict[str, Part]:
    """Every section of a subject; `version` tells its weights, tokens and profile from others. Writes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Part] = {}
    for name, questions in sections.items():
        key = _key(FORM, version, _who(subject), digest(questions), max_tokens)
        kept = _kept(folder / f"{name}.json", key)
        if kept is None:
            measured = ask(model, subject, questions, max_tokens=max_tokens, advance=advance)
            _write(folder / f"{name}.json", {"key": key, **_record(measured)})
            parts[name] = Part(measured, False)
        else:
            advance(len(questions))
            parts[name] = Part(kept, True)
    write_log(folder / "eval_log.json", {name: part.measured.samples for name, part in parts.items()})
    return parts


def summary(
    parts: Mapping[str, Part], reference: EvalLog | None, *, name: str, variant: TruthRatio
) -> dict[str, object]:
    """All figures of one subject."""
    log = EvalLog(name, {section: part.measured.samples for section, part in parts.items()})
    report = TofuReport.of(log, reference, variant=variant).record()
    forget = parts["forget"].measured
    return {
        **report,
        "extraction_strength": _mean(forget.extraction_strength),
        "exact_memorization": _mean(forget.exact_memorization),
        "impossible": forget.impossible,
    }


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _who(subject: Subject) -> tuple[str | None, bool]:
    """What a copy without a filter is called hangs on the profiles beside it, and what it says does not."""
    return subject.profile, subject.unfiltered == subject.profile


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _record(measured: Measured) -> dict[str, object]:
    return {
        "samples": section_record(measured.samples),
        "extraction_strength": measured.extraction_strength,
        "exact_memorization": measured.exact_memorization,
        "answers": measured.answers,
        "impossible": measured.impossible,
    }


def _kept(path: Path, key: str) -> Measured | None:
    """What an earlier run left, if it asked the same."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    return Measured(
        samples=samples_of(record["samples"], str(path)),
        extraction_strength=record["extraction_strength"],
        exact_memorization=record["exact_memorization"],
        answers=record["answers"],
        impossible=record["impossible"],
    )


def _write(path: Path, record: Mapping[str, object]) -> None:
    """All or nothing."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(record) + "\n", encoding="utf-8")
    scratch.replace(path)
