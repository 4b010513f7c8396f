"""What one vLLM server is told to forget, as it travels in vLLM's own configuration to every process of it, and the
arguments that start such a server. Knows no tensor and nothing of vLLM but the names of its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uld_serve.errors import InvalidRequest, ModelUnsupported, ProfileMismatch
from uld_serve.model.loading import model_dir
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import BUILTIN, Registry
from uld_serve.vllm_plugin.register import ARCHITECTURES, GUARD

KEY = "uld_serve"


class Orders(BaseModel):
    """The value of `uld_serve` in vLLM's additional config.

    `profiles` are names, or name@digest (the first twelve digits), which a changed profile no longer fits. They lie in
    `directories`, each a profile's own or one of several. `strength` multiplies every rule's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    profiles: Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]
    directories: Annotated[tuple[str, ...], Field(min_length=1)] = (str(BUILTIN),)
    compose: Literal["max", "sum"] = "max"
    strength: Annotated[float, Field(gt=0, le=2)] = 1.0

    @classmethod
    def of(cls, additional_config: object) -> Orders:
        """Raises InvalidRequest for a server that is told nothing, or something else."""
        told = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if told is None:
            raise InvalidRequest(
                f"this architecture serves profiles and was given none: start it with `uld-serve vllm`, or put "
                f"'{KEY}' into --additional-config"
            )
        return cls.told(told)

    @classmethod
    def told(cls, fields: object) -> Orders:
        """Raises InvalidRequest for fields that are wrong, or that there are none of."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in (KEY, *problem["loc"]))
            raise InvalidRequest(f"{where}: {problem['msg']}") from error

    def versions(self) -> tuple[ProfileVersion, ...]:
        """The profiles, verified from their files. Raises UnknownProfile, ProfileCorrupt, ProfileMismatch."""
        registry = Registry.load_all([Path(directory) for directory in self.directories])
        return tuple(_pinned(registry, ref) for ref in self.profiles)

    def pinned(self) -> Orders:
        """The same with every profile's digest, and with absolute directories."""
        refs = tuple(version.ref for version in self.versions())
        directories = tuple(str(Path(directory).resolve()) for directory in self.directories)
        return self.model_copy(update={"profiles": refs, "directories": directories})


def _pinned(registry: Registry, ref: str) -> ProfileVersion:
    name, _, digest = ref.partition("@")
    version = registry.get(name)
    if digest and digest != version.digest12:
        raise ProfileMismatch(
            f"profile '{name}' is {version.ref} on disk, and this server was told to serve {ref}; restore that "
            "version, or start with the new one"
        )
    return version


@dataclass(frozen=True, slots=True)
class ServerArguments:
    """How vLLM is started so that it forgets."""

    model: Path
    architecture: str
    orders: Orders

    @classmethod
    def of(cls, model: str | None, orders: Orders) -> ServerArguments:
        """`model` as everywhere: None is the embedded one. Raises ModelUnsupported, ProfileError, UnknownProfile."""
        folder = model_dir(model)
        named = json.loads((folder / "config.json").read_text()).get("architectures") or ["none"]
        if named[0] not in ARCHITECTURES:
            raise ModelUnsupported(
                f"vLLM serves profiles on {', '.join(ARCHITECTURES)}; this checkpoint is a {named[0]}. `uld-serve "
                "serve` may run it"
            )
        return cls(folder.resolve(), ARCHITECTURES[named[0]], orders.pinned())

    @property
    def keywords(self) -> dict[str, object]:
        """For `vllm.LLM(**…)`."""
        return {
            "model": str(self.model),
            "hf_overrides": {"architectures": [self.architecture]},
            "additional_config": {KEY: self.orders.model_dump(mode="json")},
            "logits_processors": [GUARD],
            "enforce_eager": True,
        }

    @property
    def command(self) -> list[str]:
        """The same for `vllm serve`."""
        words = self.keywords
        return [
            "serve",
            str(self.model),
            "--hf-overrides",
            json.dumps(words["hf_overrides"]),
            "--additional-config",
            json.dumps(words["additional_config"]),
            "--logits-processors",
            GUARD,
            "--enforce-eager",
        ]
