"""`uld-serve eval muse`: what a base, profiles on it and a retrained model still say of texts, and what their
likelihoods tell. A part of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from uld_serve.errors import DataError
from uld_serve.evaluation.groups import Figures, grouped
from uld_serve.evaluation.kept import key_of
from uld_serve.evaluation.lineup import (
    REFERENCE,
    Chosen,
    Entrant,
    add_options,
    entrants,
    read_chosen,
    reference_entrant,
)
from uld_serve.evaluation.muse_data import Muse, read_muse
from uld_serve.evaluation.muse_page import draw, markdown
from uld_serve.evaluation.muse_run import Lengths, Measured, area_of, figures_of, measure
from uld_serve.evaluation.outcome import publish, record_of
from uld_serve.evaluation.table import rows_with_groups

SUMMARY = "ask a base, its profiles and a retrained model for MUSE's texts and questions"


def add_parser(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = benchmarks.add_parser(
        "muse",
        help=SUMMARY,
        description=SUMMARY
        + ": VerbMem, KnowMem and PrivLeak. Texts and likelihoods come from the engine that serves. Interrupted, the "
        "same command goes on.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR_OR_ID",
        help="a folder with verbmem/forget.jsonl and so on, or a dataset such as muse-bench/MUSE-News",
    )
    parser.add_argument(
        "--verbmem-tokens", type=int, default=128, metavar="N", help="of each continuation (128)"
    )
    parser.add_argument(
        "--knowmem-tokens", type=int, default=32, metavar="N", help="of each answer, at most (32)"
    )
    parser.add_argument(
        "--min-k", type=float, default=0.4, metavar="SHARE", help="of the tokens that PrivLeak looks at (0.4)"
    )
    parser.add_argument(
        "--reference-area",
        type=float,
        metavar="AUC",
        help="of a retrained model, for PrivLeak, where the model itself is not at hand",
    )
    add_options(parser, reference="a model that never saw the forget texts, for PrivLeak")


def run(args: argparse.Namespace) -> int:
    """Raises DataError: data, models or profiles that cannot be read."""
    _check(args)
    chosen = read_chosen(args)
    muse = read_muse(args.data, limit=args.limit)
    console = Console(stderr=True)
    args.out.mkdir(parents=True, exist_ok=True)
    lengths = Lengths(args.verbmem_tokens, args.knowmem_tokens, args.min_k)
    with Progress(console=console, transient=True) as progress:
        found = _measured(args, chosen, muse, lengths, progress)
    area = area_of(found[REFERENCE]) if REFERENCE in found else args.reference_area
    figures = {name: figures_of(measured, area) for name, measured in found.items()}
    _publish(args, chosen, muse, figures, area, console)
    return 0


def _check(args: argparse.Namespace) -> None:
    if min(args.verbmem_tokens, args.knowmem_tokens) < 1:
        raise DataError("--verbmem-tokens and --knowmem-tokens must be at least 1")
    if not 0.0 < args.min_k <= 1.0:
        raise DataError("--min-k must be above 0 and at most 1")
    if args.reference_area is not None and not 0.0 < args.reference_area <= 1.0:
        raise DataError("--reference-area must be above 0 and at most 1")
    if args.reference is not None and args.reference_area is not None:
        raise DataError("--reference measures what --reference-area tells; give one of them")


def _measured(
    args: argparse.Namespace, chosen: Chosen, muse: Muse, lengths: Lengths, progress: Progress
) -> dict[str, Measured]:
    """By subject: the base first, the reference last."""

    def ask(entrant: Entrant) -> Measured:
        name = entrant.subject.name
        task = progress.add_task(name, total=muse.size)
        folder: Path = args.out / name
        return measure(
            entrant.llm,
            entrant.subject,
            entrant.version,
            muse,
            folder=folder,
            lengths=lengths,
            advance=lambda count: progress.advance(task, count),
        )

    # Asked first, and freed before the base is loaded.
    reference = None if args.reference is None else ask(reference_entrant(args))
    with entrants(args, chosen) as everybody:
        found = {entrant.subject.name: ask(entrant) for entrant in everybody}
    return found if reference is None else {**found, REFERENCE: reference}


def _publish(
    args: argparse.Namespace,
    chosen: Chosen,
    muse: Muse,
    figures: dict[str, Figures] | dict[str, dict[str, object]],
    area: float | None,
    console: Console,
) -> None:
    asked = {
        "max_tokens": {"verbmem": args.verbmem_tokens, "knowmem": args.knowmem_tokens},
        "min_k": args.min_k,
        "retrained_area": area,
        "questions": key_of(muse.record()),
    }
    rows = rows_with_groups(figures, grouped(chosen.groups, figures))
    text = markdown(rows, _counts(muse), draw(args.out, rows), share=args.min_k, retrained_area=area)
    publish(args, record_of(args, chosen, figures, asked=asked), text, console)


def _counts(muse: Muse) -> str:
    sides = [
        f"KnowMem {side} {len(pairs)} with {len(muse.examples.get(side, ()))} examples in front"
        for side, pairs in muse.knowmem.items()
    ]
    texts = [f"PrivLeak {split} {len(some)}" for split, some in muse.privleak.items()]
    return ", ".join([f"VerbMem {len(muse.verbmem)}", *sides, *texts]) + "."
