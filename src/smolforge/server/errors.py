"""Everything that can go wrong, in the one shape that OpenAI's clients read."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that gets an error: its status, and what OpenAI's clients show."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of it; no half characters, which JSON cannot carry."""
        message = str(self).encode(errors="replace").decode()
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class Broken(Refused):
    """Our own fault. What it was stands in the log, not in the answer."""

    def __init__(self) -> None:
        super().__init__(500, "the server failed; its log says how", code="internal_error")


def closing() -> Refused:
    return Refused(503, "the server is shutting down; ask again when it is back", code="shutting_down", retry_after=5)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """The first thing that is wrong with a request's fields, by its name."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    # Of a union pydantic names each kind it tried; people know fields.
    param = ".".join(part for part in place if part.replace("_", "").isalnum() and part not in ("str", "int", "bool"))
    if first["type"] == "json_invalid":
        return Refused(400, "the body is not valid JSON")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"there is no field {param[:60]!r} here", param[:60], "unknown_parameter")
    said = str(first["msg"]).removeprefix("Value error, ")
    return Refused(400, f"{param or 'the body'}: {said}"[:500], param[:100] or None)
