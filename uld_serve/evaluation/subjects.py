"""Who is evaluated: profiles by name, and what tells one base from another. Called by the commands that evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.llm import LLM
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import profile_directories
from uld_serve.profiles.store import read_profile

BASE, REFERENCE = "base", "reference"


def chosen_profiles(folder: Path, names: Sequence[str]) -> list[tuple[Path, ProfileVersion]]:
    """In the order of `names`. Raises DataError: one twice, one that is not there, one with the name of a row."""
    if len(set(names)) < len(names):
        raise DataError("--profile names one twice")
    if {BASE, REFERENCE} & set(names):
        raise DataError(
            f"a profile called {BASE} or {REFERENCE} cannot be evaluated: the report has rows of that name"
        )
    found = [(path, read_profile(path)) for path in profile_directories(folder)]
    there = {version.name: (path, version) for path, version in found}
    for name in names:
        if name not in there:
            raise DataError(f"{folder} has no profile '{name}', only {', '.join(sorted(there)) or 'none'}")
    return [there[name] for name in names]


def identity(llm: LLM) -> str:
    """All of a base that decides what is measured: weights, their dtype here, and how texts become tokens and end."""
    base = llm.base
    template = base.tokenizer.chat_template
    stored = f"{base.fingerprint} {base.tokenizer_hash} {base.eos_ids} {base.dtype} {template!r}"
    return stored if base.weights == "stored" else f"{stored} {base.weights}"
