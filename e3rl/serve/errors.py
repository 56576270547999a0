"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

from e3rl.errors import UserError


class ApiError(Exception):
    """A refusal: an HTTP status, a sentence for a person, and the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str) -> ApiError:
    """The error for a field that can't be used."""
    return ApiError(400, f"{param}: {message}", param=param)


def as_api_error(error: UserError) -> ApiError:
    """A UserError of the library as an error for the client."""
    return ApiError(400, str(error))
