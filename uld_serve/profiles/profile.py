"""What a profile is: streams and a rule, bound to one base. Read from profile.json by store; used by server,
engine and training. Knows nothing of files, of HTTP or of how a stream is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.profiles.probes import Probes

RuleKind = Literal["identity", "subtract", "relu_difference", "pair_linear", "pair_rank"]
FilterMode = Literal["plausibility", "official", "fused", "none"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Sha256 = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]

# A filter on the target's logits that keeps fewer alternatives fails open: a target that is sure of the
# secret would keep only the secret, and no strength could remove it.
MIN_KEEP_FLOOR = 32
DEFAULT_MIN_KEEP = 256
TARGET = "target"

ROLES: Mapping[RuleKind, tuple[str, ...]] = {
    "identity": (),
    "subtract": ("a",),
    "relu_difference": ("a",),
    "pair_linear": ("q", "p"),
    "pair_rank": ("q", "p"),
}

_FROZEN = ConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    serialize_by_alias=True,
    validate_by_name=True,
    validate_by_alias=True,
)


class BaseSpec(BaseModel):
    """The base that the profile was trained on. `vocab_size` counts real tokens, not padded head rows."""

    model_config = _FROZEN

    id: Annotated[str, Field(min_length=1, max_length=256)]
    fingerprint: Sha256
    tokenizer: Sha256
    vocab_size: Annotated[int, Field(ge=2, lt=2**31)]
    num_layers: Annotated[int, Field(ge=1, le=1024)]


class ModelSpec(BaseModel):
    """A separate assistant model: other weights, the base's vocabulary token by token.

    `id` is a directory, absolute or relative to the profile's own (then it begins with ./ or ../), or a Hugging Face
    id. It may not lie inside the profile's directory. Streams that record one fingerprint share one model in memory.
    """

    model_config = _FROZEN

    id: Annotated[str, Field(min_length=1, max_length=1024)]
    fingerprint: Sha256
    tokenizer: Sha256


class StreamSpec(BaseModel):
    """One assistant.

    It enters as a copy of the target's row at layer `fork` (0 = the embedding), runs layers fork..exit-1 with
    `adapter`, and leaves to the shared final norm and head. kv "borrowed" attends over the target's keys
    and values and keeps none; "own" keeps its own.

    With `model` it runs in that model instead of the base: all its layers (fork 0, exit = their number), with keys
    and values of its own; `adapter` is then optional.
    """

    model_config = _FROZEN

    name: Name
    fork: Annotated[int, Field(ge=0)]
    exit: Annotated[int, Field(ge=1)]
    kv: Literal["borrowed", "own"]
    adapter: Name | None = None
    model: ModelSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fork >= self.exit:
            raise ValueError(f"stream '{self.name}' forks at layer {self.fork} but exits at {self.exit}")
        if self.name == TARGET:
            raise ValueError("a stream cannot be called 'target': that is the base's own")
        if self.model is not None and (self.fork != 0 or self.kv != "own"):
            raise ValueError(
                f"stream '{self.name}' runs in a model of its own, so it needs fork 0 and kv 'own'"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_absent_model(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Streams of the base are written as they were before there were others."""
        fields: dict[str, object] = serialize(self)
        return {name: value for name, value in fields.items() if name != "model" or value is not None}


class FilterSpec(BaseModel):
    """Which tokens stay possible.

    plausibility and official look at the target before combining, fused at the combined scores. `tau` is
    relative to the largest probability; `min_keep` is read by plausibility only.
    """

    model_config = _FROZEN

    mode: FilterMode
    tau: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_keep: Annotated[int, Field(ge=1)] = DEFAULT_MIN_KEEP

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.mode == "none") != (self.tau == 0):
            raise ValueError(f"filter '{self.mode}' {'takes no' if self.mode == 'none' else 'needs a'} tau")
        if self.mode == "plausibility" and self.min_keep < MIN_KEEP_FLOOR:
            raise ValueError(f"min_keep must be at least {MIN_KEEP_FLOOR}: fewer would fail open")
        if self.mode != "plausibility" and self.min_keep != DEFAULT_MIN_KEEP:
            raise ValueError(f"filter '{self.mode}' takes no min_keep")
        return self


DEFAULT_FILTERS: Mapping[RuleKind, FilterSpec] = {
    "identity": FilterSpec(mode="none"),
    "subtract": FilterSpec(mode="plausibility", tau=0.01),
    "relu_difference": FilterSpec(mode="fused", tau=0.02),
    "pair_linear": FilterSpec(mode="fused", tau=0.02),
    "pair_rank": FilterSpec(mode="fused", tau=0.02),
}


class RuleSpec(BaseModel):
    """How streams and target become one row of scores.

    Filter and `protect` default by kind; `roles` says which stream is which input of the formula and may be
    left out when there is only one stream. `dead_zone` is for relu_difference: differences of logits up to it count as
    none.
    """

    model_config = _FROZEN

    kind: RuleKind
    strength: Annotated[float, Field(gt=0, le=100)] = 1.0
    filter: FilterSpec
    protect: bool
    rank_k: Annotated[int, Field(ge=0, le=4096)] = 0
    dead_zone: Annotated[float, Field(ge=0, le=1000)] = 0.0
    roles: dict[str, Name] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_kind(cls, data: object) -> object:
        if not isinstance(data, dict) or data.get("kind") not in ROLES:
            return data
        kind: RuleKind = data["kind"]
        protect = kind in ("subtract", "pair_linear")  # subtraction starves EOS and the text rambles
        return {"filter": DEFAULT_FILTERS[kind].model_dump(), "protect": protect, **data}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in ("identity", "pair_rank") and self.strength != 1:
            raise ValueError(f"rule '{self.kind}' has no strength to set")
        if (self.kind == "pair_rank") != (self.rank_k > 0):
            raise ValueError("rank_k is for rule 'pair_rank', which needs it")
        if self.dead_zone > 0 and self.kind != "relu_difference":
            raise ValueError("dead_zone is for rule 'relu_difference'")
        if self.kind == "identity" and (self.protect or self.filter.mode != "none"):
            raise ValueError("rule 'identity' takes no filter and no protect")
        if self.roles and set(self.roles) != set(ROLES[self.kind]):
            raise ValueError(f"rule '{self.kind}' has the roles {ROLES[self.kind]}")
        return self


class Profile(BaseModel):
    """profile.json."""

    model_config = _FROZEN

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: Name
    method: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    base: BaseSpec
    streams: Annotated[tuple[StreamSpec, ...], Field(max_length=4)] = ()
    target_adapter: Name | None = None
    rule: RuleSpec

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "none":
            raise ValueError("a profile cannot be called 'none': requests use that word for the base alone")
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError("two streams have the same name")
        for stream in self.streams:
            if stream.model is None and stream.exit > self.base.num_layers:
                raise ValueError(
                    f"stream '{stream.name}' exits at layer {stream.exit} of {self.base.num_layers}"
                )
        if not self.streams and self.target_adapter is None:
            raise ValueError("a profile needs a stream or a target_adapter: this one would change nothing")
        self._check_filter()
        self._check_roles(set(names))
        return self

    def _check_filter(self) -> None:
        min_keep = self.rule.filter.min_keep
        if self.rule.filter.mode == "official":
            min_keep = int(self.rule.filter.tau * self.base.vocab_size)
        if self.rule.filter.mode in ("official", "plausibility") and min_keep < MIN_KEEP_FLOOR:
            raise ValueError(
                f"the filter keeps {min_keep} tokens; at least {MIN_KEEP_FLOOR} or it fails open"
            )

    def _check_roles(self, names: set[str]) -> None:
        expected = ROLES[self.rule.kind]
        if len(names) != len(expected):
            raise ValueError(f"rule '{self.rule.kind}' needs {len(expected)} streams, not {len(names)}")
        if not self.rule.roles and len(expected) > 1:
            raise ValueError(
                f"rule '{self.rule.kind}' needs roles: which stream is {' and which '.join(expected)}"
            )
        if self.rule.roles and set(self.rule.roles.values()) != names:
            raise ValueError("roles must name each stream once")

    @property
    def roles(self) -> dict[str, str]:
        """Formula input -> stream name, e.g. {"a": "assistant"} or {"q": "retain", "p": "forget"}."""
        if self.rule.roles:
            return dict(self.rule.roles)
        return {role: stream.name for role, stream in zip(ROLES[self.rule.kind], self.streams, strict=True)}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapter folders that the profile's directory must hold, sorted."""
        named = [stream.adapter for stream in self.streams] + [self.target_adapter]
        return tuple(sorted({name for name in named if name is not None}))


@dataclass(frozen=True, slots=True, eq=False)
class ProfileVersion:
    """A profile as verified from its files; immutable, and the same for ever under its digest.

    `adapters` is by stream name, with "target" for the target's own adapter. Looking one up may read it from disk.
    `directory` is where its files lie; None for a version that was made in memory.
    """

    profile: Profile
    digest: str
    adapters: Mapping[str, LoraAdapter]
    probes: Probes
    directory: Path | None = None

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def digest12(self) -> str:
        return self.digest.removeprefix("sha256:")[:12]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.digest12}"

    @property
    def models(self) -> dict[str, ModelSpec]:
        """The separate models that its streams run in, by fingerprint."""
        named = [stream.model for stream in self.profile.streams if stream.model is not None]
        return {model.fingerprint: model for model in named}

    def locate(self, model: ModelSpec) -> str:
        """What to load a separate model from: a path relative to the profile's directory is made absolute."""
        if self.directory is not None and model.id.startswith(("./", "../")):
            return str((self.directory / model.id).resolve())
        return model.id


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a running base says of itself. `module_shapes`: "self_attn.q_proj" -> its weight's (out, in)."""

    id: str
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    num_layers: int
    module_shapes: Mapping[str, tuple[int, int]] | None = None
