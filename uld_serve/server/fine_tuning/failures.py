"""Why a job ends without a profile, in words for the client. Raised and caught by foreman."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uld_serve.errors import UldError
from uld_serve.server.fine_tuning.trainee import Ended


class JobFailed(UldError):
    """Why a job ends without a profile. `keeps_log`: nobody had words for it."""

    def __init__(self, message: str, *, code: str, keeps_log: bool = False) -> None:
        super().__init__(message, code=code)
        self.keeps_log = keeps_log


class JobGone(Exception):
    """It was cancelled meanwhile."""


def broken_off(what: str, ended: Ended, *, code: str) -> JobFailed:
    if ended.reason is not None:
        return JobFailed(ended.reason, code=code)
    return JobFailed(
        f"{what} ended with status {ended.status}; the log in the job's folder says why",
        code=code,
        keeps_log=True,
    )


def told_gates(gates: Sequence[Mapping[str, object]]) -> str:
    found = []
    for gate in gates:
        value = gate["value"]
        shown = f"{value:.3f}" if isinstance(value, float) else "not measurable"
        limit = f"at least {gate['at_least']}" if "at_least" in gate else f"at most {gate['at_most']}"
        found.append(f"{gate['name']} {shown}, {limit}")
    return "; ".join(found) or "its report says no more"
