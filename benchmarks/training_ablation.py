"""What the settings of a method are worth: short trainings on the demo's prompts, each with one thing changed, measured
on the held-out prompts as at the end of every training, at several strengths and filters.

    python benchmarks/training_ablation.py margin --out margin.jsonl
    python benchmarks/training_ablation.py uld --out uld.jsonl --examples 0 --steps 400

Appends one JSON line a run to --out; runs whose line is there already are passed over, so that the same command goes on
where it was stopped. The base's answers are kept beside it. `--table` prints what is there as Markdown and runs
nothing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from uld_serve.errors import DataError, UldError
from uld_serve.model.loading import Base, load_base
from uld_serve.profiles.profile import FilterSpec, RuleSpec
from uld_serve.training.classroom import Classroom, Watch
from uld_serve.training.data_options import sources_of
from uld_serve.training.examples import Kind
from uld_serve.training.jobs import add_options
from uld_serve.training.measure import likelihoods
from uld_serve.training.options import Chosen
from uld_serve.training.preparation import Material, gather, prepare
from uld_serve.training.run import plan
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Sources
from uld_serve.training.work_folder import WorkFolder

TRAINED = ("forget", "retain")
Run = Mapping[str, object]
"""The settings of a run that are not the method's defaults."""


def margin_runs(num_layers: int) -> Iterator[Run]:
    """One thing changed at a time: the goal s, the number of layers M, the width of the top set, its two weights, the
    dead zone and the slack."""
    yield {}
    yield from ({"goal": goal, "common_goal": goal / 3} for goal in (7.5, 25.0))
    yield from ({"fork": num_layers - layers} for layers in (2, 4, 16) if layers < num_layers)
    yield from ({"num_top": width} for width in (1, 16, 256))
    yield from ({"others_of_forgotten": weight} for weight in (0.0, 0.3, 3.0))
    yield from ({"others_of_kept": weight} for weight in (0.0, 3.0))
    yield from ({"dead_zone": zone} for zone in (0.0, 2.0, 8.0))
    yield from ({"slack": slack} for slack in (0.0, 6.0))


def uld_runs(num_layers: int) -> Iterator[Run]:
    """K with both starts; then what else may help the method's own K."""
    for layers in (4, 8, 16, 24):
        if layers <= num_layers:
            yield from ({"exit": layers, "start": start} for start in ("none", "solved"))
    for start in ("none", "solved"):
        yield {"start": start, "output_scale": 0.25}
        yield {"start": start, "retain_ramp": 0.3}
        yield {"start": start, "rank": 128}
    yield from ({"start": "solved", "start_quiet": quiet} for quiet in (1.0, 4.0))


RUNS = {"margin": margin_runs, "uld": uld_runs}
SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of a run's own strength: what it is measured at, so that runs are compared where they cost alike."""
FILTERS: Mapping[str, Sequence[FilterSpec]] = {
    "margin": (FilterSpec(mode="fused", tau=0.02),),
    "uld": (
        FilterSpec(mode="plausibility", tau=0.01),
        FilterSpec(mode="official", tau=0.01),
        FilterSpec(mode="fused", tau=0.02),
    ),
}
"""Filters that a run is measured with; they change no training."""
MOST_LOST = 0.05
"""Nats a token of retain answers: where the table compares."""


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.table:
            print(_table(_lines(args.out)))
        else:
            _run_all(args)
    except UldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=tuple(RUNS))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, one a run")
    parser.add_argument("--table", action="store_true", help="print --out as a table and run nothing")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--examples", type=int, default=120, metavar="N", help="prompts a side to learn from; 0: all"
    )
    parser.add_argument("--first", type=int, metavar="N", help="no more than N runs this time")
    parser.add_argument("--forget", type=Path, metavar="DATA", help="other data than the demo's")
    parser.add_argument("--retain", type=Path, metavar="DATA")
    parser.add_argument("--keywords", type=Path, metavar="FILE")
    parser.add_argument("--base", metavar="ID_OR_PATH", help="default: the embedded model")
    parser.add_argument("--device", default="auto")
    return parser


def _run_all(args: argparse.Namespace) -> None:
    base = load_base(args.base, device=args.device)
    sources = _sources(args)
    runs = list(RUNS[args.method](base.num_layers))
    done = [line["changed"] for line in _lines(args.out) if _is_of(line, args)]
    todo = [run for run in runs if run not in done][: args.first]
    book = AnswerBook(args.out.with_suffix(".answers.json"))
    for number, changed in enumerate(todo, start=1):
        print(f"{number} of {len(todo)}: {changed or 'as it is'}", file=sys.stderr)
        line = {"method": args.method, "steps": args.steps, "examples": args.examples, "changed": changed}
        line |= _one(base, sources, _settings(args, base, sources, changed), book, args.examples)
        _append(args.out, json.dumps(line))
        print(json.dumps(line), flush=True)


def _one(
    base: Base, sources: Sources, settings: Settings, book: AnswerBook, examples: int
) -> dict[str, object]:
    started = time.monotonic()
    rule = plan(base, sources, settings, name="ablation").rule
    prepared = prepare(
        base, _cut(gather(sources), examples), settings, keywords=sources.keywords, book=book, stage=_unseen
    )
    settings = settings.for_data(
        num_forget=len(prepared.pools[Kind.FORGET]), num_detours=len(prepared.pools[Kind.DETOUR])
    )
    watch = Watch(stage=_unseen, report=lambda _step, _parts: None)
    with TemporaryDirectory() as folder:
        work = WorkFolder(Path(folder))
        classroom = Classroom(base, settings, prepared, rule=rule, work=work, watch=watch)
        try:
            logs = classroom.teach(resume=False)
            measured = _measured(classroom, rule, FILTERS[settings.method])
        finally:
            classroom.leave()
    return {
        "seconds": round(time.monotonic() - started, 1),
        "loss": {adapter: [log[0]["loss"], log[-1]["loss"]] for adapter, log in logs.items()},
        "measured": measured,
    }


def _measured(classroom: Classroom, own: RuleSpec, filters: Sequence[FilterSpec]) -> list[dict[str, object]]:
    """Every filter with every strength; the run's own rule has share 1 and stands among them."""
    points = [(one, share) for one in filters for share in SHARES]
    rules = [
        RuleSpec.model_validate({**own.model_dump(), "filter": one, "strength": own.strength * share})
        for one, share in points
    ]
    fusion = classroom.fusion()
    sides = {name: likelihoods(fusion, pairs, rules) for name, pairs in classroom.held_out.items()}
    return [
        {"filter": one.mode, "share": share, "strength": rule.strength}
        | {name: {"rise": round(side[at].rise, 4), **side[at].rounded()} for name, side in sides.items()}
        for at, ((one, share), rule) in enumerate(zip(points, rules, strict=True))
    ]


def _cut(material: Material, examples: int) -> Material:
    """Prompts spread over the whole of each set that is learnt from; what is held out stays whole."""
    documents = {
        name: group[:: max(1, len(group) // examples)][:examples] if examples and name in TRAINED else group
        for name, group in material.documents.items()
    }
    return Material(documents, material.record)


def _sources(args: argparse.Namespace) -> Sources:
    given = [args.forget, args.retain, args.keywords]
    if any(given) and not all(given):
        raise DataError("--forget, --retain and --keywords go together")
    names = ("forget", "retain", "keywords") if all(given) else ()
    data = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    return sources_of(_options(["--method", args.method, *(data or ["--preset", "demo"])]))


def _settings(args: argparse.Namespace, base: Base, sources: Sources, changed: Run) -> Settings:
    given = [text for name, value in changed.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    chosen = Chosen.of(_options(["--method", args.method, "--steps", str(args.steps), *given]))
    return replace(
        chosen.settings(base.num_layers, has_keywords=bool(sources.keywords)), save_steps=args.steps
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    return parser.parse_args([*arguments, "--out", "never-written"])


def _append(path: Path, line: str) -> None:
    before = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        # A line that was cut short must not swallow the next.
        file.write(("\n" if before and not before.endswith("\n") else "") + line + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """What earlier calls wrote; a line that was cut short is passed over."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def _is_of(line: Mapping[str, object], args: argparse.Namespace) -> bool:
    return (line["method"], line["steps"], line["examples"]) == (args.method, args.steps, args.examples)


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| changed | filter | forget | retain | agreement | strength for retain "
        f"{MOST_LOST:+} | forget there | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        changed = (
            ", ".join(
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in line["changed"].items()
            )
            or "nothing"
        )
        for mode in dict.fromkeys(point["filter"] for point in line["measured"]):
            curve = [point for point in line["measured"] if point["filter"] == mode]
            own = next(point for point in curve if point["share"] == 1.0)
            rise = f"{own['forget']['rise']:+.2f} | {own['retain']['rise']:+.3f} | {own['retain']['agreement']:.3f}"
            strength, forget = _within(curve)
            rows.append(f"| {changed} | {mode} | {rise} | {strength} | {forget} | {line['seconds']:.0f} |")
    return "\n".join(rows)


def _within(curve: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Strength at which retain answers lose MOST_LOST and what is forgotten there, on straight lines between the
    measured points; behind a > where even the largest strength loses less."""
    before, forgotten = (0.0, 0.0), 0.0
    for point in curve:
        lost, gained = point["retain"]["rise"], point["forget"]["rise"]
        if lost > MOST_LOST:
            share = (MOST_LOST - before[1]) / (lost - before[1])
            strength = before[0] + share * (point["strength"] - before[0])
            return f"{strength:.2f}", f"{forgotten + share * (gained - forgotten):+.2f}"
        before, forgotten = (point["strength"], lost), gained
    return f"> {before[0]:.2f}", f"> {forgotten:+.2f}"


def _unseen(_what: str, _total: int) -> Callable[[int], None]:
    return lambda _count: None


if __name__ == "__main__":
    sys.exit(main())
