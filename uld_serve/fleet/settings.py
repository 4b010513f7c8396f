"""What an operator may set about a fleet, beside server.toml. Read by command and by Ray's `args`; knows no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DOOR_SPARE = 64


class FleetSettings(BaseModel):
    """`active_file`: where the ledger, on Ray's head node, keeps which profiles are active. `config`: server.toml.

    `max_ongoing_requests` run on one replica, `max_queued_requests` wait in a door for any; more are refused. With
    `routing` "load" the less busy of two replicas is taken, as Ray does it; with "prefix" one is preferred for a
    prompt's first `prefix_chars` characters until it has `slack` requests more than the
    least loaded one. Replicas are added above `target_ongoing_requests` each. `num_cpus` and `num_gpus` are what Ray
    reserves for a replica."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    active_file: Path
    config: Path | None = None
    min_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 32
    max_queued_requests: Annotated[int, Field(ge=0)] = 64
    retry_after_s: Annotated[int, Field(ge=1, le=3600)] = 2
    num_doors: Annotated[int, Field(ge=1, le=100)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    routing: Literal["prefix", "load"] = "prefix"
    prefix_chars: Annotated[int, Field(ge=0, le=2**20)] = 256
    slack: Annotated[int, Field(ge=0)] = 8
    lease_s: Annotated[float, Field(ge=1, le=300)] = 10.0
    poll_s: Annotated[float, Field(gt=0)] = 1.0
    prepare_s: Annotated[float, Field(gt=0)] = 300.0
    start_s: Annotated[float, Field(gt=0)] = 600.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        if self.poll_s > self.lease_s / 3:
            raise ValueError(
                "poll_s must be at most a third of lease_s: one poll that is lost must not end a lease"
            )
        return self

    @property
    def door_ongoing_requests(self) -> int:
        """More than a door can have running and waiting: its own limit is never the one that refuses."""
        return self.max_replicas * self.max_ongoing_requests + self.max_queued_requests + DOOR_SPARE
