"""`uld-serve eval rwku`: what a base and profiles on it still say of people, asked by RWKU's probes. A part of the
command line."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import Progress

from uld_serve.evaluation.groups import grouped
from uld_serve.evaluation.kept import key_of
from uld_serve.evaluation.lineup import add_options, entrants, read_chosen
from uld_serve.evaluation.outcome import publish, record_of
from uld_serve.evaluation.rwku_data import Person, read_people
from uld_serve.evaluation.rwku_page import draw, markdown
from uld_serve.evaluation.rwku_report import figures_of
from uld_serve.evaluation.rwku_run import measure
from uld_serve.evaluation.table import rows_with_groups

SUMMARY = "ask a base and its profiles what they know of RWKU's people"


def add_parser(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = benchmarks.add_parser(
        "rwku",
        help=SUMMARY,
        description=SUMMARY
        + ": blanks, questions, attacks, neighbours and membership inference. Answers and likelihoods come from the "
        "engine that serves. Interrupted, the same command goes on.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR_OR_ID",
        help="a folder with forget_level1.json and so on, or with such folders, or jinzhuoran/RWKU",
    )
    parser.add_argument(
        "--person",
        action="append",
        default=[],
        metavar="NAME",
        help="who is asked about, as the data spells it; may be repeated; default: everybody",
    )
    add_options(parser, max_tokens=30)


def run(args: argparse.Namespace) -> int:
    """Raises DataError: data, models or profiles that cannot be read."""
    chosen = read_chosen(args)
    people = read_people(args.data, names=args.person, limit=args.limit)
    console = Console(stderr=True)
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    with Progress(console=console, transient=True) as progress, entrants(args, chosen) as everybody:
        for entrant in everybody:
            name = entrant.subject.name
            task = progress.add_task(name, total=sum(person.size for person in people))
            known = measure(
                entrant.llm,
                entrant.subject,
                entrant.version,
                people,
                folder=args.out / name,
                max_tokens=args.max_tokens,
                advance=lambda count, task=task: progress.advance(task, count),  # type: ignore[misc]
            )
            figures[name] = figures_of(known)
    asked = {"questions": {person.name: key_of(person.record()) for person in people}}
    rows = rows_with_groups(figures, grouped(chosen.groups, figures))
    counts = {person.name: _counts(person) for person in people}
    text = markdown(rows, counts, draw(args.out, rows))
    publish(args, record_of(args, chosen, figures, asked=asked), text, console)
    return 0


def _counts(person: Person) -> str:
    probes = [f"{name} {len(section)}" for name, section in person.probes.items()]
    return ", ".join(probes + [f"{name} {len(section)}" for name, section in person.texts.items()])
