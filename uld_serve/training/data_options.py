"""The options that say where the data is. Called by command. Knows no method and no model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.training.methods.catalog import PRESETS
from uld_serve.training.sources import Sources

DATA = ("forget", "retain", "keywords", "probe_forget", "probe_retain", "probes", "augment_file")
DEMO = Path(__file__).parent / "data" / "harry_potter"


def add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset",
        action="append",
        default=[],
        choices=("demo", *PRESETS),
        help="demo: the built-in Harry Potter prompts; others: a paper's numbers. May be given once of each",
    )
    group.add_argument(
        "--forget",
        action="append",
        type=Path,
        metavar="DATA",
        help="what must be forgotten: JSONL, a folder of .txt files, or a Hugging Face dataset as ID:CONFIG:SPLIT; "
        "may be repeated, as the other files of data may",
    )
    group.add_argument("--retain", action="append", type=Path, metavar="DATA", help="what must stay")
    group.add_argument(
        "--keywords",
        action="append",
        type=Path,
        metavar="FILE",
        help="words that an answer must not name, one a line",
    )
    group.add_argument(
        "--probes", choices=("split", "none"), help="hold out every sixth prompt (default with --keywords)"
    )
    for side in ("forget", "retain"):
        group.add_argument(
            f"--probe-{side}",
            action="append",
            type=Path,
            metavar="FILE",
            help=f"held-out {side} prompts, JSONL",
        )
    group.add_argument(
        "--augment",
        action="append",
        default=[],
        choices=("columns", "file", "self", "context", "none"),
        help="columns: other wordings and wrong answers that stand in the forget data (default); file: those of "
        "--augment-file; self: the base's own words (default of margin with --keywords); context, beside any of these: "
        "questions that come with their answer, which may then be used. May be repeated",
    )
    group.add_argument(
        "--augment-file",
        action="append",
        type=Path,
        metavar="FILE",
        help="JSONL with other wordings, by question",
    )


def sources_of(args: argparse.Namespace) -> Sources:
    """Raises DataError: options that are missing or contradict each other, a keywords file without a word."""
    if "demo" in args.preset:
        given = [name for name in DATA if getattr(args, name) is not None]
        if given:
            raise DataError(f"--preset demo brings its own data; leave out --{given[0].replace('_', '-')}")
        return Sources(
            forget=DEMO / "forget_train.jsonl",
            retain=DEMO / "retain_train.jsonl",
            keywords=_keywords([DEMO / "keywords.txt"]),
            probe_forget=DEMO / "forget_verify.jsonl",
            probe_retain=DEMO / "retain_verify.jsonl",
        )
    if args.forget is None or args.retain is None:
        raise DataError("give --forget and --retain, or --preset demo")
    _check_augment(args)
    keywords = _keywords(args.keywords) if args.keywords else ()
    has_probes = args.probe_forget is not None
    if has_probes != (args.probe_retain is not None):
        raise DataError("--probe-forget and --probe-retain go together")
    if has_probes and args.probes:
        raise DataError(f"--probes {args.probes} contradicts --probe-forget")
    split = args.probes == "split" or (args.probes is None and bool(keywords) and not has_probes)
    if (split or has_probes) and not keywords:
        raise DataError("held-out prompts are judged by keywords: give --keywords, or --probes none")
    return Sources(
        forget=_joined(args.forget),
        retain=_joined(args.retain),
        keywords=keywords,
        uses_columns=not set(args.augment) - {"context"} or "columns" in args.augment,
        augment_file=_joined(args.augment_file) if args.augment_file else None,
        probe_forget=_joined(args.probe_forget) if has_probes else None,
        probe_retain=_joined(args.probe_retain) if has_probes else None,
        split=split,
    )


def _check_augment(args: argparse.Namespace) -> None:
    if "none" in args.augment and len(set(args.augment)) > 1:
        raise DataError("--augment none contradicts the others")
    if ("file" in args.augment) != (args.augment_file is not None):
        raise DataError("--augment file and --augment-file go together")


def _joined(paths: Sequence[Path]) -> Path | tuple[Path, ...]:
    return paths[0] if len(paths) == 1 else tuple(paths)


def _keywords(paths: Sequence[Path]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for path in paths:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not lines:
            raise DataError(f"--keywords: {path} is empty")
        found |= dict.fromkeys(lines)
    return tuple(found)


def read_text(path: Path) -> str:
    """Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text") from error
