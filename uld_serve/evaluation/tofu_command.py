"""`uld-serve eval tofu`: a base, profiles on it and a reference model, asked all of TOFU's questions. A part of the
command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from uld_serve.errors import DataError
from uld_serve.evaluation.asker import Subject
from uld_serve.evaluation.eval_log import EvalLog, read_log
from uld_serve.evaluation.pictures import draw
from uld_serve.evaluation.questions import Question, read_questions, section_files
from uld_serve.evaluation.report import markdown
from uld_serve.evaluation.subjects import BASE, REFERENCE, chosen_profiles, identity
from uld_serve.evaluation.tofu import Samples
from uld_serve.evaluation.tofu_report import forget_samples
from uld_serve.evaluation.tofu_run import Part, measure, summary
from uld_serve.evaluation.unfiltered import unfiltered_copy
from uld_serve.llm import LLM
from uld_serve.profiles.registry import BUILTIN

SUMMARY = "ask a base, its profiles and a reference model all of TOFU's questions"


def add_parser(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = benchmarks.add_parser(
        "tofu",
        help=SUMMARY,
        description=SUMMARY
        + ". Likelihoods and answers come from the engine that serves. Interrupted, the same command "
        "goes on.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR_OR_ID",
        help="a folder with <split>_perturbed.jsonl, retain_perturbed.jsonl, real_authors_perturbed.jsonl and "
        "world_facts_perturbed.jsonl, or a Hugging Face dataset with these configurations",
    )
    parser.add_argument("--split", default="forget01", help="whose forget set (default: forget01)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each section")
    parser.add_argument("--model", metavar="ID_OR_PATH", help="the base; default: the embedded one")
    parser.add_argument("--profiles", type=Path, default=BUILTIN, metavar="DIR", help="default: built in")
    parser.add_argument("--profile", action="append", default=[], help="may be repeated")
    parser.add_argument(
        "--reference",
        metavar="ID_OR_PATH",
        help="a model that never saw the forget set, or the log of one, for forget quality",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--truth-ratio", choices=("geometric", "arithmetic"), default="geometric")
    parser.add_argument("--json", action="store_true", help="the last line of output is one JSON object")


def run(args: argparse.Namespace) -> int:
    """Raises DataError: data, models or profiles that cannot be read."""
    if args.max_tokens < 1 or (args.limit is not None and args.limit < 1):
        raise DataError("--max-tokens and --limit must be at least 1")
    versions = chosen_profiles(args.profiles, args.profile)
    sections = {
        name: read_questions(args.data, file, limit=args.limit)
        for name, file in section_files(args.split).items()
    }
    console = Console(stderr=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as progress, ExitStack() as stack:
        runner = _Runner(args, sections, progress)
        reference = runner.reference()
        # Profiles' adapters are read on demand; copies without a fused filter live as long as they are asked.
        copies = {
            version.name: stack.enter_context(unfiltered_copy(path, version, name=f"unfiltered-{number}"))
            for number, (path, version) in enumerate(versions)
        }
        roots = [path for path, _ in versions] + [copy for copy in copies.values() if copy is not None]
        llm = LLM(args.model, profiles=roots, dtype=args.dtype, device=args.device)
        found = {BASE: runner.subject(llm, Subject(BASE))}
        for number, (_, version) in enumerate(versions):
            name = version.name
            unfiltered = name if copies[name] is None else f"unfiltered-{number}"
            subject = Subject(name, name, unfiltered)
            found[name] = runner.subject(llm, subject, version.digest)
    figures = {
        name: summary(parts, reference, name=name, variant=args.truth_ratio) for name, parts in found.items()
    }
    record = {
        "split": args.split,
        "reference": args.reference,
        "digests": {version.name: version.digest for _, version in versions},
        "subjects": figures,
    }
    (args.out / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    pictures = draw(
        args.out, figures, _forgotten(found, reference), split=args.split, variant=args.truth_ratio
    )
    text = markdown(
        figures,
        split=args.split,
        variant=args.truth_ratio,
        has_reference=reference is not None,
        pictures=pictures,
    )
    (args.out / "report.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False)
    console.print(f"written: {args.out / 'report.md'}", highlight=False)
    if args.json:
        print(json.dumps(record))
    return 0


def _forgotten(found: Mapping[str, Mapping[str, Part]], reference: EvalLog | None) -> dict[str, Samples]:
    forgotten = {name: parts["forget"].measured.samples for name, parts in found.items()}
    return forgotten if reference is None else {**forgotten, REFERENCE: reference.section("forget")}


@dataclass(frozen=True)
class _Runner:
    args: argparse.Namespace
    sections: Mapping[str, Sequence[Question]]
    progress: Progress

    def subject(self, llm: LLM, subject: Subject, digest: str = "") -> dict[str, Part]:
        total = sum(map(len, self.sections.values()))
        task = self.progress.add_task(subject.name, total=total)
        return measure(
            llm,
            subject,
            f"{identity(llm)} {digest}",
            self.sections,
            folder=self.args.out / subject.name,
            max_tokens=self.args.max_tokens,
            advance=lambda count: self.progress.advance(task, count),
        )

    def reference(self) -> EvalLog | None:
        """Of a log, or of a model that is asked the forget questions alone. Raises DataError for a log of others,
        before anybody is asked."""
        named = self.args.reference
        if named is None:
            return None
        path = Path(named)
        if path.suffix == ".json" or (path / "eval_log_forget.json").is_file():
            log = read_log(path)
            forget_samples(log, len(self.sections["forget"]))
            return log
        llm = LLM(named, profiles=[], dtype=self.args.dtype, device=self.args.device)
        forget = {"forget": self.sections["forget"]}
        parts = _Runner(self.args, forget, self.progress).subject(llm, Subject(REFERENCE))
        return EvalLog(named, {name: part.measured.samples for name, part in parts.items()})
