"""`uld-serve eval`: from logs and models to the figures that unlearning is judged by. A part of the command line."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from uld_serve.data.documents import read_documents
from uld_serve.errors import DataError
from uld_serve.evaluation import sweep_command

SUMMARY = "read or make an evaluation's log and tell what was forgotten and kept"
BENCHMARKS = {
    "tofu": "uld_serve.evaluation.tofu_command",
    "rwku": "uld_serve.evaluation.rwku_command",
    "muse": "uld_serve.evaluation.muse_command",
    "probes": "uld_serve.evaluation.probes_command",
}
# Packages of the extra, by the module that is asked for.
NEEDED = ("scipy.stats", "rouge_score.rouge_scorer")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("eval", help=SUMMARY, description=SUMMARY)
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    logs = benchmarks.add_parser(
        "tofu-logs",
        help="model utility and forget quality of a TOFU log",
        description="Model utility and forget quality of a log of TOFU's evaluation: a file with the sections retain, "
        "real_authors, world_facts and forget, TOFU's eval_log_aggregated.json, or a folder with TOFU's four files.",
    )
    logs.add_argument("log", type=Path, metavar="LOG")
    logs.add_argument(
        "--reference",
        type=Path,
        metavar="LOG",
        help="of a model that never saw the forget set, for forget quality",
    )
    logs.add_argument(
        "--truth-ratio",
        choices=("geometric", "arithmetic"),
        default="geometric",
        help="mean of the wrong answers' losses, as TOFU's code has it (default), or of their probabilities, as its "
        "paper has it",
    )
    logs.add_argument("--json", action="store_true", help="the last line of output is one JSON object")
    for name, module in BENCHMARKS.items():
        if _missing() is None:
            # What it imports comes with the extra.
            importlib.import_module(module).add_parser(benchmarks)
        else:
            benchmarks.add_parser(name, help="needs the extra evaluation")
    sweep_command.add_options(
        benchmarks.add_parser("sweep", help=sweep_command.SUMMARY, description=sweep_command.SUMMARY)
    )


def run(args: argparse.Namespace) -> int:
    """Raises DataError: a log that cannot be read, a package that is missing."""
    if args.benchmark == "sweep":
        return sweep_command.run(args, read=lambda path, kind: read_documents(path, kind=kind))
    missing = _missing()
    if missing is not None:
        raise DataError(f"eval needs the package {missing}: pip install 'uld-serve[evaluation]'")
    if args.benchmark in BENCHMARKS:
        status: int = importlib.import_module(BENCHMARKS[args.benchmark]).run(args)
        return status
    return _tofu_logs(args)


def _missing() -> str | None:
    """A package of the extra that is not installed."""
    for module in NEEDED:
        try:
            importlib.import_module(module)
        except ImportError:
            return module.split(".")[0].replace("_", "-")
    return None


def _tofu_logs(args: argparse.Namespace) -> int:
    # The extra's packages are behind these imports.
    from uld_serve.evaluation.eval_log import read_log
    from uld_serve.evaluation.tofu_report import TofuReport

    reference = None if args.reference is None else read_log(args.reference)
    report = TofuReport.of(read_log(args.log), reference, variant=args.truth_ratio)
    console = Console(stderr=args.json)
    table = Table("section", "n", "probability", "ROUGE-L recall", "truth ratio", title=str(args.log))
    for name, section in report.sections.items():
        figures = (section.probability, section.rougeL_recall, section.truth_ratio)
        table.add_row(name, str(section.n), *(f"{figure:.4f}" for figure in figures))
    console.print(table)
    console.print(f"model utility {report.model_utility:.4f} (truth ratio: {report.variant})")
    if report.forget_quality is not None:
        quality = report.forget_quality
        console.print(f"forget quality p {quality.p:.4g}, D {quality.d:.4f}, n {quality.n}")
    if args.json:
        print(json.dumps(report.record()))
    return 0
