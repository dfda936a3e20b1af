"""Errors as OpenAI's API gives them: a status, and an object that says what is wrong with which field."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from adalink.runtime.errors import (
    AdaLinkError,
    BackendUnavailableError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    UnknownTaskError,
)
from adalink.runtime.logs import get_logger

_LOG = get_logger(__name__)

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# A field at the beginning of the runtime's message, by a name that requests have too.
_FIELD = re.compile(
    r"(?:messages|tools|documents|stop|stop_token_ids|seed|temperature|top_p|top_k|min_p|logit_bias)(?:[\[.]\S*)?(?= )"
)
# Seconds after which a refused request may come again.
RETRY_SECONDS = 1


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: what is wrong, and what to do.
        param: the request's field, if one is at fault.
        code: OpenAI's name of the case, if it has one.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status == 503:
            self.headers.setdefault("Retry-After", str(RETRY_SECONDS))

    @property
    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _KINDS.get(self.status, default)
        # A client's text may hold half a character, which is no UTF-8.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        return msgspec.json.encode(
            {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}
        )


def as_api_error(error: BaseException) -> ApiError:
    """The answer for an error of the runtime or a bug; what is not the client's fault is logged, not told.

    Args:
        error: what was raised.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownTaskError):
        return ApiError(404, str(error), "model", "model_not_found")
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full")
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, RequestError):
        field = _FIELD.match(str(error))
        return ApiError(400, str(error), field[0] if field else None)
    if isinstance(error, BackendUnavailableError):
        _LOG.error("a request needs what is not installed: %s", error)
        return ApiError(501, "this server lacks what the request needs; its log names it", code="not_installed")
    if isinstance(error, AdaLinkError):
        _LOG.error("a request failed: %s: %s", type(error).__name__, error)
    else:
        _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the model could not answer; the server's log says why", code="internal_error")
