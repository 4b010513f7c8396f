"""Logs of TOFU evaluations: four sections of per-sample numbers, read in every form that is published, and written in
one. Called by the eval command. Knows no metric.

Forms: one JSON file with the sections retain, real_authors, world_facts and forget; TOFU's eval_log_aggregated.json,
whose sections are named after files and whose numbers are by sample index; or a folder with those four files, or with
the first form as eval_log.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, isnan
from pathlib import Path

import numpy as np

from uld_serve.errors import DataError
from uld_serve.evaluation.kept import write_whole
from uld_serve.evaluation.tofu import Array, Samples

SECTIONS = ("retain", "real_authors", "world_facts", "forget")
# What TOFU's own evaluation calls them.
PUBLISHED = {
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
    "eval_log_forget.json": "forget",
}
LOSS, PARAPHRASED, PERTURBED, ROUGE = (
    "avg_gt_loss",
    "avg_paraphrased_loss",
    "average_perturb_loss",
    "rougeL_recall",
)
OWN_FILE = "eval_log.json"
"""What `eval tofu` writes all sections to, in a subject's folder."""
MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class EvalLog:
    """`name` is for messages: where it was read."""

    name: str
    sections: Mapping[str, Samples]

    def section(self, name: str) -> Samples:
        """Raises DataError where the log does not have it."""
        if name not in self.sections:
            raise DataError(f"{self.name} has no section '{name}', only {', '.join(sorted(self.sections))}")
        return self.sections[name]


def read_log(path: Path) -> EvalLog:
    """Raises DataError for a log that cannot be read, has none of the sections, or numbers that do not fit together."""
    whole = _folder(path) if path.is_dir() else _parsed(path)
    found: dict[str, Samples] = {}
    for key, values in whole.items():
        section = PUBLISHED.get(key, key)
        if section in SECTIONS:
            if section in found:
                raise DataError(f"{path} has the section '{section}' twice")
            found[section] = samples_of(values, f"{path}: {key}")
    if not found:
        raise DataError(
            f"{path} has none of the sections {', '.join(SECTIONS)}, nor of {', '.join(PUBLISHED)}"
        )
    return EvalLog(str(path), found)


def write_log(path: Path, sections: Mapping[str, Samples]) -> None:
    """In the first form, all or nothing."""
    whole = {name: section_record(samples) for name, samples in sections.items()}
    write_whole(path, json.dumps(whole) + "\n")


def section_record(samples: Samples) -> dict[str, object]:
    """One section, for JSON."""
    return {
        LOSS: samples.loss_N.tolist(),
        PARAPHRASED: samples.paraphrased_loss_N.tolist(),
        PERTURBED: samples.perturbed_loss_NJ.tolist(),
        ROUGE: samples.rougeL_recall_N.tolist(),
    }


def _folder(path: Path) -> dict[str, object]:
    there = [file for file in PUBLISHED if (path / file).is_file()]
    if there == [OWN_FILE]:
        whole = _parsed(path / OWN_FILE)
        # TOFU's file of that name holds the retain section alone.
        return whole if set(whole) & set(SECTIONS) else {OWN_FILE: whole}
    return {file: _parsed(path / file) for file in there}


def _parsed(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        whole = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(whole, dict):
        raise DataError(f"{path} must hold a JSON object")
    return whole


def samples_of(values: object, where: str) -> Samples:
    """One section from JSON; `where` is for messages. Raises DataError."""
    if not isinstance(values, dict):
        raise DataError(f"{where} must be an object of arrays")
    missing = [name for name in (LOSS, PARAPHRASED, PERTURBED, ROUGE) if name not in values]
    if missing:
        raise DataError(f"{where} has no {', '.join(missing)}")
    keys = list(values[LOSS]) if isinstance(values[LOSS], dict) else None
    # A likelihood may be 0; the rest is divided or averaged.
    loss_N = _numbers(values[LOSS], keys, f"{where}.{LOSS}", may_be_infinite=True)
    paraphrased_N = _numbers(values[PARAPHRASED], keys, f"{where}.{PARAPHRASED}")
    rouge_N = _numbers(values[ROUGE], keys, f"{where}.{ROUGE}")
    rows = [
        _numbers(row, None, f"{where}.{PERTURBED}[{number}]")
        for number, row in enumerate(_items(values[PERTURBED], keys, f"{where}.{PERTURBED}"))
    ]
    counts = {LOSS: len(loss_N), PARAPHRASED: len(paraphrased_N), PERTURBED: len(rows), ROUGE: len(rouge_N)}
    if len(set(counts.values())) > 1 or len(loss_N) == 0:
        raise DataError(f"{where}: as many samples of each, and at least one: {counts}")
    if len({len(row) for row in rows}) > 1 or len(rows[0]) == 0:
        raise DataError(f"{where}.{PERTURBED}: every sample needs as many wrong answers, and at least one")
    return Samples(
        loss_N=loss_N,
        paraphrased_loss_N=paraphrased_N,
        perturbed_loss_NJ=np.stack(rows),
        rougeL_recall_N=rouge_N,
    )


def _items(values: object, keys: list[str] | None, where: str) -> list[object]:
    """In the order of `keys`, where values are by sample index."""
    if isinstance(values, dict) and keys is not None:
        if set(values) != set(keys):
            raise DataError(f"{where} is of other samples than {LOSS}")
        return [values[key] for key in keys]
    if isinstance(values, list) and keys is None:
        return values
    raise DataError(f"{where} must be an array, or with all the others an object by sample index")


def _numbers(values: object, keys: list[str] | None, where: str, *, may_be_infinite: bool = False) -> Array:
    items = _items(values, keys, where)
    for number, value in enumerate(items):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or isnan(value):
            raise DataError(f"{where}[{number}] must be a number, got {value!r}")
        if not isfinite(value) and not (may_be_infinite and value > 0):
            raise DataError(f"{where}[{number}] is {value}")
    return np.asarray(items, dtype=np.float64)
