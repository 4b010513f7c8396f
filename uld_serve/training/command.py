"""`uld-serve train`: from forget and retain data to a profile directory. Called by cli; does nothing but turn
options into settings and show progress.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as transformers_logging

from uld_serve.errors import DataError
from uld_serve.model.loading import load_base
from uld_serve.training.classroom import Watch
from uld_serve.training.methods.catalog import PRESETS
from uld_serve.training.options import Chosen, add_method, add_settings
from uld_serve.training.preparation import Sources
from uld_serve.training.progress import Display
from uld_serve.training.run import Outcome, refuse_existing, train

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
    group.add_argument("--forget", type=Path, metavar="FILE", help="what must be forgotten")
    group.add_argument("--retain", type=Path, metavar="FILE", help="what must stay")
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
        choices=("self", "none"),
        help="margin: let the base find other answers to the forget prompts (default with --keywords)",
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
    with Display(console, steps=settings.steps) as display:
        outcome = train(
            base,
            sources,
            settings,
            name=args.name or args.out.name,
            out=args.out,
            resume=args.resume,
            readme=readme,
            watch=Watch(stage=display.stage, report=display.report, trackers=tuple(args.tracker)),
        )
    return 0 if outcome is None else _tell(outcome, args, console)


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
        given = [name for name in ("forget", "retain", "keywords", "probe_forget", "probe_retain", "probes")
                 if getattr(args, name) is not None]  # fmt: skip
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
        probe_forget=args.probe_forget,
        probe_retain=args.probe_retain,
        split=split,
    )


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
