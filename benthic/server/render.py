"""POST /render: Markdown in, blocks of safe HTML out. The page shows nothing else of what a model wrote as HTML."""

import asyncio

from starlette.responses import Response

from benthic.server import markup
from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.route import Route, post
from benthic.server.types.render import RenderReply, RenderRequest
from benthic.server.wire import dump

_AT_ONCE = 2  # threads that render; the engine needs the interpreter too


class Renderer:
    """The route. It holds nothing between two requests."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def render(self, ask: RenderRequest) -> Response:
        """The blocks of each text."""
        if self._waiting > LIMITS["render_waiting"].high:
            message = "too many texts are being rendered -> try again later"
            raise ApiError(429, message, code="queue_full", headers=(("retry-after", "1"),))
        self._waiting += 1
        try:
            async with self._turn:
                body = await asyncio.to_thread(_render, ask.texts)
        finally:
            self._waiting -= 1
        return Response(body, headers={"content-type": "application/json", "x-content-type-options": "nosniff"})


def routes() -> list[Route]:
    """The one route."""
    return [post("/render", Renderer().render, RenderRequest.read, RenderReply, "Markdown to safe HTML")]


def _render(texts: list[str]) -> bytes:
    reply: RenderReply = {
        "rendered": [[{"line": line, "html": html} for line, html in markup.render(text)] for text in texts]
    }
    return dump(reply)
