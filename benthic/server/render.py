"""POST /render: Markdown in, blocks of safe HTML out. The page shows nothing else of what a model wrote as HTML."""

import asyncio

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benthic.server import markup
from benthic.server.limits import LIMITS
from benthic.server.protocol import ApiError, dump

_AT_ONCE = 2  # threads that render; the engine needs the interpreter too


class RenderRequest(BaseModel):
    """Texts to render, each by itself."""

    model_config = ConfigDict(strict=True, extra="forbid")
    texts: list[str] = Field(min_length=int(LIMITS["render_texts"].low), max_length=int(LIMITS["render_texts"].high))


class Renderer:
    """The route. It holds nothing between two requests."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def post(self, request: Request) -> Response:
        """`{"rendered": [[{"line": 0, "html": "<p>..."}, ...], ...]}`: the blocks of each text."""
        texts = _read(await request.body())
        if self._waiting > LIMITS["render_waiting"].high:
            message = "too many texts are being rendered -> try again later"
            raise ApiError(429, message, code="queue_full", headers=(("retry-after", "1"),))
        self._waiting += 1
        try:
            async with self._turn:
                body = await asyncio.to_thread(_render, texts)
        finally:
            self._waiting -= 1
        return Response(body, headers={"content-type": "application/json", "x-content-type-options": "nosniff"})


def routes() -> list[Route]:
    """The one route."""
    return [Route("/render", Renderer().post, methods=["POST"])]


def _read(body: bytes) -> list[str]:
    """The texts of a request. ApiError 400 names the first fault."""
    try:
        texts = RenderRequest.model_validate_json(body).texts
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise ApiError(400, f"{where or 'the body'}: {fault['msg']}", param=where or None) from None
    size, limit = sum(map(len, texts)), LIMITS["render_characters"]
    if size > limit.high:
        raise ApiError(400, f"texts: {size:,} characters; use at most {limit.high:,} {limit.meaning}", param="texts")
    return texts


def _render(texts: list[str]) -> bytes:
    return dump({"rendered": [[block._asdict() for block in markup.render(text)] for text in texts]})
