"""Every error that uld-serve raises on purpose, with the HTTP status it becomes. Imports nothing of ours.

UldError                       500 server_error
├── InvalidRequest             400 invalid_request_error   the client's input is wrong
│   ├── PromptTooLong          400 context_length_exceeded
│   └── PayloadTooLarge        413
├── Unauthenticated            401
├── Forbidden                  403
├── NotFound                   404
│   ├── UnknownModel           404 model_not_found
│   └── UnknownProfile         404 profile_not_found
├── Overloaded                 429 / 503                    try again later
├── ProfileError               409                          the profile's files or contents are unusable
│   ├── ProfileCorrupt         409 profile_corrupt          bytes differ, file missing, malformed
│   └── ProfileMismatch        409 profile_mismatch         made for another base, tokenizer or shape
├── ModelUnsupported           500                          this base cannot be served, and why
├── DataError                  400                          training or evaluation input is unusable
├── NumericalError             500 numerical_error          NaN or inf in a stream's logits; ends one request
├── EngineStopped              503 engine_stopped           the step loop is down
└── RequestTimeout             503 request_timeout          it ran longer than the server lets a request run
"""

from __future__ import annotations


class UldError(Exception):
    """Base of all. `message` says what, which, and what to do; it is safe to show to a client."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(UldError):
    status = 400
    type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "payload_too_large"


class Unauthenticated(UldError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(UldError):
    status = 403
    type = "permission_error"


class NotFound(UldError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"


class UnknownProfile(NotFound):
    code = "profile_not_found"


class Overloaded(UldError):
    """The queue is full. `retry_after_s` goes into the Retry-After header."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProfileError(UldError):
    status = 409
    type = "invalid_request_error"


class ProfileCorrupt(ProfileError):
    code = "profile_corrupt"


class ProfileMismatch(ProfileError):
    code = "profile_mismatch"


class ModelUnsupported(UldError):
    code = "model_unsupported"


class DataError(UldError):
    status = 400
    type = "invalid_request_error"
    code = "bad_data"


class NumericalError(UldError):
    code = "numerical_error"


class EngineStopped(UldError):
    status = 503
    code = "engine_stopped"


class RanksLost(EngineStopped):
    """One of the processes that share a model is gone: no step can be run any more."""

    code = "ranks_lost"


class RequestTimeout(UldError):
    status = 503
    code = "request_timeout"
