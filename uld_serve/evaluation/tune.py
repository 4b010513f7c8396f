"""`uld-serve tune`: the decode parameters that forget most under a constraint, as a profile's next version. A part of
the command line.

    OUT/<profile>/   the next version, only if some setting meets the constraint
    OUT/sweep.json   all settings on the choosing half; the chosen one on the other
    OUT/sweep.png    the same as a picture, with the extra `plot`"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import Progress

from uld_serve.data.documents import Document, read_documents, refuse_overlap
from uld_serve.errors import DataError
from uld_serve.evaluation.choice import Limits
from uld_serve.evaluation.held_out import Item, halves, items
from uld_serve.evaluation.settings import TAUS, grid, told
from uld_serve.evaluation.sweep import Point
from uld_serve.evaluation.sweep_command import (
    RECORD,
    add_options,
    check_options,
    knees,
    open_model,
    write_record,
)
from uld_serve.evaluation.sweep_pictures import Marked, draw_sweep
from uld_serve.evaluation.tuned import write_tuned
from uld_serve.profiles.registry import find_profile

SUMMARY = "choose a profile's strength, tau and rule on held-out data, and write its next version"
SIDES = ("forget", "retain")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "tune",
        help=SUMMARY,
        description=SUMMARY
        + ". One half of the data chooses, the other is reported on. No setting within the "
        "constraint: nothing is written, and the exit status is 1.",
    )
    add_options(parser)
    parser.add_argument(
        "--taus",
        type=float,
        nargs="+",
        default=[],
        metavar="TAU",
        help=f"default: {', '.join(f'{tau:g}' for tau in TAUS)} and the profile's",
    )
    parser.add_argument(
        "--max-retain",
        type=float,
        default=0.05,
        metavar="NATS",
        help="the retain answers' NLL may rise so much a token (0.05)",
    )
    parser.add_argument(
        "--max-cut",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="the filter may make so many of the retain answers' tokens impossible that the same cut of the base's own "
        "scores would not (0.01)",
    )


def run(args: argparse.Namespace) -> int:
    """1 where no setting meets the constraint. Raises DataError, ProfileError."""
    check_options(args)
    _require_rouge()
    directory, version = find_profile(args.profiles, args.profile)
    target = args.out / version.name
    if target.exists():
        raise DataError(
            f"{target} exists and a profile is never overwritten; remove it or choose another --out"
        )
    rules = grid(
        version.profile,
        rules=args.rules,
        strengths=args.strengths,
        taus=args.taus,
        dead_zones=args.dead_zones,
    )
    parts = {side: halves(documents, kind=side) for side, documents in _read(args).items()}
    # The extra's packages are behind this import.
    from uld_serve.evaluation.tuning import tune

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("loading the model", total=len(rules))
        llm = open_model(args, directory)
        choosing, reporting = (
            {side: items(llm, parts[side][number], kind=side) for side in SIDES} for number in (0, 1)
        )
        points, outcome = tune(
            llm,
            version,
            rules,
            limits=Limits(max_rise=args.max_retain, max_cut=args.max_cut),
            choosing=choosing,
            reporting=reporting,
            advance=lambda what: progress.update(task, description=what, advance=1),
        )
    if outcome is None:
        console.print(_nothing(points, args), highlight=False)
        return 1
    counts = {"choosing": _counts(choosing), "reporting": _counts(reporting)}
    summary = {"data": counts, **outcome.record()}
    tuned = write_tuned(
        target,
        directory,
        version,
        outcome.chosen.rule,
        model=llm,
        served_as=outcome.served_as,
        record=summary,
    )
    record = {
        "profile": version.ref,
        "tuned": tuned.ref,
        **summary,
        "points": [point.record() for point in points],
    }
    write_record(args.out, record)
    marked = Marked(knees=knees(points), own=points[0], chosen=outcome.chosen, max_rise=args.max_retain)
    title = f"{version.name}: {len(points)} settings on the choosing half"
    picture = draw_sweep(args.out, points, marked, title=title)
    for line in outcome.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {target} ({tuned.ref}), {args.out / RECORD}", highlight=False, markup=False)
    if picture is None:
        console.print("no picture: matplotlib is not installed (pip install 'uld-serve[plot]')", markup=False)
    if args.json:
        print(json.dumps(record))
    return 0


def _read(args: argparse.Namespace) -> dict[str, list[Document]]:
    """What is asked, by side. Raises DataError: unusable files, a prompt on both sides."""
    found = {
        side: list(read_documents(getattr(args, side), kind=side).documents)[: args.limit] for side in SIDES
    }
    refuse_overlap(found["forget"], found["retain"], names=("forget", "retain"))
    return found


def _require_rouge() -> None:
    try:
        importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise DataError(
            "tune judges answers by the package rouge-score: pip install 'uld-serve[evaluation]'"
        ) from error


def _counts(sides: Mapping[str, Sequence[Item]]) -> dict[str, int]:
    return {side: len(some) for side, some in sides.items()}


def _nothing(points: Sequence[Point], args: argparse.Namespace) -> str:
    """Why nothing was chosen, and how near it came."""
    forgetting = [point for point in points if point.forget.rise > 0]
    if not forgetting:
        return "no setting raises the NLL of the forget answers; nothing was written"
    near = min(forgetting, key=lambda point: point.retain.rise)
    return (
        f"no setting that forgets keeps the retain NLL within +{args.max_retain:g} nats and cuts at most "
        f"{args.max_cut:.1%} of retain tokens; nothing was written. The gentlest, {told(near.rule)}: retain "
        f"{near.retain.rise:+.3f} nats, {near.retain.cut:.1%} cut"
    )
