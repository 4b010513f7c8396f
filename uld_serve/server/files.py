"""POST, GET and DELETE /v1/files: what shall be forgotten, and what shall stay, as JSONL. Reaches no engine."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve.errors import InvalidRequest
from uld_serve.server.door import PURPOSE, Enter, Receive, Upload, Visitor
from uld_serve.server.fine_tuning.records import StoredFile
from uld_serve.server.fine_tuning.shapes import FileDeleted, FileList, FileObject
from uld_serve.server.paging import newest_first, page_of
from uld_serve.server.responses import json_response

MAX_LISTED = 10_000
CONTENT_TYPE = "application/jsonl"
LIST = Enter(query=("after", "limit", "order", "purpose"))
ENTER = Enter()
RECEIVE = Receive()

TheVisitor = Annotated[Visitor, Depends(ENTER)]


def add_routes(app: FastAPI) -> None:
    content = {200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}}
    app.add_api_route("/v1/files", create_file, methods=["POST"], response_model=FileObject)
    app.add_api_route("/v1/files", list_files, methods=["GET"], response_model=FileList)
    app.add_api_route("/v1/files/{file_id}", get_file, methods=["GET"], response_model=FileObject)
    app.add_api_route("/v1/files/{file_id}", delete_file, methods=["DELETE"], response_model=FileDeleted)
    app.add_api_route(
        "/v1/files/{file_id}/content",
        get_content,
        methods=["GET"],
        response_class=Response,
        responses=content,  # type: ignore[arg-type]
    )


async def create_file(upload: Annotated[Upload, Depends(RECEIVE)]) -> Response:
    """A file of JSON lines, each checked, as a form (multipart/form-data) with `file` and `purpose`, which must be
    `fine-tune`. It can be read by the key that sent it and by admins' keys, and stays until it is deleted."""
    visitor = upload.visitor
    return json_response(
        _shape(await visitor.workshop.upload(visitor.policy, upload.filename, upload.content))
    )


async def list_files(visitor: Annotated[Visitor, Depends(LIST)]) -> Response:
    """This key's files, newest first; an admin's key lists all. `after`, `limit`, `order` and `purpose` as OpenAI has
    them."""
    if visitor.query.get("purpose", PURPOSE) != PURPOSE:
        raise InvalidRequest(f"purpose must be '{PURPOSE}'", param="purpose")
    files = visitor.workshop.files(visitor.policy)
    if newest_first(visitor.query, default=True):
        files.reverse()
    page = page_of(files, visitor.query, id_of=lambda file: file.id, default=MAX_LISTED, most=MAX_LISTED)
    data = [_shape(file) for file in page.items]
    return json_response(
        FileList(
            object="list",
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=page.has_more,
        )
    )


async def get_file(file_id: str, visitor: TheVisitor) -> Response:
    """One of them."""
    return json_response(_shape(visitor.workshop.file(visitor.policy, file_id)))


async def get_content(file_id: str, visitor: TheVisitor) -> Response:
    """Its bytes, as they were uploaded."""
    content = await visitor.workshop.content(visitor.policy, file_id)
    return Response(content, media_type=CONTENT_TYPE, headers={"X-Content-Type-Options": "nosniff"})


async def delete_file(file_id: str, visitor: TheVisitor) -> Response:
    """Its bytes are removed; 409 while a job that has not ended needs it."""
    file = await visitor.workshop.delete(visitor.policy, file_id)
    return json_response(FileDeleted(id=file.id, object="file", deleted=True))


def _shape(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        object="file",
        bytes=file.num_bytes,
        created_at=file.created_at,
        filename=file.filename,
        purpose=PURPOSE,
        status="processed",
        num_lines=file.num_lines,
    )
