"""[fine_tuning] of server.toml: there is no forgetting on request without it. Read by settings; knows no job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]


class GateSettings(BaseModel):
    """What a new profile must reach before it goes live; left out, the limits of `uld-serve profiles verify`."""

    model_config = _FROZEN

    min_forget_rise: float | None = None
    max_retain_rise: float | None = None
    min_agreement: Share | None = None
    min_recall_fall: Share | None = None
    max_perplexity_ratio: Annotated[float | None, Field(gt=0)] = None


class FineTuningSettings(BaseModel):
    """`folder` holds uploads, jobs and the profiles that they make. `num_questions` of either side are asked of a new
    profile. `device`: where training runs, the server's unless told; `threads`: how many it may use on a CPU."""

    model_config = _FROZEN

    folder: Path
    max_file_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 16 * 2**20
    max_file_lines: Annotated[int, Field(ge=1, le=10**7)] = 100_000
    max_stored_bytes: Annotated[int, Field(ge=1024)] = 2**30
    upload_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    max_queued: Annotated[int, Field(ge=1, le=10_000)] = 16
    max_starts: Annotated[int, Field(ge=1, le=100)] = 3
    num_questions: Annotated[int, Field(ge=2, le=4096)] = 64
    device: str | None = None
    threads: Annotated[int | None, Field(ge=1)] = None
    gate: GateSettings = GateSettings()
