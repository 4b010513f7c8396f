"""Branch coverage and mutation of the safety core, whose parts, with modules and tests, safety_core.toml lists.

    python tests/safety_core.py coverage [--part decisions]
    python tests/safety_core.py mutants [--part decisions] [--sample 400 | --all]

Both end with one JSON line, and with status 1 below their gates: every branch, and nine mutants of ten."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "safety-core"
PARTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
GATE_KILLED, SAMPLE, SEED = 0.9, 400, 20_261_122
CAUGHT = ("killed", "timeout", "segfault")
# Words for people: what an error says is not what it is.
WORDS = r'^\s*f?"[^"]* [^"]*",?$|(Error|Forbidden|InvalidRequest|UnknownProfile|ProfileMismatch)\(f?"'


@dataclass(frozen=True, slots=True)
class Part:
    modules: list[str]
    tests: list[str]

    @classmethod
    def named(cls, name: str | None) -> Part:
        chosen = [PARTS[name]] if name else list(PARTS.values())
        return cls(*([one for part in chosen for one in part[kind]] for kind in ("modules", "tests")))


def coverage(part: Part) -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    settings, report = OUT / "coverage.ini", OUT / "coverage.json"
    settings.write_text(
        "\n".join(
            [
                "[run]",
                "branch = true",
                f"data_file = {OUT / 'coverage.data'}",
                "include =",
                *(f"    {module}" for module in part.modules),
                "[report]",
                "show_missing = true",
                "exclude_also =",
                r"    ^\s+def .*: \.\.\.$",
            ]
        )
    )
    rc = [f"--rcfile={settings}"]
    run = _python("coverage", "run", *rc, "-m", "pytest", *part.tests, cwd=ROOT)
    if run != 0:
        return run
    _python("coverage", "report", *rc, cwd=ROOT)
    _python("coverage", "json", *rc, "-q", "-o", str(report), cwd=ROOT)
    totals = json.loads(report.read_text())["totals"]
    names = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    print(json.dumps({name: totals[name] for name in names}))
    return int(totals["missing_lines"] + totals["missing_branches"] > 0)


def mutants(part: Part, *, sample: int | None, seed: int) -> int:
    """`sample` None: every mutant, which takes hours."""
    started = time.monotonic()
    _stage(part)
    # Makes the mutants, learns from one run of the tests which of them reach which function, and ends: there is none.
    _python("mutmut", "run", "--max-children", "1", "none", cwd=OUT / "stage", quiet=True)
    if not (OUT / "stage" / "mutants" / "mutmut-stats.json").exists():
        print(f"the tests do not pass in {OUT / 'stage'}; see {OUT}/mutmut-run.log", file=sys.stderr)
        return 1
    names = sorted(_statuses())
    drawn = names if sample is None else random.Random(seed).sample(names, min(sample, len(names)))
    _python("mutmut", "run", "--max-children", "1", *drawn, cwd=OUT / "stage", quiet=True)
    found = {name: status for name, status in _statuses().items() if name in set(drawn)}
    for name, status in sorted(found.items()):
        if status not in CAUGHT:
            print(f"{status}: {name}")
    statuses = Counter(found.values())
    killed = sum(statuses[status] for status in CAUGHT)
    line = {
        "drawn": len(drawn),
        "of": len(names),
        "seed": seed,
        **statuses,
        "share": round(killed / len(drawn), 3),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(line))
    return int(killed < GATE_KILLED * len(drawn))


def _stage(part: Part) -> None:
    """mutmut finds packages in src/ only, and the tests' fixtures beside them."""
    stage = OUT / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("uld_serve", "kernels/uld_kernels"):
        shutil.copytree(ROOT / package, stage / "src" / Path(package).name, ignore=ignore)
    shutil.copytree(ROOT / "tests", stage / "tests", ignore=ignore)
    settings = {
        "source_paths": ["src/"],
        "only_mutate": [f"src/{module.removeprefix('kernels/')}" for module in part.modules],
        "do_not_mutate_patterns": [WORDS],
        "pytest_add_cli_args_test_selection": part.tests,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "no:schemathesis"],
        # Fork does not agree with threads, and the first tests leave some.
        "process_isolation": "forkserver",
    }
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (stage / "pyproject.toml").write_text("\n".join([text, "[tool.mutmut]", *lines, ""]))


def _statuses() -> dict[str, str]:
    command = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    shown = subprocess.run(command, cwd=OUT / "stage", capture_output=True, text=True, check=True).stdout
    pairs = (line.strip().rsplit(": ", 1) for line in shown.splitlines() if "__mutmut_" in line)
    return dict(pairs)


def _python(module: str, *arguments: str, cwd: Path, quiet: bool = False) -> int:
    log = None
    if quiet:
        log = (OUT / f"{module}-{arguments[0]}.log").open("w")
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, stdout=log, stderr=log, check=False
    ).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    every, some = commands.add_parser("coverage"), commands.add_parser("mutants")
    for command in (every, some):
        command.add_argument("--part", choices=PARTS)
    some.add_argument("--sample", type=int, default=SAMPLE)
    some.add_argument("--all", action="store_true")
    some.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    if given.command == "coverage":
        sys.exit(coverage(Part.named(given.part)))
    sys.exit(mutants(Part.named(given.part), sample=None if given.all else given.sample, seed=given.seed))
