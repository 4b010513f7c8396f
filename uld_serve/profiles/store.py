"""Reads and writes a profile's directory: the only thing that passes between training and serving.

Called by registry, training and command. Every way in which the files can be wrong ends in ProfileCorrupt
with the profile, the file and what to do. Knows nothing of models or requests.

    profile.json  probes.json  training.json  SHA256SUMS  [README.md]
    <adapter>/adapter_config.json  <adapter>/adapter_model.safetensors        plain PEFT, one folder an
    adapter
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from uld_serve.errors import ProfileCorrupt, ProfileError
from uld_serve.profiles.adapter import KEY_VALUE_MODULES, AdapterConfig, parse_tensors
from uld_serve.profiles.folder import read_files
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import TARGET, Profile, ProfileVersion, StreamSpec
from uld_serve.profiles.shelf import AdapterShelf, Shelved
from uld_serve.profiles.strict_json import parse_model, parse_object

SUMS = "SHA256SUMS"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Bytes. A file over its limit is refused before it is read.
_LIMITS = {
    SUMS: 16 * 2**10,
    "profile.json": 64 * 2**10,
    "probes.json": 8 * 2**20,
    "training.json": 2**20,
    "README.md": 2**20,
    CONFIG: 64 * 2**10,
    WEIGHTS: 2 * 2**30,
}
_OPTIONAL = frozenset({"README.md"})
_REMEDY = "restore the directory from a good copy or train the profile again"

Parsed = TypeVar("Parsed")


def read_profile(directory: Path) -> ProfileVersion:
    """Verify the directory and return its immutable version.

    The bytes are read once: what is hashed is what is parsed, whatever happens to the files meanwhile. Adapters are
    parsed and let go; the version reads them again, and checks them again, when one is asked for.
    Raises ProfileCorrupt naming the file; never another exception, whatever the directory holds.
    """
    files = _read_verified(directory)
    profile = _parse(directory, files, "profile.json", lambda data: parse_model(Profile, data))
    expected = {"profile.json", "probes.json", "training.json"} | {
        f"{name}/{file}" for name in profile.adapter_names for file in (CONFIG, WEIGHTS)
    }
    for path in sorted(expected ^ (set(files) - _OPTIONAL)):
        raise _corrupt(directory, path, "is missing" if path in expected else "does not belong here")
    _parse(directory, files, "training.json", parse_object)
    probes = _parse(directory, files, "probes.json", lambda data: _parse_probes(data, profile))
    shelved = {
        owner: _shelve(directory, files, adapter, stream)
        for owner, adapter, stream in _adapter_owners(profile)
    }
    digest = _digest(_sums(files))
    adapters = AdapterShelf(profile.name, shelved)
    return ProfileVersion(
        profile=profile, digest=digest, adapters=adapters, probes=probes, directory=directory.resolve()
    )


def read_training_record(directory: Path) -> dict[str, object]:
    """training.json of a directory whose checksums hold."""
    files = _read_verified(directory)
    if "training.json" not in files:
        raise _corrupt(directory, "training.json", "is missing")
    return _parse(directory, files, "training.json", parse_object)


def write_profile(
    directory: Path,
    profile: Profile,
    *,
    adapters: Mapping[str, Path],
    probes: Probes,
    training: Mapping[str, object],
    readme: str | None = None,
) -> ProfileVersion:
    """Write a new profile directory whole or not at all, and return it as read back.

    `adapters` maps each adapter folder that the profile names to a folder that PEFT's save_pretrained
    wrote; its config is rewritten in canonical order, without the local path of the base, so that equal
    inputs give an equal digest. The files are written beside `directory`, read back as serving would, and
    then renamed. Raises ProfileError if `directory` exists (versions are immutable), ProfileCorrupt if what
    was given is not a valid profile.
    """
    if directory.exists() or directory.is_symlink():
        raise ProfileError(
            f"{directory} exists and a profile is never overwritten; remove it or choose another"
        )
    if set(adapters) != set(profile.adapter_names):
        raise ProfileError(
            f"profile '{profile.name}' names the adapters {profile.adapter_names}, got {sorted(adapters)}"
        )
    files = {
        "profile.json": _json_bytes(profile.model_dump(mode="json")),
        "probes.json": _json_bytes(probes.model_dump(mode="json", exclude_none=True)),
        "training.json": _json_bytes(training),
    }
    for name, folder in adapters.items():
        files[f"{name}/{CONFIG}"] = _canonical_config((folder / CONFIG).read_bytes(), profile.base.id)
        files[f"{name}/{WEIGHTS}"] = (folder / WEIGHTS).read_bytes()
    if readme is not None:
        files["README.md"] = readme.encode("utf-8")
    return _publish(directory, files)


def _publish(directory: Path, files: Mapping[str, bytes]) -> ProfileVersion:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for path, data in {**files, SUMS: _sums(files)}.items():
            _write_file(temporary / path, data)
        for folder in {(temporary / path).parent for path in files} | {temporary}:
            folder.chmod(0o755)
            _sync_folder(folder)
        read_profile(temporary)
        temporary.rename(directory)
        _sync_folder(directory.parent)
    except OSError as error:
        raise ProfileError(f"cannot write {directory}: {error.strerror}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_profile(directory)


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    # Owner only: the adapter remembers what it was trained to forget.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(value: object) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _canonical_config(data: bytes, base_id: str) -> bytes:
    config = parse_object(data)
    config["base_model_name_or_path"] = base_id
    for key in ("target_modules", "layers_to_transform"):
        value = config.get(key)
        if isinstance(value, list):
            config[key] = sorted(value)
    return _json_bytes(config)


def _sums(files: Mapping[str, bytes]) -> bytes:
    """SHA256SUMS as `sha256sum` writes it, sorted by path."""
    lines = [f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n" for path in sorted(files)]
    return "".join(lines).encode("utf-8")


def _digest(sums: bytes) -> str:
    return "sha256:" + hashlib.sha256(sums).hexdigest()


def _corrupt(directory: Path, path: str, reason: str) -> ProfileCorrupt:
    return ProfileCorrupt(f"profile '{directory.name}': {path} {reason}; {_REMEDY}")


def _parse(
    directory: Path, files: Mapping[str, bytes], path: str, parser: Callable[[bytes], Parsed]
) -> Parsed:
    """`files[path]` through a parser that raises ValueError."""
    if path not in files:
        raise _corrupt(directory, path, "is missing")
    try:
        return parser(files[path])
    except ValueError as error:
        raise _corrupt(directory, path, f"is not valid: {error}") from error


def _parse_probes(data: bytes, profile: Profile) -> Probes:
    probes = parse_model(Probes, data)
    largest = probes.max_token_id()
    if largest >= profile.base.vocab_size:
        raise ValueError(f"token id {largest} is outside the vocabulary of {profile.base.vocab_size}")
    return probes


def _adapter_owners(profile: Profile) -> list[tuple[str, str, StreamSpec]]:
    """(owner, adapter folder, the stream it runs in); the target's own adapter runs in all layers."""
    owners = [(stream.name, stream.adapter, stream) for stream in profile.streams if stream.adapter]
    if profile.target_adapter is not None:
        whole = StreamSpec.model_construct(name=TARGET, fork=0, exit=profile.base.num_layers, kv="own")
        owners.append((TARGET, profile.target_adapter, whole))
    return owners


def _shelve(directory: Path, files: Mapping[str, bytes], adapter: str, stream: StreamSpec) -> Shelved:
    """Parse an adapter once, to know that it can be, and note where it lies."""
    config = _parse(directory, files, f"{adapter}/{CONFIG}", lambda data: _parse_config(data, stream))
    layers = config.layers(fork=stream.fork, exit=stream.exit)
    weights = f"{adapter}/{WEIGHTS}"
    _parse(directory, files, weights, lambda data: parse_tensors(data, config, layers=layers))
    data = files[weights]
    return Shelved(directory / weights, len(data), hashlib.sha256(data).hexdigest(), config, layers)


def _parse_config(data: bytes, stream: StreamSpec) -> AdapterConfig:
    config = parse_model(AdapterConfig, data)
    config.layers(fork=stream.fork, exit=stream.exit)
    unusable = KEY_VALUE_MODULES & set(config.modules())
    if stream.kv == "borrowed" and unusable:
        raise ValueError(
            f"stream '{stream.name}' borrows the target's keys and values, so it cannot adapt "
            + " and ".join(sorted(unusable))
        )
    return config


def _read_verified(directory: Path) -> dict[str, bytes]:
    """path -> bytes of every file but SHA256SUMS, which lists exactly these."""
    try:
        files = read_files(directory, limits=_LIMITS)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ProfileCorrupt(f"profile '{directory.name}': {reason}; {_REMEDY}") from error
    if SUMS not in files:
        raise _corrupt(directory, SUMS, "is missing")
    listed = _parse(directory, files, SUMS, _parse_sums)
    sums = files.pop(SUMS)
    for path in sorted(set(listed) ^ set(files)):
        raise _corrupt(directory, path, "is missing" if path in listed else f"is not listed in {SUMS}")
    for path, data in files.items():
        if hashlib.sha256(data).hexdigest() != listed[path]:
            raise _corrupt(
                directory, path, f"does not have the sha256 that {SUMS} gives: altered or truncated"
            )
    if sums != _sums(files):
        raise _corrupt(directory, SUMS, "is not in canonical form (sorted, one `hash  path` a line)")
    return files


def _parse_sums(data: bytes) -> dict[str, str]:
    listed: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        sha, separator, path = line.partition("  ")
        if not separator or len(sha) != 64 or path in listed:
            raise ValueError(f"line {number} is not `hash  path`, or its path came before")
        listed[path] = sha
    return listed
