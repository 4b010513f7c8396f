"""The options that tune and `eval sweep` share, and `uld-serve eval sweep` itself: strength against what is forgotten
and lost. Called by the command line, which reads the data."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from uld_serve.errors import DataError
from uld_serve.evaluation.choice import knee
from uld_serve.evaluation.held_out import Document, items
from uld_serve.evaluation.settings import SHARES, grid, told
from uld_serve.evaluation.sweep import Point, Sweep
from uld_serve.evaluation.sweep_pictures import Marked, curves, draw_sweep
from uld_serve.llm import LLM
from uld_serve.profiles.profile import ProfileVersion, RuleSpec
from uld_serve.profiles.registry import BUILTIN, find_profile

SUMMARY = "draw strength against what is forgotten and what is lost, with the knee marked"
RECORD = "sweep.json"


class Reading(Protocol):
    @property
    def documents(self) -> Sequence[Document]: ...


Read = Callable[[Path, str], Reading]
"""What reads a source of "forget" or "retain" data."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", help="a profile's name")
    parser.add_argument("--profiles", type=Path, default=BUILTIN, metavar="DIR", help="default: built in")
    for side, what in (("forget", "what must be forgotten"), ("retain", "what must stay")):
        parser.add_argument(
            f"--{side}",
            type=Path,
            required=True,
            metavar="DATA",
            help=f"{what}, held out: as `train --{side}` takes it, and nothing that the profile was trained on",
        )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each")
    shares = ", ".join(f"{share:g}" for share in SHARES)
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[],
        metavar="ALPHA",
        help=f"default: {shares} times the profile's",
    )
    parser.add_argument(
        "--dead-zones",
        type=float,
        nargs="+",
        default=[],
        metavar="Z",
        help="of relu_difference: differences of logits that count as none; default: the profile's own",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        default=[],
        metavar="KIND[:FILTER]",
        help="relu_difference, subtract or pair_linear, as the profile's streams allow, with a filter of plausibility, "
        "official, fused or none; default: the profile's own",
    )
    parser.add_argument("--model", metavar="ID_OR_PATH", help="the base; default: the embedded one")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="the last line of output is one JSON object")


def check_options(args: argparse.Namespace) -> None:
    """Raises DataError."""
    if args.limit is not None and args.limit < 1:
        raise DataError("--limit must be at least 1")
    values: list[float] = [*args.strengths, *getattr(args, "taus", [])]
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise DataError("--strengths and --taus must be above 0")
    if not all(math.isfinite(zone) and zone >= 0 for zone in args.dead_zones):
        raise DataError("--dead-zones must be 0 or more")


def read_side(args: argparse.Namespace, side: str, read: Read) -> list[Document]:
    documents = list(read(getattr(args, side), side).documents)
    return documents if args.limit is None else documents[: args.limit]


def open_model(args: argparse.Namespace, directory: Path) -> LLM:
    return LLM(args.model, profiles=[directory], dtype=args.dtype, device=args.device)


def knees(points: Sequence[Point]) -> list[Point]:
    """Of every curve that has one."""
    return [found for found in map(knee, curves(points).values()) if found is not None]


def write_record(folder: Path, record: object) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def own_point(points: Sequence[Point], version: ProfileVersion) -> Point:
    return next(point for point in points if point.rule == version.profile.rule)


def run(args: argparse.Namespace, *, read: Read) -> int:
    """`uld-serve eval sweep`. Raises DataError, ProfileError."""
    check_options(args)
    directory, version = find_profile(args.profiles, args.profile)
    rules = _one_tau_each(
        grid(version.profile, rules=args.rules, strengths=args.strengths, dead_zones=args.dead_zones)
    )
    documents = {side: read_side(args, side, read) for side in ("forget", "retain")}
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("loading the model", total=len(rules))
        llm = open_model(args, directory)
        found = {side: items(llm, documents[side], kind=side) for side in documents}
        points = Sweep(llm, version, forget=found["forget"], retain=found["retain"]).points(
            rules, advance=lambda what: progress.update(task, description=what, advance=1)
        )
    marked = Marked(knees=knees(points), own=own_point(points, version))
    record = {
        "profile": version.ref,
        "n": {side: len(some) for side, some in found.items()},
        "points": [point.record() for point in points],
        "knees": [point.record() for point in marked.knees],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_record(args.out, record)
    picture = draw_sweep(
        args.out, points, marked, title=f"{version.name}: strength against forgetting and loss"
    )
    for point in points:
        note = "  <- knee" if point in marked.knees else ""
        console.print(
            f"forget {point.forget.rise:+.3f}  retain {point.retain.rise:+.3f}  {told(point.rule)}{note}",
            highlight=False,
        )
    console.print(f"written: {args.out / (picture or RECORD)}", highlight=False)
    if args.json:
        print(json.dumps(record))
    return 0


def _one_tau_each(rules: Sequence[RuleSpec]) -> list[RuleSpec]:
    """The profile's own tau where its filter is the one tried, else the first: this sweep is of strengths."""
    own = rules[0]
    found: dict[tuple[str, str, float, float], RuleSpec] = {}
    for rule in rules:
        key = (rule.kind, rule.filter.mode, rule.strength, rule.dead_zone)
        is_own = (rule.kind, rule.filter) == (own.kind, own.filter)
        if key not in found or is_own:
            found[key] = rule
    return list(found.values())
