"""Who is asked in an evaluation: a base, profiles on it, and maybe a reference model. Called by the commands of the
benchmarks, with the options that they share. Knows no benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.evaluation.asker import Subject
from uld_serve.evaluation.groups import parse_groups
from uld_serve.evaluation.identity import identity
from uld_serve.evaluation.unfiltered import UNFILTERED, unfiltered_copy
from uld_serve.llm import LLM
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import BUILTIN, profile_directories
from uld_serve.profiles.store import read_profile

BASE, REFERENCE = "base", "reference"


def add_options(
    parser: argparse.ArgumentParser, *, reference: str | None = None, max_tokens: int | None = None
) -> None:
    """`reference` is the help for that option, `max_tokens` the default of that one; None where a benchmark has no
    such option."""
    parser.add_argument("--limit", type=int, metavar="N", help="the first N of each section")
    parser.add_argument("--model", metavar="ID_OR_PATH", help="the base; default: the embedded one")
    parser.add_argument("--profiles", type=Path, default=BUILTIN, metavar="DIR", help="default: built in")
    parser.add_argument("--profile", action="append", default=[], help="may be repeated")
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=PROFILE,PROFILE",
        help="profiles that one method gave with several seeds: asked one by one, and reported as mean and spread too; "
        "may be repeated",
    )
    if reference is not None:
        parser.add_argument("--reference", metavar="ID_OR_PATH", help=reference)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    if max_tokens is not None:
        parser.add_argument(
            "--max-tokens",
            type=int,
            default=max_tokens,
            metavar="N",
            help=f"longest answer ({max_tokens})",
        )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="the last line of output is one JSON object")


@dataclass(frozen=True, slots=True)
class Chosen:
    """Profiles to be asked, with where they lie, and which of them make a group."""

    versions: Sequence[tuple[Path, ProfileVersion]]
    groups: Mapping[str, tuple[str, ...]]


def read_chosen(args: argparse.Namespace) -> Chosen:
    """Raises DataError for numbers, names and groups that cannot be, before anything is loaded."""
    least = [args.limit, getattr(args, "max_tokens", None)]
    if any(number is not None and number < 1 for number in least):
        raise DataError("--max-tokens and --limit must be at least 1")
    groups = parse_groups(args.group)
    if {BASE, REFERENCE} & set(groups):
        raise DataError(f"a group cannot be called {BASE} or {REFERENCE}: the report has rows of that name")
    chosen = chosen_profiles(args.profiles, args.profile)
    names = list(dict.fromkeys([*args.profile, *(name for members in groups.values() for name in members)]))
    if both := set(groups) & set(names):
        raise DataError(f"{', '.join(sorted(both))} is a group and a profile; call the group something else")
    return Chosen([*chosen, *chosen_profiles(args.profiles, names[len(chosen) :])], groups)


def chosen_profiles(folder: Path, names: Sequence[str]) -> list[tuple[Path, ProfileVersion]]:
    """In the order of `names`. Raises DataError: one twice, one that is not there, one with the name of a row."""
    if len(set(names)) < len(names):
        raise DataError("--profile names one twice")
    if {BASE, REFERENCE} & set(names):
        raise DataError(
            f"a profile called {BASE} or {REFERENCE} cannot be evaluated: the report has rows of that name"
        )
    there = {
        version.name: (path, version)
        for path, version in ((path, read_profile(path)) for path in profile_directories(folder))
    }
    for name in names:
        if name not in there:
            raise DataError(f"{folder} has no profile '{name}', only {', '.join(sorted(there)) or 'none'}")
    return [there[name] for name in names]


@dataclass(frozen=True, slots=True)
class Entrant:
    """Somebody to be asked. `version` is for keys of what is kept: equal where the answers must be."""

    llm: LLM
    subject: Subject
    version: Mapping[str, object]


@contextmanager
def entrants(args: argparse.Namespace, chosen: Chosen) -> Iterator[list[Entrant]]:
    """The base, then every profile. They are there inside the context only: a profile's adapters are read on demand,
    and copies without a fused filter live as long as they may be asked."""
    with ExitStack() as stack:
        copies = _copies(stack, chosen.versions)
        roots = [path for path, _ in chosen.versions] + [copy for copy in copies.values() if copy is not None]
        llm = LLM(args.model, profiles=roots, dtype=args.dtype, device=args.device)
        base = identity(llm)
        found = [Entrant(llm, Subject(BASE), {"base": base})]
        for _, version in chosen.versions:
            copy = copies[version.name]
            subject = Subject(version.name, version.name, version.name if copy is None else copy.name)
            # Not the copy's name, which hangs on the profiles beside it and decides nothing.
            facts = {
                "base": base,
                "profile": version.name,
                "digest": version.digest,
                "unfiltered": copy is not None,
            }
            found.append(Entrant(llm, subject, facts))
        yield found


def reference_entrant(args: argparse.Namespace) -> Entrant:
    """A model of its own. It is freed with the last that holds the entrant."""
    llm = LLM(args.reference, profiles=[], dtype=args.dtype, device=args.device)
    return Entrant(llm, Subject(REFERENCE), {"base": identity(llm)})


def _copies(stack: ExitStack, versions: Sequence[tuple[Path, ProfileVersion]]) -> dict[str, Path | None]:
    """By profile, under names that no profile beside them has."""
    taken = {version.name for _, version in versions}
    free = (name for number in count() if (name := f"{UNFILTERED}-{number}") not in taken)
    return {
        version.name: stack.enter_context(unfiltered_copy(path, version, name=next(free)))
        for path, version in versions
    }
