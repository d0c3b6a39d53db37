"""What a client is told in place of an answer, in OpenAI's form."""

from __future__ import annotations

from typing import Any

INVALID, AUTHENTICATION, OVERLOADED, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "overloaded_error",
    "server_error",
)


class RequestError(ValueError):
    """A request that is not answered.

    status: of HTTP. param: field of the request that is to be mended. code: for programs. retry_after: seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_after = status, kind, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, kind=OVERLOADED, code="shutting_down", retry_after=5)
