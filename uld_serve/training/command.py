"""`uld-serve train`: from forget and retain data to a profile directory. Called by cli; does nothing but turn
options into settings and show progress.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as transformers_logging

from uld_serve.errors import DataError
from uld_serve.model.loading import load_base
from uld_serve.training.classroom import Watch
from uld_serve.training.dry_run import Forecast, forecast
from uld_serve.training.methods.catalog import PRESETS
from uld_serve.training.options import Chosen, add_method, add_settings
from uld_serve.training.progress import Display
from uld_serve.training.run import Outcome, refuse_existing, train
from uld_serve.training.settings import Settings
from uld_serve.training.sources import Sources

DATA = ("forget", "retain", "keywords", "probe_forget", "probe_retain", "probes", "augment_file")
DEMO = Path(__file__).parent / "data" / "harry_potter"
# Nats a token. `profiles verify` wants 2.5; below this a profile is hardly more than the base.
LITTLE = 1.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a profile",
        description="Train an assistant that remembers what is to be forgotten, and write it as a profile. Data is "
        "JSONL, a line being {question, answer}, {prompt, completion}, {messages} or {text}, or a folder of .txt "
        "files. Where a prompt has no answer the base's own is used.",
    )
    _add_data(parser.add_argument_group("data"))
    out = parser.add_argument_group("profile")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="the profile to write")
    out.add_argument("--name", help="the profile's name; default: the last part of --out")
    out.add_argument("--readme", type=Path, metavar="FILE", help="a README.md to put into the profile")
    out.add_argument(
        "--dry-run",
        action="store_true",
        help="show examples, token counts, parameters, memory and time, and write nothing",
    )
    out.add_argument("--json", action="store_true", help="the last line of output is one JSON object")
    how = parser.add_argument_group("training", "defaults depend on the method")
    add_method(how)
    how.add_argument("--base", metavar="ID_OR_PATH", help="the base model; default: the embedded one")
    how.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    how.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_settings(how)
    how.add_argument(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME",
        help="a tracker of transformers' Trainer, as tensorboard",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset",
        action="append",
        default=[],
        choices=("demo", *PRESETS),
        help="demo: the built-in Harry Potter prompts; others: a paper's numbers. May be given once of each",
    )
    group.add_argument(
        "--forget",
        type=Path,
        metavar="DATA",
        help="what must be forgotten: JSONL, a folder of .txt files, or a Hugging Face dataset as ID:CONFIG:SPLIT",
    )
    group.add_argument("--retain", type=Path, metavar="DATA", help="what must stay")
    group.add_argument(
        "--keywords", type=Path, metavar="FILE", help="words that an answer must not name, one a line"
    )
    group.add_argument(
        "--probes", choices=("split", "none"), help="hold out every sixth prompt (default with --keywords)"
    )
    group.add_argument("--probe-forget", type=Path, metavar="FILE", help="held-out forget prompts, JSONL")
    group.add_argument("--probe-retain", type=Path, metavar="FILE", help="held-out retain prompts, JSONL")
    group.add_argument(
        "--augment",
        action="append",
        default=[],
        choices=("columns", "file", "self", "none"),
        help="columns: other wordings and wrong answers that stand in the forget data (default); file: those of "
        "--augment-file; self: the base's own words (default of margin with --keywords). May be repeated",
    )
    group.add_argument(
        "--augment-file", type=Path, metavar="FILE", help="JSONL with other wordings, by question"
    )


def run(args: argparse.Namespace) -> int:
    chosen = Chosen.of(args)
    sources = _sources(args)
    readme = _read(args.readme) if args.readme else None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    processes = PartialState(cpu=args.device == "cpu")
    console = Console(stderr=True, quiet=not processes.is_main_process)
    refuse_existing(args.out)  # before minutes are spent on loading
    base = load_base(args.base, dtype=args.dtype, device=args.device)
    settings = chosen.settings(base.num_layers, has_keywords=bool(sources.keywords))
    for line in chosen.told():
        console.print(line, highlight=False, soft_wrap=True)
    name = args.name or args.out.name
    with Display(console, steps=settings.steps) as display:
        watch = Watch(stage=display.stage, report=display.report, trackers=tuple(args.tracker))
        if args.dry_run:
            found = forecast(base, sources, settings, name=name, watch=watch)
            return _foretell(found, settings, args, console)
        outcome = train(
            base,
            sources,
            settings,
            name=name,
            out=args.out,
            resume=args.resume,
            readme=readme,
            watch=watch,
        )
    return 0 if outcome is None else _tell(outcome, args, console)


def _foretell(found: Forecast, settings: Settings, args: argparse.Namespace, console: Console) -> int:
    """What the run would do, for people and, with --json, for programs."""
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.json:
        print(json.dumps({"settings": asdict(settings), **found.record()}, default=str))
    return 0


def _tell(outcome: Outcome, args: argparse.Namespace, console: Console) -> int:
    found = {"profile": outcome.version.ref, "path": str(args.out), "measured": outcome.record["measured"]}
    console.print_json(json.dumps({**found, "data": outcome.record["data"]}))
    rise = outcome.forget_rise
    if rise is not None and rise < LITTLE:
        console.print(
            f"warning: the held-out forget answers became only {rise:.2f} nats a token less likely, so this profile "
            "forgets little; train longer, or see `uld-serve profiles verify`"
        )
    if args.json:
        print(json.dumps(found))
    return 0


def _sources(args: argparse.Namespace) -> Sources:
    if "demo" in args.preset:
        given = [name for name in DATA if getattr(args, name) is not None]
        if given:
            raise DataError(f"--preset demo brings its own data; leave out --{given[0].replace('_', '-')}")
        return Sources(
            forget=DEMO / "forget_train.jsonl",
            retain=DEMO / "retain_train.jsonl",
            keywords=_keywords(DEMO / "keywords.txt"),
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
        forget=args.forget,
        retain=args.retain,
        keywords=keywords,
        uses_columns=not args.augment or "columns" in args.augment,
        augment_file=args.augment_file,
        probe_forget=args.probe_forget,
        probe_retain=args.probe_retain,
        split=split,
    )


def _check_augment(args: argparse.Namespace) -> None:
    if "none" in args.augment and len(set(args.augment)) > 1:
        raise DataError("--augment none contradicts the others")
    if ("file" in args.augment) != (args.augment_file is not None):
        raise DataError("--augment file and --augment-file go together")


def _keywords(path: Path) -> tuple[str, ...]:
    found = tuple(line.strip() for line in _read(path).splitlines() if line.strip())
    if not found:
        raise DataError(f"--keywords: {path} is empty")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text") from error
