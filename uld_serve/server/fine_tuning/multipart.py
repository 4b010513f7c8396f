"""Takes a multipart/form-data body apart, or refuses it: one reading only, so that no proxy can see another form.
Called by upload. Knows no field."""

from __future__ import annotations

import re
from dataclasses import dataclass

from uld_serve.errors import InvalidRequest
from uld_serve.server.body import UnsupportedMediaType

MAX_PARTS = 16
MAX_HEAD_BYTES = 4096
_BOUNDARY = re.compile(
    r'multipart/form-data\s*;\s*boundary=(?:"([^"\\]{1,70})"|([^\s";,]{1,70}))\s*', re.IGNORECASE
)
_DISPOSITION = re.compile(r'form-data((?:\s*;\s*[a-z]+="[^"\\]*")*)\s*', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([a-z]+)="([^"\\]*)"', re.IGNORECASE)
_PLAIN = ("7bit", "8bit", "binary")


@dataclass(frozen=True, slots=True)
class Part:
    """`filename` is None for a plain field."""

    name: str
    filename: str | None
    content: bytes


def boundary_of(content_type: str) -> bytes:
    """Raises UnsupportedMediaType (415)."""
    found = _BOUNDARY.fullmatch(content_type.strip())
    boundary = (found[1] or found[2]) if found else ""
    if not boundary or not boundary.isascii() or boundary.endswith(" "):
        raise UnsupportedMediaType("send the file with Content-Type: multipart/form-data and a boundary")
    return boundary.encode()


def parse_form(body: bytes, boundary: bytes) -> list[Part]:
    """Raises InvalidRequest for a body that is not such a form to its last byte, and for a field given twice."""
    delimiter = b"\r\n--" + boundary
    # Counted first: a body that is nothing but boundaries would become millions of pieces.
    if body.count(delimiter) > MAX_PARTS + 1:
        raise InvalidRequest(f"the form has more than {MAX_PARTS} fields")
    first, *pieces = (b"\r\n" + body).split(delimiter)
    if first or not pieces or pieces.pop() not in (b"--", b"--\r\n"):
        raise InvalidRequest("the body is not a form: it does not begin and end with its boundary")
    if len(pieces) > MAX_PARTS:
        raise InvalidRequest(f"the form has more than {MAX_PARTS} fields")
    parts = [_part(piece) for piece in pieces]
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise InvalidRequest("the form gives a field twice")
    return parts


def _part(piece: bytes) -> Part:
    head, end, content = piece.partition(b"\r\n\r\n")
    if not piece.startswith(b"\r\n") or not end or len(head) > MAX_HEAD_BYTES:
        raise InvalidRequest("a field of the form has no headers of its own")
    headers = _headers(head[2:])
    if headers.get("content-transfer-encoding", "binary").lower() not in _PLAIN:
        raise InvalidRequest("a field of the form is encoded; send its bytes as they are")
    disposition = _DISPOSITION.fullmatch(headers.get("content-disposition", ""))
    found = _PARAMETER.findall(disposition[1]) if disposition else []
    parameters = {name.lower(): value for name, value in found}
    if "name" not in parameters or len(parameters) < len(found) or parameters.keys() - {"name", "filename"}:
        raise InvalidRequest(
            'a field of the form has no plain Content-Disposition: form-data; name="..."; filename="..."'
        )
    return Part(parameters["name"], parameters.get("filename"), content)


def _headers(head: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        lines = head.decode("utf-8").split("\r\n")
    except UnicodeDecodeError:
        raise InvalidRequest("a header of the form is not UTF-8") from None
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.lower() in found or not name.strip() or name != name.strip():
            raise InvalidRequest("a header of the form cannot be read")
        found[name.lower()] = value.strip()
    return found
