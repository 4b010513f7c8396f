"""`uld-serve eval tofu`: a base, profiles on it and a reference model, asked all of TOFU's questions. A part of the
command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from uld_serve.evaluation.eval_log import EvalLog, read_log
from uld_serve.evaluation.groups import Figures, grouped
from uld_serve.evaluation.lineup import (
    BASE,
    REFERENCE,
    Chosen,
    Entrant,
    add_options,
    entrants,
    read_chosen,
    reference_entrant,
)
from uld_serve.evaluation.outcome import publish, record_of
from uld_serve.evaluation.questions import Question, digest, read_questions, section_files
from uld_serve.evaluation.table import rows_with_groups
from uld_serve.evaluation.tofu import Samples
from uld_serve.evaluation.tofu_page import markdown
from uld_serve.evaluation.tofu_pictures import draw
from uld_serve.evaluation.tofu_report import forget_samples
from uld_serve.evaluation.tofu_run import Parts, measure, summary

SUMMARY = "ask a base, its profiles and a reference model all of TOFU's questions"


def add_parser(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = benchmarks.add_parser(
        "tofu",
        help=SUMMARY,
        description=SUMMARY
        + ". Likelihoods and answers come from the engine that serves. Interrupted, the same command "
        "goes on.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR_OR_ID",
        help="a folder with <split>_perturbed.jsonl, retain_perturbed.jsonl, real_authors_perturbed.jsonl and "
        "world_facts_perturbed.jsonl, or a Hugging Face dataset with these configurations",
    )
    parser.add_argument("--split", default="forget01", help="whose forget set (default: forget01)")
    parser.add_argument("--truth-ratio", choices=("geometric", "arithmetic"), default="geometric")
    add_options(
        parser,
        reference="a model that never saw the forget set, or the log of one, for forget quality",
        max_tokens=64,
    )


def run(args: argparse.Namespace) -> int:
    """Raises DataError: data, models or profiles that cannot be read."""
    chosen = read_chosen(args)
    sections = {
        name: read_questions(args.data, file, limit=args.limit)
        for name, file in section_files(args.split).items()
    }
    console = Console(stderr=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as progress:
        runner = _Runner(args, sections, progress)
        reference = runner.reference()
        with entrants(args, chosen) as everybody:
            found = {entrant.subject.name: runner.measure(entrant) for entrant in everybody}
    figures = _figures(args, found, reference)
    _publish(args, chosen, runner, figures, _forgotten(found, reference), console)
    return 0


def _publish(
    args: argparse.Namespace,
    chosen: Chosen,
    runner: _Runner,
    figures: Mapping[str, Figures],
    forgotten: Mapping[str, Samples],
    console: Console,
) -> None:
    questions = {name: digest(section) for name, section in runner.sections.items()}
    record = record_of(args, chosen, figures, asked={"split": args.split, "questions": questions})
    groups = grouped(chosen.groups, figures)
    rows = rows_with_groups(figures, groups)
    pictures = draw(args.out, rows, forgotten, split=args.split, variant=args.truth_ratio)
    text = markdown(
        figures,
        groups,
        split=args.split,
        variant=args.truth_ratio,
        has_reference=args.reference is not None,
        pictures=pictures,
    )
    publish(args, record, text, console)


def _figures(
    args: argparse.Namespace, found: Mapping[str, Parts], reference: EvalLog | None
) -> dict[str, Figures]:
    """By subject, the base first; with the share that is left of its utility."""
    figures = {
        name: summary(parts, reference, name=name, variant=args.truth_ratio) for name, parts in found.items()
    }
    base = figures[BASE]["model_utility"]
    assert isinstance(base, float)
    for one in figures.values():
        utility = one["model_utility"]
        assert isinstance(utility, float)
        one["utility_share"] = utility / base if base > 0 else None
    return dict(figures)


def _forgotten(found: Mapping[str, Parts], reference: EvalLog | None) -> dict[str, Samples]:
    forgotten = {name: parts["forget"].samples for name, parts in found.items()}
    return forgotten if reference is None else {**forgotten, REFERENCE: reference.section("forget")}


@dataclass(frozen=True)
class _Runner:
    args: argparse.Namespace
    sections: Mapping[str, Sequence[Question]]
    progress: Progress

    def measure(self, entrant: Entrant) -> Parts:
        name = entrant.subject.name
        task = self.progress.add_task(name, total=sum(map(len, self.sections.values())))
        return measure(
            entrant.llm,
            entrant.subject,
            entrant.version,
            self.sections,
            folder=self.args.out / name,
            max_tokens=self.args.max_tokens,
            advance=lambda count: self.progress.advance(task, count),
        )

    def reference(self) -> EvalLog | None:
        """Of a log, or of a model that is asked the forget questions alone. Raises DataError for a log of others,
        before anybody is asked."""
        named = self.args.reference
        if named is None:
            return None
        path = Path(named)
        if path.suffix == ".json" or (path / "eval_log_forget.json").is_file():
            log = read_log(path)
            forget_samples(log, len(self.sections["forget"]))
            return log
        forget = {"forget": self.sections["forget"]}
        parts = _Runner(self.args, forget, self.progress).measure(reference_entrant(self.args))
        return EvalLog(named, {name: part.samples for name, part in parts.items()})
