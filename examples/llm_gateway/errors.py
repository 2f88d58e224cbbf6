"""Errors in OpenAI's format, which its clients turn into exceptions."""

import httpx
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from otel_tasks import QueueFullError


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: The status of the response, if it has not started.
        code: The error's name, for programs.
        message: What is wrong, for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def api_error(error: Exception) -> ApiError:
    """Translate an exception."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            return ApiError(400, "invalid_body", "; ".join(problems))
        case QueueFullError():
            return ApiError(429, "rate_limit_exceeded", "too many calls with this key at a time")
        case httpx.TimeoutException():
            return ApiError(504, "timeout", "the model took too long")
        case _:
            return ApiError(502, "upstream_error", f"the model has failed: {error!r}")


async def respond(_: Request, error: Exception) -> JSONResponse:
    answer = api_error(error)
    return JSONResponse(answer.body, answer.status, {"retry-after": "1"} if answer.status == 429 else None)


def handle_errors(app: FastAPI) -> None:
    """Answer these exceptions in OpenAI's format, wherever a route raises one."""
    for kind in (ApiError, RequestValidationError, QueueFullError, httpx.HTTPError):
        app.add_exception_handler(kind, respond)
