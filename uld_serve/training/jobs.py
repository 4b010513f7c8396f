"""Training jobs: options turned into settings and sources, run one by one, and told about. Called by `uld-serve train`
and `uld-serve profiles merge`. Knows no tensor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as transformers_logging

from uld_serve.errors import DataError, UldError
from uld_serve.model.loading import Base, load_base
from uld_serve.training.classroom import Watch
from uld_serve.training.data_options import add_data, read_text, sources_of
from uld_serve.training.dry_run import Forecast, forecast
from uld_serve.training.manifest import OF_ALL, Request, joined, read_manifest
from uld_serve.training.options import Chosen, add_method, add_settings
from uld_serve.training.plot import plot_losses, require_plot
from uld_serve.training.progress import Display, EventLines
from uld_serve.training.run import Outcome, refuse_existing, train
from uld_serve.training.settings import Settings, option
from uld_serve.training.sources import Sources
from uld_serve.training.work_folder import WorkFolder

# Nats a token. `profiles verify` wants 2.5; below this a profile is hardly more than the base.
LITTLE = 1.0
ANSWERS = ".answers.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_data(parser.add_argument_group("data"))
    out = parser.add_argument_group("profile")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="the profile to write")
    out.add_argument("--name", help="the profile's name; default: the last part of --out")
    out.add_argument("--readme", type=Path, metavar="FILE", help="a README.md to put into the profile")
    out.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="many requests in TOML; --out is the folder of their profiles",
    )
    out.add_argument(
        "--dry-run",
        action="store_true",
        help="show examples, token counts, parameters, memory and time, and write nothing",
    )
    out.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the losses, .png")
    out.add_argument("--json", action="store_true", help="the last line of output is one JSON object")
    out.add_argument(
        "--events", action="store_true", help="every stage and every loss as a JSON object on standard output"
    )
    how = parser.add_argument_group("training", "defaults depend on the method")
    add_method(how)
    add_base(how)
    how.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    add_settings(how)
    how.add_argument(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME",
        help="a tracker of transformers' Trainer, as tensorboard",
    )


def add_base(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base", metavar="ID_OR_PATH", help="the base model; default: the embedded one")
    group.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")


@dataclass(frozen=True, slots=True)
class _Job:
    """One run, all of whose options are known to be right."""

    args: argparse.Namespace
    chosen: Chosen
    sources: Sources
    readme: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Job:
        """Raises DataError."""
        if args.plot is not None:
            require_plot(args.plot)
        readme = read_text(args.readme) if args.readme else None
        return cls(args, Chosen.of(args), sources_of(args), readme)

    @property
    def name(self) -> str:
        return str(self.args.name or self.args.out.name)

    @property
    def out(self) -> Path:
        return Path(self.args.out)


def run(args: argparse.Namespace) -> int:
    """What `uld-serve train` was asked for; its exit status. Raises UldError."""
    if args.manifest is not None:
        return _run_manifest(args)
    if args.dry_run:
        _refuse_beside_dry_run(args)
    job = _Job.of(args)
    console = _console(args)
    refuse_existing(job.out)  # before minutes are spent on loading
    base = load_base(args.base, dtype=args.dtype, device=args.device)
    if args.dry_run:
        return _foretell(job, base, console)
    outcome = _train(job, base, console, resume=lambda _: bool(args.resume))
    return 0 if outcome is None else _tell(outcome, job, console)


def _refuse_beside_dry_run(args: argparse.Namespace) -> None:
    """Options that a run which trains nothing would ignore."""
    for name in ("resume", "plot", "tracker", "events"):
        if getattr(args, name):
            raise DataError(f"--dry-run trains nothing; leave out --{name}")


def merge(manifest: Path, names: Sequence[str], *, name: str, out: Path, common: Sequence[str]) -> int:
    """Train one assistant on the data of several requests of a manifest. `common` are options that hold beside theirs.

    Raises DataError.
    """
    arguments = joined(read_manifest(manifest), names)
    return run(_parsed([*arguments, *common, "--out", str(out), "--name", name], where=str(manifest)))


def _console(args: argparse.Namespace) -> Console:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Before a model is loaded: under a launcher it says which device is this process's.
    processes = PartialState(cpu=args.device == "cpu")
    return Console(stderr=True, quiet=not processes.is_main_process)


def _train(
    job: _Job,
    base: Base,
    console: Console,
    *,
    resume: Callable[[Settings], bool],
    answers: Path | None = None,
) -> Outcome | None:
    settings = _settings(job, base, console)
    is_told = job.args.events and PartialState().is_main_process
    with EventLines() if is_told else Display(console) as display:
        watch = Watch(stage=display.stage, report=display.report, trackers=tuple(job.args.tracker))
        outcome = train(
            base,
            job.sources,
            settings,
            name=job.name,
            out=job.out,
            resume=resume(settings),
            readme=job.readme,
            watch=watch,
            answers=answers,
        )
    if outcome is not None and job.args.plot is not None:
        plot_losses(job.args.plot, outcome.logs, title=f"{job.name}: {settings.method}")
    return outcome


def _settings(job: _Job, base: Base, console: Console) -> Settings:
    for line in job.chosen.told():
        console.print(line, highlight=False, soft_wrap=True)
    return job.chosen.settings(base.num_layers, has_keywords=bool(job.sources.keywords))


def _foretell(job: _Job, base: Base, console: Console) -> int:
    """What the run would do, for people and, with --json, for programs."""
    settings = _settings(job, base, console)
    with Display(console) as display:
        watch = Watch(stage=display.stage, report=display.report)
        found: Forecast = forecast(base, job.sources, settings, name=job.name, watch=watch)
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if job.args.json:
        print(json.dumps({"settings": asdict(settings), **found.record()}, default=str))
    return 0


def _tell(outcome: Outcome, job: _Job, console: Console) -> int:
    found = {"profile": outcome.version.ref, "path": str(job.out), "measured": outcome.record["measured"]}
    console.print_json(json.dumps({**found, "data": outcome.record["data"]}))
    rise = outcome.forget_rise
    if rise is not None and rise < LITTLE:
        console.print(
            f"warning: the held-out forget answers became only {rise:.2f} nats a token less likely, so this profile "
            "forgets little; train longer, or see `uld-serve profiles verify`"
        )
    if job.args.json:
        print(json.dumps(found))
    return 0


def _run_manifest(args: argparse.Namespace) -> int:
    """Every request in turn on one base; one that fails ends no other. 1 if any failed."""
    for name in ("dry_run", "events"):
        if getattr(args, name):
            raise DataError(f"--{option(name)} is of one request; leave out --manifest")
    _refuse_beside_manifest(args)
    jobs = [_job_of(request, args) for request in read_manifest(args.manifest)]
    finished = [job for job in jobs if job.out.exists()]
    if finished and not args.resume:
        refuse_existing(finished[0].out)
    console = _console(args)
    base = load_base(args.base, dtype=args.dtype, device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    answers = args.out / ANSWERS
    told: list[dict[str, object]] = []
    for number, job in enumerate(jobs, start=1):
        console.print(f"request {number} of {len(jobs)}: {job.name}", highlight=False)
        if job in finished:
            told.append({"name": job.name, "path": str(job.out), "status": "was there"})
            continue
        told.append(_one_of_many(job, base, console, resume=args.resume, answers=answers))
    failed = [one for one in told if one["status"] == "failed"]
    if not failed:
        answers.unlink(missing_ok=True)
    console.print_json(json.dumps(told))
    if args.json:
        print(json.dumps({"profiles": told}))
    return 1 if failed else 0


def _refuse_beside_manifest(args: argparse.Namespace) -> None:
    """Raises DataError: an option that each request has for itself."""
    usual = vars(_parsed(["--out", str(args.out)], where=""))
    for field, value in usual.items():
        name = option(field)
        if (name == "name" or name not in OF_ALL) and getattr(args, field) != value:
            raise DataError(
                f"--{name} is of one request; put it into {args.manifest}, under [defaults] for all"
            )


def _one_of_many(
    job: _Job, base: Base, console: Console, *, resume: bool, answers: Path
) -> dict[str, object]:
    """What was told otherwise when it was begun is begun anew."""

    def goes_on(settings: Settings) -> bool:
        return resume and WorkFolder.beside(job.out).is_of(base, settings, job.sources)

    try:
        outcome = _train(job, base, console, resume=goes_on, answers=answers)
    except UldError as error:
        console.print(f"{job.name} failed: {error}", highlight=False, markup=False, soft_wrap=True)
        return {"name": job.name, "path": str(job.out), "status": "failed", "reason": str(error)}
    if outcome is None:
        return {"name": job.name, "path": str(job.out), "status": "trained by the first process"}
    return {
        "name": job.name,
        "path": str(job.out),
        "status": "trained",
        "profile": outcome.version.ref,
        "measured": outcome.record["measured"],
    }


def _job_of(request: Request, args: argparse.Namespace) -> _Job:
    shared = [text for one in args.tracker for text in ("--tracker", one)]
    out = ["--out", str(args.out / request.name), "--name", request.name]
    given = _parsed([*request.arguments, *shared, *out], where=f"{args.manifest}, '{request.name}'")
    try:
        return _Job.of(given)
    except DataError as error:
        raise DataError(f"request '{request.name}': {error}") from error


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a manifest as an error of the manifest."""

    where = ""

    def error(self, message: str) -> NoReturn:
        raise DataError(f"--manifest: {self.where}: {message}")


def _parsed(arguments: Sequence[str], *, where: str) -> argparse.Namespace:
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.where = where
    add_options(parser)
    return parser.parse_args(list(arguments))
