"""Every error as OpenAI's error object, with our words. Installed by app; sse uses the same object inside streams.
Knows the exception tree, no route."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from uld_serve.errors import EngineStopped, InvalidRequest, NotFound, Overloaded, UldError
from uld_serve.server.responses import ErrorDetail, ErrorResponse, json_response

ENGINE_RETRY_AFTER_S = 5
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the access log


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


def error_body(error: UldError) -> ErrorResponse:
    detail = ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    return ErrorResponse(error=detail)


def error_response(error: UldError, *, headers: dict[str, str] | None = None) -> Response:
    made = dict(headers or {})
    if isinstance(error, Overloaded):
        made["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, EngineStopped):
        made["Retry-After"] = str(ENGINE_RETRY_AFTER_S)
    if error.status == 401:
        made["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413, 415):
        made["Connection"] = "close"  # the rest of the body was not read
    return json_response(error_body(error), status=error.status, headers=made)


def internal_error() -> UldError:
    """Says nothing of the cause: that is in the log, and may hold what the client must not see."""
    return UldError("the server failed to answer this request; its log says why")


def install(app: FastAPI) -> None:
    app.add_exception_handler(UldError, _on_uld_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)


async def _on_uld_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, UldError)
    return error_response(error)


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return error_response(NotFound("there is no such route"), headers=headers)
    if error.status_code == 405:
        return error_response(MethodNotAllowed("this route does not take this method"), headers=headers)
    fault = InvalidRequest("the request cannot be read") if error.status_code < 500 else internal_error()
    fault.status = error.status_code
    return error_response(fault, headers=headers)


async def _on_validation_error(_request: Request, _error: Exception) -> Response:
    return error_response(InvalidRequest("the path or a parameter of this request is not valid"))


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_exception(_request: Request, _error: Exception) -> Response:
    # Starlette raises it again, to be logged, and then uvicorn closes the connection: the client must know.
    return error_response(internal_error(), headers={"Connection": "close"})
