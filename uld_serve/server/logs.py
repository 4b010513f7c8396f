"""What the process logs and how: lines for people or JSON objects, without anything that a client sent. Set up by
command, once. Knows no request: who logs gives `extra={"fields": …}`."""

from __future__ import annotations

import json
import logging
import time
import traceback
from types import TracebackType

from uld_serve.server.settings import LogSettings

_MS = 1000


class TextFormatter(logging.Formatter):
    """One line a record; of an unexpected exception its type and where it came from, and its words only if asked."""

    def __init__(self, *, error_text: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.error_text = error_text

    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record)
        fields = "".join(f" {name}={_shown(value)}" for name, value in _fields(record).items())
        line = f"{stamp} {record.levelname.lower()} {record.name}: {record.getMessage()}{fields}"
        return "\n  ".join([line, *_told(record, error_text=self.error_text)])


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def __init__(self, *, error_text: bool) -> None:
        super().__init__()
        self.error_text = error_text

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.created * _MS) % _MS:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if told := _told(record, error_text=self.error_text):
            line["error"] = told
        return json.dumps(line, default=str)


def configure(settings: LogSettings) -> None:
    """Everything to stderr in one format, at one level."""
    handler = logging.StreamHandler()
    formatter = JsonFormatter if settings.format == "json" else TextFormatter
    handler.setFormatter(formatter(error_text=settings.error_text))
    logging.basicConfig(handlers=[handler], level=settings.level.upper(), force=True)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, "fields", {})
    return fields if isinstance(fields, dict) else {}


def _shown(value: object) -> str:
    """In quotes where it would look like more than one value, or more than one line."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def _told(record: logging.LogRecord, *, error_text: bool) -> list[str]:
    """The exception's type, then its frames, innermost last."""
    if not record.exc_info or record.exc_info[1] is None:
        return []
    error, trace = record.exc_info[1], record.exc_info[2]
    name = type(error).__name__
    return [f"{name}: {error}" if error_text else name, *_frames(trace)]


def _frames(trace: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
