"""Which profiles this process knows: name -> verified version. Filled at start, changed by the server's operators; read
by server and LLM. Versions are immutable: whoever got one keeps it, whatever its name means afterwards.

Knows nothing of requests or models; whether a version fits a running base is check_base's question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from uld_serve.errors import ProfileError, ProfileMismatch, UnknownProfile
from uld_serve.profiles.profile import BaseFacts, ProfileVersion
from uld_serve.profiles.store import read_profile

BUILTIN = Path(__file__).parent / "builtin"


class Registry:
    """Versions by name. A name means one digest until `replace` or `remove`."""

    def __init__(self, versions: Iterable[ProfileVersion] = ()) -> None:
        self._versions: dict[str, ProfileVersion] = {}
        for version in versions:
            self.add(version)

    @classmethod
    def load_all(cls, roots: Path | Iterable[Path]) -> Registry:
        """Every profile in `roots`: each a profile's directory, or a directory of such.

        One unusable profile refuses the whole load, so that a missing one is noticed at start and not at
        its first request. Raises ProfileError naming the directory or file.
        """
        paths = [roots] if isinstance(roots, Path) else list(roots)
        return cls(read_profile(directory) for root in paths for directory in profile_directories(root))

    def add(self, version: ProfileVersion) -> None:
        """Raises ProfileError if the name is taken by another digest."""
        known = self._versions.setdefault(version.name, version)
        if known.digest != version.digest:
            raise ProfileError(
                f"profile '{version.name}' is there twice, as {known.ref} and as {version.ref}; remove one"
            )

    def replace(self, version: ProfileVersion) -> ProfileVersion | None:
        """From now on the name means this version; what it meant before."""
        before = self._versions.get(version.name)
        self._versions[version.name] = version
        return before

    def remove(self, name: str) -> ProfileVersion:
        """Raises UnknownProfile (404)."""
        version = self.get(name)
        del self._versions[name]
        return version

    def get(self, name: str) -> ProfileVersion:
        """Raises UnknownProfile (404)."""
        try:
            return self._versions[name]
        except KeyError:
            raise UnknownProfile(
                f"there is no such profile here; known: {', '.join(self.names()) or 'none'}"
            ) from None

    def names(self) -> list[str]:
        return sorted(self._versions)

    def __iter__(self) -> Iterator[ProfileVersion]:
        return (self._versions[name] for name in self.names())

    def __len__(self) -> int:
        return len(self._versions)


def profile_directories(root: Path) -> list[Path]:
    """`root` itself if it holds profile.json, else its sub-directories, sorted; dot-directories are
    skipped."""
    root = root.resolve()
    if not root.is_dir():
        raise ProfileError(f"there is no profiles directory {root}; create it or pass another")
    if (root / "profile.json").exists():
        return [root]
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def find_profile(root: Path, name: str) -> tuple[Path, ProfileVersion]:
    """Where it lies under `root`, and what it is. Raises UnknownProfile, or ProfileError for any that is unusable."""
    found = [(directory, read_profile(directory)) for directory in profile_directories(root)]
    for directory, version in found:
        if version.name == name:
            return directory, version
    known = ", ".join(version.name for _, version in found) or "none"
    raise UnknownProfile(f"there is no profile '{name}' in {root}; there is: {known}")


def check_base(version: ProfileVersion, facts: BaseFacts) -> None:
    """Raise ProfileMismatch unless the profile was made for exactly this base, tokenizer and output width."""
    wanted, remedy = version.profile.base, "train the profile on this base or serve the base it was made for"
    pairs = {
        "base fingerprint": (wanted.fingerprint, facts.fingerprint),
        "tokenizer hash": (wanted.tokenizer, facts.tokenizer_hash),
        "vocabulary size": (wanted.vocab_size, facts.vocab_size),
        "number of layers": (wanted.num_layers, facts.num_layers),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ProfileMismatch(
                f"profile '{version.name}' was made for base {wanted.id} with {what} {theirs}, "
                f"but this base is {facts.id} with {what} {ours}; {remedy}"
            )
    elsewhere = {stream.name for stream in version.profile.streams if stream.model is not None}
    for stream, adapter in version.adapters.items():
        if stream in elsewhere:
            continue
        for module, shape in adapter.module_shapes().items():
            expected = (facts.module_shapes or {module: shape}).get(module)
            if shape != expected:
                raise ProfileMismatch(
                    f"profile '{version.name}', stream '{stream}': {module} adapts a weight of "
                    f"shape {shape}, but base {facts.id} has {expected}; {remedy}"
                )
