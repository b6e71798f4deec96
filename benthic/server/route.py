"""How routes are written: an endpoint with typed body and reply for /openapi.json, read by the strict types alone."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from benthic.server.asgi import Receive, Scope, Send
from benthic.server.types.replies import ErrorReply
from benthic.server.wire import dump

ERRORS = {
    400: "The request cannot be used; `param` names the field",
    401: "The key is missing or wrong",
    403: "The request comes from another site, or names another host",
    404: "There is no such route or model",
    405: "The route has other methods",
    408: "The body did not arrive, or the answer was not read, in time",
    413: "The body is too large",
    429: "All places are taken; Retry-After says when to ask again",
    431: "The headers are too large",
    500: "The engine or the server failed",
    503: "The server drains or has failed",
    504: "The request was not done within its time",
}
WITHOUT_BODY = (401, 403, 404, 405, 431, 500)


class Answering(Protocol):
    """An ASGI app that answers one request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


Endpoint = Callable[..., Awaitable[Answering]]


class Route(APIRoute):
    """FastAPI reads the endpoint's signature for the schema; a request's body goes to `read` as it came."""

    def __init__(self, path: str, endpoint: Endpoint, *, read: Callable[[bytes], Any] | None, **about: Any):
        self._read = read
        super().__init__(path, endpoint, **about)

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Called by FastAPI, once."""

        async def handle(request: Request) -> Answering:
            if self._read is None:
                return await self.endpoint(**request.path_params)
            return await self.endpoint(self._read(await request.body()))

        return handle


def get(path: str, endpoint: Endpoint, reply: Any, summary: str, errors: tuple[int, ...] = WITHOUT_BODY) -> Route:
    """A route that reads nothing but its path."""
    return Route(
        path, endpoint, read=None, methods=["GET"], summary=summary, response_model=reply, responses=described(errors)
    )  # fmt: skip


def post(path: str, endpoint: Endpoint, read: Callable[[bytes], Any], reply: Any, summary: str) -> Route:
    """A route whose body `read` turns into the endpoint's argument."""
    return Route(
        path, endpoint, read=read, methods=["POST"], summary=summary, response_model=reply,
        responses=described(tuple(ERRORS)),
    )  # fmt: skip


def json_response(value: Any) -> Response:
    """200 with JSON."""
    return Response(dump(value), media_type="application/json")


def described(errors: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    """The errors of a route for its schema."""
    return {status: {"model": ErrorReply, "description": ERRORS[status]} for status in errors}
