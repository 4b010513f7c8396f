"""Many forget requests in one file: each becomes a run of its own with the same options as on the command line, all of
them on one loaded base. Called by command. Knows no model.

    [defaults]
    method = "margin"
    retain = "retain.jsonl"

    [[request]]
    name = "ann-smith"
    forget = "ann.jsonl"
    keywords = "ann.txt"

Keys are the command's long options, with - or _. Paths are relative to the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uld_serve.data.datasets import is_dataset
from uld_serve.errors import DataError

PATHS = frozenset(
    {"forget", "retain", "keywords", "probe-forget", "probe-retain", "augment-file", "readme", "plot"}
)
SETS = frozenset({"forget", "retain", "probe-forget", "probe-retain"})
# Of one profile and of no other: left out where several requests become one.
OWN = ("--readme", "--plot")
# What belongs to the whole of it, and is given on the command line.
OF_ALL = frozenset(
    {"base", "dtype", "device", "out", "resume", "json", "manifest", "dry-run", "events", "tracker", "name"}
)


@dataclass(frozen=True, slots=True)
class Request:
    """One profile's name, and its options as the command line takes them."""

    name: str
    arguments: tuple[str, ...]


def read_manifest(path: Path) -> list[Request]:
    """Raises DataError: no such file, no TOML, no request, two of one name, or a key that cannot stand there."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--manifest: {path} cannot be read as text") from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"--manifest: {path} is not TOML: {error}") from error
    unknown = set(data) - {"defaults", "request"}
    requests, defaults = data.get("request", []), data.get("defaults", {})
    if unknown or not isinstance(requests, list) or not isinstance(defaults, dict):
        what = f"[{min(unknown)}]" if unknown else "its tables"
        raise DataError(f"--manifest: {path}: {what} should be [defaults] and [[request]]")
    if not requests:
        raise DataError(f"--manifest: {path} has no [[request]]")
    if not all(isinstance(one, dict) for one in requests):
        raise DataError(f"--manifest: {path}: a request is a table, [[request]]")
    found = [_request(path, number, {**defaults, **one}) for number, one in enumerate(requests, start=1)]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"--manifest: {path} has {names.count(name)} requests named '{name}'")
    return found


def _request(path: Path, number: int, row: Mapping[str, object]) -> Request:
    where = f"--manifest: {path}, request {number}"
    name = row.get("name")
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise DataError(f"{where} needs a name, which its folder gets too")
    arguments: list[str] = []
    for key, value in row.items():
        option = key.replace("_", "-")
        if option == "name":
            continue
        if option in OF_ALL:
            raise DataError(f"{where} ('{name}'): '{key}' is for all requests; give it on the command line")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                raise DataError(f"{where} ('{name}'): '{key}' must be text or a number, or a list of them")
            arguments += [f"--{option}", _resolved(path, option, str(one)) if option in PATHS else str(one)]
    return Request(name, tuple(arguments))


def _resolved(manifest: Path, option: str, text: str) -> str:
    """Relative to the manifest. What is not there may be a dataset's id and stays; a folder's configuration and split
    stand behind its name."""
    is_there = (manifest.parent / text.split(":")[0]).exists()
    return text if option in SETS and not is_there and is_dataset(text) else str(manifest.parent / text)


def joined(requests: Sequence[Request], names: Sequence[str]) -> tuple[str, ...]:
    """The options of one run on the data of several requests, which must agree in everything else.

    Raises DataError: a name that is not there, or options that differ.
    """
    by_name = {one.name: one for one in requests}
    for name in names:
        if name not in by_name:
            raise DataError(f"no request is named '{name}'; there are {', '.join(by_name)}")
    chosen = [by_name[name] for name in names] if names else list(requests)
    split = [_split(one.arguments) for one in chosen]
    for (_, others), one in zip(split[1:], chosen[1:], strict=True):
        if sorted(others) != sorted(split[0][1]):
            raise DataError(
                f"the requests '{chosen[0].name}' and '{one.name}' have other options; one assistant has one training"
            )
    data = dict.fromkeys(pair for pairs, _ in split for pair in pairs)
    return tuple(text for pair in (*data, *split[0][1]) for text in pair)


def _split(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(options that name data, the others), without a README and a picture"""
    pairs = [pair for pair in zip(arguments[::2], arguments[1::2], strict=True) if pair[0] not in OWN]
    is_data = {f"--{name}" for name in PATHS}
    return [pair for pair in pairs if pair[0] in is_data], [pair for pair in pairs if pair[0] not in is_data]
