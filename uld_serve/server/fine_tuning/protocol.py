"""What POST /v1/fine_tuning/jobs takes: OpenAI's shape, with methods and hyperparameters of `uld-serve train`.
Parsed by admission; orders are made of it. A test holds its names against the trainer's, which this layer does
not import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from uld_serve.errors import InvalidRequest
from uld_serve.server.policy import NONE
from uld_serve.server.protocol import ModelRequest
from uld_serve.server.validation import Neutral, Strict

MAX_KEYWORDS, MAX_KEYWORD_CHARS = 1024, 200
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_CHARS = 16, 64, 512
FILE_ID = r"^file-[0-9a-f]{24}$"
PROFILE_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"

MethodName = Literal["margin", "uld", "rkld", "rkld-distill", "undial", "divergence", "offset", "ga", "npo"]
PresetName = Literal["uld-paper", "uld-official", "rkld-paper", "undial-official", "undial-open-unlearning"]
PRESET_METHODS: dict[str, MethodName] = {
    "uld-paper": "uld",
    "uld-official": "uld",
    "rkld-paper": "rkld-distill",
    "undial-official": "undial",
    "undial-open-unlearning": "undial",
}
# Hyperparameters that belong to some methods, and methods in which one would change nothing.
ONLY: dict[str, tuple[MethodName, ...]] = {
    "goal": ("margin",),
    "start": ("uld",),
    "adjust": ("undial",),
    "npo_beta": ("offset", "npo"),
    "retain_term": ("rkld-distill", "undial", "offset", "ga", "npo"),
}
NO_RULE = ("strength", "filter", "tau")
WITHOUT: dict[str, tuple[str, ...]] = {
    "rkld-distill": NO_RULE,
    "undial": NO_RULE,
    "ga": NO_RULE,
    "npo": NO_RULE,
    "divergence": ("retain_weight",),
}
# OpenAI's names of the trainer's settings.
SETTING_OF = {"n_epochs": "epochs", "batch_size": "forget_batch"}
NOT_SETTINGS = frozenset({"keywords", "preset", "learning_rate_multiplier"})

Count = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Keyword = Annotated[str, Field(min_length=1, max_length=MAX_KEYWORD_CHARS, pattern=r"^[^\r\n]*\S[^\r\n]*$")]


class Hyperparameters(Strict):
    n_epochs: Literal["auto"] | Positive | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] | None = None
    learning_rate_multiplier: Literal["auto"] | None = None
    preset: PresetName | None = None
    keywords: Annotated[list[Keyword], Field(min_length=1, max_length=MAX_KEYWORDS)] | None = None
    steps: Count | None = None
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    rank: Annotated[int, Field(ge=1, le=512)] | None = None
    fork: Annotated[int, Field(ge=0, le=1000)] | None = None
    exit: Annotated[int, Field(ge=1, le=1000)] | None = None
    retain_batch: Annotated[int, Field(ge=1, le=1024)] | None = None
    retain_weight: Annotated[float, Field(ge=0, le=1e6)] | None = None
    retain_term: Literal["kl", "nll", "none"] | None = None
    max_answer_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    warmup_steps: Annotated[int, Field(ge=0, le=100_000)] | None = None
    save_steps: Count | None = None
    strength: Positive | None = None
    filter: Literal["plausibility", "official", "fused", "none"] | None = None
    tau: Annotated[float, Field(gt=0, le=1)] | None = None
    goal: Positive | None = None
    adjust: Positive | None = None
    npo_beta: Positive | None = None
    start: Literal["none", "solved"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.n_epochs not in (None, "auto"):
            raise InvalidRequest("give n_epochs or steps, not both", param="method")
        return self

    @property
    def given(self) -> dict[str, object]:
        """Those that were given a value; "auto" leaves the choice to the method, as absence does."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value not in (None, "auto")}


class MethodOptions(Strict):
    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    model_config = ConfigDict(validate_by_alias=True, validate_by_name=False)

    type: Annotated[MethodName, Field(description="One of docs/methods.md.")]
    margin: MethodOptions | None = None
    uld: MethodOptions | None = None
    rkld: MethodOptions | None = None
    rkld_distill: Annotated[MethodOptions | None, Field(alias="rkld-distill")] = None
    undial: MethodOptions | None = None
    divergence: MethodOptions | None = None
    offset: MethodOptions | None = None
    ga: MethodOptions | None = None
    npo: MethodOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, field in type(self).model_fields.items():
            other = field.alias or name
            if name != "type" and other != self.type and getattr(self, name) is not None:
                raise InvalidRequest(
                    f"method.{other} is given, but method.type is '{self.type}'", param="method"
                )
        for where, reason in self._misplaced():
            raise InvalidRequest(f"{where} {reason}", param=where)
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        options: MethodOptions | None = getattr(self, self.type.replace("-", "_"))
        given = None if options is None else options.hyperparameters
        return given or Hyperparameters()

    def _misplaced(self) -> Iterator[tuple[str, str]]:
        given = self.hyperparameters.given
        for name in given:
            where = f"method.{self.type}.hyperparameters.{name}"
            if self.type not in ONLY.get(name, (self.type,)):
                yield where, f"is for {', '.join(ONLY[name])}"
            if name in WITHOUT.get(self.type, ()):
                yield where, f"changes nothing in {self.type}; leave it out"
        preset = str(given.get("preset", ""))
        if PRESET_METHODS.get(preset, self.type) != self.type:
            yield f"method.{self.type}.hyperparameters.preset", f"{preset} is for {PRESET_METHODS[preset]}"


class JobRequest(ModelRequest):
    model: Annotated[str, Field(max_length=2048, description="The base's plain name.")]
    training_file: Annotated[
        str, Field(pattern=FILE_ID, description="What must be forgotten: an uploaded file.")
    ]
    validation_file: Annotated[
        str,
        Field(
            pattern=FILE_ID,
            description="What must stay: an uploaded file. Every sixth line of it is only measured with.",
        ),
    ]
    suffix: Annotated[str, Field(pattern=PROFILE_NAME, description="The profile's name, in lower case.")]
    method: Method | None = None
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**31, description="Of the training. Absent: a new one, given back with the job."),
    ] = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.suffix == NONE:
            raise InvalidRequest("suffix: 'none' stands for the base", param="suffix")
        if self.training_file == self.validation_file:
            raise InvalidRequest("one file cannot both be forgotten and stay", param="validation_file")
        metadata = self.metadata or {}
        if len(metadata) > MAX_METADATA or any(
            len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_CHARS for key, value in metadata.items()
        ):
            raise InvalidRequest(
                f"metadata must be at most {MAX_METADATA} texts of {MAX_METADATA_CHARS} characters under names of "
                f"{MAX_METADATA_KEY}",
                param="metadata",
            )
        return self

    @property
    def how(self) -> Method:
        return self.method or Method(type="margin")


JOB_REFUSED: dict[str, tuple[str, Neutral]] = {
    "hyperparameters": ("put them into method, under the method's name", ()),
    "integrations": ("nothing is reported to other services", ([],)),
}
