"""server.toml: what an operator may set, checked before anything is loaded. Read by command. Knows no engine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uld_serve.config import EngineSettings, HeadUse
from uld_serve.errors import InvalidRequest, ProfileError
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.policy import KeyPolicy, Profiles

ModelT = TypeVar("ModelT", bound=BaseModel)
_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
ProfileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Port = Annotated[int, Field(ge=0, le=65535)]


class Limits(BaseModel):
    """Bounds of the HTTP edge, in bytes and seconds. `request_timeout_s`: from admission to the last token."""

    model_config = _FROZEN

    body_bytes: Annotated[int, Field(ge=1024, le=2**28)] = 2**20
    header_bytes: Annotated[int, Field(ge=1024, le=2**20)] = 32 * 1024
    read_timeout_s: Annotated[float, Field(gt=0)] = 15.0
    write_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    request_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 60.0


class CacheSettings(BaseModel):
    """`share_between_keys`: whether a prompt that one key has sent makes the same prompt faster for another, who could
    then find out by the clock what the first one asks."""

    model_config = _FROZEN

    share_between_keys: bool = False


class AuditSettings(BaseModel):
    """The audit log's file is begun anew above `max_bytes`; `max_files` older ones are kept beside it. `fsync`: each
    line is on the disk, not only with the system, before the request goes on."""

    model_config = _FROZEN

    max_bytes: Annotated[int, Field(ge=4096)] = 64 * 2**20
    max_files: Annotated[int, Field(ge=1, le=10_000)] = 10
    fsync: bool = False


class AdminSettings(BaseModel):
    """The listener for operators; there is none without a port."""

    model_config = _FROZEN

    host: str = "127.0.0.1"
    port: Port | None = None
    unload_wait_s: Annotated[float, Field(ge=0)] = 60.0


class LogSettings(BaseModel):
    """`error_text`: the words of unexpected exceptions too, which may quote what a client sent."""

    model_config = _FROZEN

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "warning"
    error_text: bool = False


class KeySettings(BaseModel):
    """One [[keys]] entry. What is left out is refused, except that any profile may be asked for: forgetting more
    is always allowed. `admin` keys work on the admin listener; `metrics` keys read /metrics there and nothing else;
    `fine_tune` keys make profiles on request."""

    model_config = _FROZEN

    name: Annotated[str, Field(min_length=1, max_length=64)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    mandatory: list[ProfileName] = []
    allowed: list[ProfileName] | Literal["*"] = "*"
    default: list[ProfileName] = []
    allow_base: bool = False
    logprobs: Literal["off", "fused"] | None = None
    max_concurrency: Annotated[int | None, Field(ge=1)] = None
    admin: bool = False
    metrics: bool = False
    fine_tune: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mandatory and self.allow_base:
            raise ValueError("a key with mandatory profiles cannot have allow_base")
        if self.mandatory and self.fine_tune:
            # It could train one that brings back what the others take, and ask for both.
            raise ValueError("a key with mandatory profiles cannot have fine_tune")
        can_ask = self.mandatory or self.allow_base or self.allowed or self.default
        if not (can_ask or self.admin or self.metrics or self.fine_tune):
            raise ValueError("this key could never be answered: give it a profile or allow_base")
        return self

    @property
    def policy(self) -> KeyPolicy:
        """Log-probabilities unset: on only for a key that may see the base anyway."""
        return KeyPolicy(
            name=self.name,
            mandatory=frozenset(self.mandatory),
            allowed="*" if self.allowed == "*" else frozenset(self.allowed),
            default=frozenset(self.default),
            allow_base=self.allow_base,
            logprobs=self.allow_base if self.logprobs is None else self.logprobs == "fused",
            max_concurrency=self.max_concurrency,
            is_admin=self.admin,
            may_read_metrics=self.admin or self.metrics,
            may_fine_tune=self.admin or self.fine_tune,
        )


class ServerSettings(BaseModel):
    """All of server.toml. `model` None is the embedded default, `profiles` None the built-in ones; an engine
    setting that is None is chosen for the base and the device (config.EngineSettings)."""

    model_config = _FROZEN

    model: str | None = None
    profiles: list[Path] | None = None
    host: str = "127.0.0.1"
    port: Port = 8000
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"
    tensor_parallel: Annotated[int | None, Field(ge=1, le=64)] = None
    max_model_len: Annotated[int | None, Field(ge=1)] = None
    max_num_seqs: Annotated[int | None, Field(ge=1)] = None
    kv_cache_bytes: Annotated[int | None, Field(ge=1)] = None
    own_kv_bytes: Annotated[int | None, Field(ge=1)] = None
    adapter_bytes: Annotated[int | None, Field(ge=1)] = None
    sampler_bytes: Annotated[int | None, Field(ge=1)] = None
    head: HeadUse = "auto"
    measure_every: Annotated[int, Field(ge=0)] = 32
    audit_log: Path | None = None
    audit: AuditSettings = AuditSettings()
    admin: AdminSettings = AdminSettings()
    fine_tuning: FineTuningSettings | None = None
    log: LogSettings = LogSettings()
    tracing: bool = False
    playground: bool = True
    limits: Limits = Limits()
    cache: CacheSettings = CacheSettings()
    keys_file: Path | None = None
    keys: list[KeySettings] = []

    @property
    def engine(self) -> EngineSettings:
        sizes = (
            "max_model_len",
            "max_num_seqs",
            "kv_cache_bytes",
            "own_kv_bytes",
            "adapter_bytes",
            "sampler_bytes",
        )
        names = (*sizes, "head", "measure_every")
        return EngineSettings(**{name: value for name in names if (value := getattr(self, name)) is not None})

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_distinct(self.keys)
        return self


class KeyFile(BaseModel):
    """Keys in a file of their own, for where server.toml cannot be written."""

    model_config = _FROZEN

    keys: list[KeySettings] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_distinct(self.keys)
        return self


def require_distinct(keys: list[KeySettings]) -> None:
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if len(set(values)) != len(values):
            raise ValueError(f"two keys have the same {field}")


def read_settings(path: Path) -> ServerSettings:
    """The file, and the keys of the `keys_file` that it names. Raises InvalidRequest naming the file and the fields
    that are wrong."""
    settings = checked_settings(read_toml(path), source=str(path))
    if settings.keys_file is None:
        return settings
    beside = path.parent / settings.keys_file
    keys = checked(KeyFile, read_toml(beside), source=str(beside)).keys
    together = settings.model_dump(exclude_unset=True) | {"keys": [*settings.keys, *keys]}
    return checked_settings(together, source=f"{path} with {beside.name}")


def read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from None


def checked_settings(data: Mapping[str, object], *, source: str) -> ServerSettings:
    return checked(ServerSettings, data, source=source)


def checked(model: type[ModelT], data: Mapping[str, object], *, source: str) -> ModelT:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)[:3]
        )
        raise InvalidRequest(f"{source}: {wrong}") from None


def check_profiles_exist(keys: list[KeySettings], registry: Profiles) -> None:
    """Refuse to start with a key whose profile is missing."""
    known = set(registry.names())
    for key in keys:
        named = {*key.mandatory, *key.default, *(key.allowed if key.allowed != "*" else ())}
        missing = sorted(named - known)
        if missing:
            raise ProfileError(f"key '{key.name}' names profiles that are not loaded: {', '.join(missing)}")
