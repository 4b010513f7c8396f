"""`uld-serve profiles list | show | verify`: what is in a profiles directory, and whether it does what it says.

A part of the command line: it may import evaluation and training, which the rest of this package must not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from uld_serve.data.documents import Document, read_documents
from uld_serve.errors import InvalidRequest
from uld_serve.evaluation.unfiltered import UNFILTERED, unfiltered_copy
from uld_serve.profiles.profile import ProfileVersion, StreamSpec
from uld_serve.profiles.registry import BUILTIN, find_profile, profile_directories
from uld_serve.profiles.store import read_profile, read_training_record

if TYPE_CHECKING:
    from uld_serve.evaluation.verify import Questions
    from uld_serve.llm import LLM

GATES = {
    "min_forget_rise": "nats a token by which forget answers become less likely at least (2.5)",
    "max_retain_rise": "the same for retain answers, at most (0.12)",
    "min_agreement": "share of retain positions with the base's likeliest token, at least (0.93)",
    "min_recall_fall": "share of the answers with a keyword that must be gone (0.8)",
    "max_perplexity_ratio": "of forgetting answers to the base's, under the base, at most (3)",
}

SUMMARY = "list, show, verify or merge profiles"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("profiles", help=SUMMARY, description=SUMMARY)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="one line a profile")
    show = actions.add_parser("show", help="all about one profile")
    verify = actions.add_parser("verify", help="measure on held-out prompts what it forgets and keeps")
    show.add_argument("name")
    verify.add_argument("names", nargs="+", metavar="NAME", help="several share one base and its answers")
    for action in (listing, show, verify):
        action.add_argument("--profiles", type=Path, default=BUILTIN, metavar="DIR", help="default: built in")
        action.add_argument("--json", action="store_true", help="the last line of output is one JSON object")
    verify.add_argument("--model", metavar="ID_OR_PATH", help="the base; default: the embedded one")
    verify.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    verify.add_argument("--samples", type=int, default=4, metavar="N", help="draws a prompt at T = 1 (4)")
    verify.add_argument("--max-tokens", type=int, default=48, metavar="N", help="longest answer (48)")
    verify.add_argument("--device", default="auto", help="auto, cpu or cuda")
    for side in ("forget", "retain"):
        verify.add_argument(
            f"--{side}",
            type=Path,
            metavar="DATA",
            help=f"{side} prompts to ask in place of the profile's own",
        )
    verify.add_argument("--keywords", type=Path, metavar="FILE", help="with --forget: words that must go")
    verify.add_argument(
        "--limit", type=int, metavar="N", help="with --forget: at most N of either, spread evenly"
    )
    gates = verify.add_argument_group("gates")
    for name, what in GATES.items():
        gates.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=what)
    _add_merge(actions)


def _add_merge(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = actions.add_parser(
        "merge",
        help="train one assistant for several requests",
        description="Train one assistant on the data of several requests of a manifest (see `uld-serve train "
        "--manifest`): one stream at serving time instead of one a profile. Their readme and plot are left out.",
    )
    merge.add_argument("requests", nargs="*", metavar="REQUEST", help="default: all of the manifest")
    merge.add_argument("--manifest", type=Path, required=True, metavar="FILE")
    merge.add_argument("--name", required=True, help="the merged profile's name")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="the profile to write")
    merge.add_argument("--base", metavar="ID_OR_PATH", help="the base model; default: the embedded one")
    merge.add_argument("--dtype", choices=("auto", "bfloat16", "float32"))
    merge.add_argument("--device", help="auto, cpu or cuda")
    merge.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    merge.add_argument("--json", action="store_true", help="the last line of output is one JSON object")


def run(args: argparse.Namespace) -> int:
    actions = {"list": _list, "show": _show, "verify": _verify, "merge": _merge}
    return actions[args.action](args)


def _merge(args: argparse.Namespace) -> int:
    from uld_serve.training.jobs import merge

    common = [
        text
        for option in ("base", "dtype", "device")
        if getattr(args, option) is not None
        for text in (f"--{option}", getattr(args, option))
    ]
    common += [f"--{flag}" for flag in ("resume", "json") if getattr(args, flag)]
    return merge(args.manifest, args.requests, name=args.name, out=args.out, common=common)


def _list(args: argparse.Namespace) -> int:
    versions = [version for _, version in _read_all(args.profiles)]
    if args.json:
        print(json.dumps({"profiles": [_summary(version) for version in versions]}))
        return 0
    rows = [("name", "version", "method", "rule", "strength", "streams", "base")]
    rows += [_row(version) for version in versions]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(version: ProfileVersion) -> tuple[str, str, str, str, str, str, str]:
    profile = version.profile
    streams = [f"{one.fork}-{one.exit} {one.kv}{_where(one)}" for one in profile.streams]
    streams += ["target adapter"] if profile.target_adapter is not None else []
    strength = f"{profile.rule.strength:g}"
    return (
        version.name,
        version.digest12,
        profile.method,
        profile.rule.kind,
        strength,
        ", ".join(streams),
        profile.base.id,
    )


def _where(stream: StreamSpec) -> str:
    return "" if stream.model is None else f" in {stream.model.id}"


def _show(args: argparse.Namespace) -> int:
    directory, version = find_profile(args.profiles, args.name)
    everything = {**_summary(version), "training": read_training_record(directory)}
    if args.json:
        print(json.dumps(everything))
    else:
        Console().print_json(json.dumps(everything))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from uld_serve.evaluation.remembering import Remembering
    from uld_serve.evaluation.verdict import Limits
    from uld_serve.evaluation.verify import NUM_STEPS, Options, verify
    from uld_serve.llm import LLM

    _check_verify(args)
    documents = {side: _documents(args, side) for side in ("forget", "retain") if getattr(args, side)}
    found = [find_profile(args.profiles, name) for name in args.names]
    options = Options(samples=args.samples, max_tokens=args.max_tokens)
    given = {name: getattr(args, name) for name in GATES}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    console = Console(stderr=True)
    reports = []
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True))
        task = progress.add_task("loading the model", total=NUM_STEPS * len(found) + 1)
        names = _names_unlike(args.names)
        copies = [
            stack.enter_context(unfiltered_copy(directory, version, name=next(names)))
            for directory, version in found
        ]
        roots = [directory for directory, _ in found] + [copy for copy in copies if copy is not None]
        llm = LLM(args.model, profiles=roots, dtype=args.dtype, device=args.device)
        model = Remembering(llm)
        questions = _questions(llm, documents, args.keywords) if documents else None
        for (_, version), copy in zip(found, copies, strict=True):
            unfiltered = version.name if copy is None else copy.name
            step = partial(_advance, progress, task, version.name)
            report = verify(
                model,
                version,
                unfiltered=unfiltered,
                options=options,
                questions=questions,
                limits=limits,
                step=step,
            ).as_json()
            _print_report(console, report)
            reports.append(report)
    ok = all(report["ok"] for report in reports)
    if args.json:
        whole = reports[0] if len(reports) == 1 else {"profiles": reports, "ok": ok}
        print(json.dumps(_without_nan(whole), allow_nan=False))
    return 0 if ok else 1


def _check_verify(args: argparse.Namespace) -> None:
    if args.samples < 1 or args.max_tokens < 1:
        raise InvalidRequest("--samples and --max-tokens must be at least 1")
    if len(set(args.names)) < len(args.names):
        raise InvalidRequest("one profile is named twice")
    if (args.forget is None) != (args.retain is None):
        raise InvalidRequest("--forget and --retain go together")
    for name in ("keywords", "limit"):
        if getattr(args, name) is not None and args.forget is None:
            raise InvalidRequest(
                f"--{name} is of questions in place of the profile's own: give --forget and --retain"
            )
    if args.limit is not None and args.limit < 2:
        raise InvalidRequest("--limit must be at least 2")
    for name in GATES:
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            raise InvalidRequest(f"--{name.replace('_', '-')} must be a number")


def _documents(args: argparse.Namespace, side: str) -> Sequence[Document]:
    found = read_documents(getattr(args, side), kind=side).documents
    if args.limit is None or len(found) <= args.limit:
        return found
    return [found[number * len(found) // args.limit] for number in range(args.limit)]


def _questions(llm: LLM, documents: Mapping[str, Sequence[Document]], keywords: Path | None) -> Questions:
    from uld_serve.evaluation.held_out import items
    from uld_serve.evaluation.verify import Questions

    words = [] if keywords is None else [line.strip() for line in keywords.read_text("utf-8").splitlines()]
    forget, retain = (items(llm, documents[side], kind=side, at_least=1) for side in ("forget", "retain"))
    return Questions(forget, retain, tuple(word for word in words if word))


def _names_unlike(taken: Sequence[str]) -> Iterator[str]:
    return (name for name in (f"{UNFILTERED}-{number}" for number in count()) if name not in taken)


def _advance(progress: Progress, task: TaskID, name: str, what: str) -> None:
    progress.update(task, description=f"{name}: {what}", advance=1)


def _print_report(console: Console, report: dict[str, object]) -> None:
    console.print(f"[bold]{report['profile']}[/] {report['digest']}  {report['rule']} x {report['strength']}")
    for section in ("forget", "retain", "recall", "fluency"):
        if report[section] is not None:
            console.print(f"{section:8}", ", ".join(_figures(report[section])), highlight=False)
    table = Table("gate", "measured", "limit", "", box=None)
    gates = report["gates"]
    for gate in gates if isinstance(gates, list) else []:
        value = "not measurable" if gate["value"] is None else f"{gate['value']:.3f}"
        limit = f">= {gate['at_least']}" if "at_least" in gate else f"<= {gate['at_most']}"
        table.add_row(gate["name"], value, limit, "[green]ok[/]" if gate["ok"] else "[red]missed[/]")
    console.print(table)


def _figures(section: object) -> list[str]:
    values = section if isinstance(section, dict) else {}
    return [f"{name} {value:.4g}" for name, value in values.items() if value is not None]


def _without_nan(value: object) -> object:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary(version: ProfileVersion) -> dict[str, object]:
    probes = version.probes
    return {
        **version.profile.model_dump(mode="json"),
        "digest": version.digest,
        "adapters": {
            owner: {
                "rank": adapter.rank,
                "scaling": adapter.scaling,
                "layers": list(adapter.layers),
                "modules": list(adapter.modules),
                "parameters": adapter.num_parameters,
            }
            for owner, adapter in version.adapters.items()
        },
        "probes": {
            "keywords": len(probes.keywords),
            "forget": len(probes.forget),
            "retain": len(probes.retain),
            "replay": len(probes.replay),
        },
    }


def _read_all(root: Path) -> list[tuple[Path, ProfileVersion]]:
    return [(directory, read_profile(directory)) for directory in profile_directories(root)]
