"""One JSON line for every request that was generated for: who, what was forgotten, how much. No prompt and no
answer is in it. Called by admission; where the lines go is command's choice."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from uld_serve.errors import InvalidRequest

logger = logging.getLogger("uld_serve.audit")


def record(
    *,
    request_id: str,
    key: str,
    user: str | None,
    model: str,
    receipt: str,
    prompt_tokens: int,
    completion_tokens: int,
    outcome: str,
    seconds: float,
) -> None:
    """`receipt` is what the sampler applied; `outcome` is "ok", "gone" (the client left) or an error's code."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": request_id,
        "key": key,
        "user": user,
        "model": model,
        "forget": receipt,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "outcome": outcome,
        "seconds": round(seconds, 3),
    }
    logger.info(json.dumps(line))


def write_to(path: Path) -> None:
    """Append the lines to `path`. Raises InvalidRequest if it cannot be opened."""
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot write the audit log {path}: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
