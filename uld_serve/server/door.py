"""The door to files and fine-tuning jobs: who asks, whether they may, and what the address and the body say. The routes
of files and fine_tuning_jobs depend on it; it reaches no engine."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import QueryParams
from starlette.requests import Request

from uld_serve.errors import Forbidden, InvalidRequest, PayloadTooLarge
from uld_serve.server.body import read_bytes
from uld_serve.server.catalog import Catalog, catalog_of, policy_of
from uld_serve.server.fine_tuning.multipart import Part, boundary_of, parse_form
from uld_serve.server.fine_tuning.workshop import Workshop
from uld_serve.server.json_gate import shown_name
from uld_serve.server.policy import KeyPolicy

# Of a form: its boundaries, its headers and the other field.
FORM_BYTES = 16 * 1024
PURPOSE = "fine-tune"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who may make profiles, where, and what the query says."""

    policy: KeyPolicy
    workshop: Workshop
    catalog: Catalog
    query: QueryParams


@dataclass(frozen=True, slots=True)
class Upload:
    visitor: Visitor
    filename: str
    content: bytes


class Enter:
    """Dependency: authenticates, and refuses whoever may not make profiles, any query but `query`, and a body where
    none belongs."""

    def __init__(self, *, query: tuple[str, ...] = (), takes_body: bool = False) -> None:
        self.query = query
        self.takes_body = takes_body

    async def __call__(self, request: Request) -> Visitor:
        visitor = _visitor(request)
        names = [name for name, _ in visitor.query.multi_items()]
        for name in names:
            if name not in self.query:
                raise InvalidRequest(
                    f"unknown query parameter {shown_name(name)}",
                    param=shown_name(name),
                    code="unknown_parameter",
                )
            if names.count(name) > 1:
                raise InvalidRequest(f"{name} is given twice", param=name)
        length = request.headers.get("content-length", "0")
        if not self.takes_body and (length != "0" or "transfer-encoding" in request.headers):
            raise InvalidRequest("this route takes no body")
        return visitor


class Receive:
    """Dependency: an uploaded form's file, whole. Nothing of it is read before the key is known to be allowed."""

    async def __call__(self, request: Request) -> Upload:
        visitor = await Enter(takes_body=True)(request)
        _require_no_foreign_page(request)
        boundary = boundary_of(request.headers.get("content-type", ""))
        settings = visitor.workshop.settings
        limit = settings.max_file_bytes
        body = await read_bytes(request, max_bytes=limit + FORM_BYTES, timeout_s=settings.upload_timeout_s)
        parts = {part.name: part for part in parse_form(body, boundary)}
        _require_fields(parts)
        file = parts["file"]
        if len(file.content) > limit:
            raise PayloadTooLarge(f"the file is larger than {limit} bytes", param="file")
        return Upload(visitor, file.filename or "", file.content)


def _visitor(request: Request) -> Visitor:
    policy = policy_of(request)
    workshop: Workshop | None = request.app.state.workshop
    if workshop is None:
        raise Forbidden(
            "this server makes no profiles on request: its settings have no [fine_tuning]",
            code="fine_tuning_off",
        )
    if not policy.may_fine_tune:
        raise Forbidden("this key may not make profiles: it needs fine_tune = true")
    return Visitor(policy, workshop, catalog_of(request), request.query_params)


def _require_no_foreign_page(request: Request) -> None:
    """A form, unlike JSON, can be sent by any web page without asking; a browser says which page it was."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Forbidden("a web page of another origin may not upload files")


def _require_fields(parts: dict[str, Part]) -> None:
    for name in parts:
        field = shown_name(name)
        if name.split("[")[0] == "expires_after":
            raise InvalidRequest(
                "expires_after is not supported: files stay until they are deleted",
                param="expires_after",
                code="unsupported_parameter",
            )
        if name not in ("file", "purpose"):
            raise InvalidRequest(f"unknown field {field}", param=field, code="unknown_parameter")
    for name in ("file", "purpose"):
        if name not in parts:
            raise InvalidRequest(f"{name} is required", param=name)
    if parts["file"].filename is None:
        raise InvalidRequest("file must be a file, with a filename", param="file")
    if parts["purpose"].filename is not None or parts["purpose"].content != PURPOSE.encode():
        raise InvalidRequest(f"purpose must be '{PURPOSE}'", param="purpose", code="unsupported_parameter")
