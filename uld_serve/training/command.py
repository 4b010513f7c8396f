"""`uld-serve train`: from forget and retain data to a profile directory. Called by cli; does nothing but turn
options into settings and show progress.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from uld_serve.errors import DataError
from uld_serve.model.loading import Base, load_base
from uld_serve.training.preparation import Sources
from uld_serve.training.progress import Display
from uld_serve.training.run import refuse_existing, train
from uld_serve.training.settings import METHODS, Settings, defaults

DEMO = Path(__file__).parent / "data" / "harry_potter"
# Nats a token. `profiles verify` wants 2.5; below this a profile is hardly more than the base.
LITTLE = 1.0
# Options that stand for a field of Settings, with their type and help; None keeps the method's default.
SETTINGS: Mapping[str, tuple[type, str]] = {
    "steps": (int, "optimiser steps"),
    "lr": (float, "highest learning rate"),
    "rank": (int, "LoRA rank"),
    "fork": (int, "layer at which the assistant enters (0 = the embedding)"),
    "exit": (int, "layer after which it leaves"),
    "strength": (float, "strength of the profile's rule"),
    "retain_weight": (float, "weight of the retain term (beta for uld)"),
    "goal": (float, "margin: how far a - b shall rise on what is forgotten"),
    "common_goal": (float, "margin: the same for tokens that any text is made of"),
    "slack": (float, "margin: how far a - b shall stay below 0 on what is kept"),
    "detour_weight": (float, "margin: weight of other answers to forget prompts"),
    "forget_batch": (int, "forget examples a step"),
    "retain_batch": (int, "retain examples a step"),
    "grad_accum": (int, "batches a step"),
    "max_answer_tokens": (int, "longest answer learnt from"),
    "save_steps": (int, "steps between checkpoints"),
    "seed": (int, "seed of everything random"),
}


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
    how.add_argument("--method", choices=METHODS, required=True)
    how.add_argument("--base", metavar="ID_OR_PATH", help="the base model; default: the embedded one")
    how.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    how.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda")
    for field, (kind, what) in SETTINGS.items():
        how.add_argument(f"--{field.replace('_', '-')}", type=kind, metavar="N", help=what)


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", choices=("demo",), help="the built-in Harry Potter prompts")
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
    sources = _sources(args)
    readme = _read(args.readme) if args.readme else None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(stderr=True)
    refuse_existing(args.out)  # before minutes are spent on loading
    base = load_base(args.base, dtype=args.dtype, device=args.device)
    settings = _settings(args, base, has_keywords=bool(sources.keywords))
    with Display(console, steps=settings.steps) as display:
        outcome = train(
            base,
            sources,
            settings,
            name=args.name or args.out.name,
            out=args.out,
            resume=args.resume,
            readme=readme,
            stage=display.stage,
            report=display.report,
        )
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
    if args.preset:
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


def _settings(args: argparse.Namespace, base: Base, *, has_keywords: bool) -> Settings:
    settings = defaults(args.method, num_layers=base.num_layers)
    only_margin = ("goal", "common_goal", "slack", "detour_weight")
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.method != "margin":
        refused = [name for name in only_margin if name in given]
        refused += ["augment"] if args.augment == "self" else []
        if refused:
            raise DataError(f"--{refused[0].replace('_', '-')} is for --method margin")
    elif args.augment == "self" and not has_keywords:
        raise DataError("--augment self needs --keywords: without them the other answers would tell as well")
    if args.method == "margin" and has_keywords and args.augment != "none":
        settings = replace(settings, detours=2, detour_batch=4)
    if settings.detours == 0 and "detour_weight" in given:
        raise DataError(
            "--detour-weight needs other answers to weigh: give --keywords, without --augment none"
        )
    return replace(settings, **given)


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
