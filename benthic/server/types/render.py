"""POST /render: the request and its reply."""

from typing import Annotated

from pydantic import field_validator
from typing_extensions import TypedDict

from benthic.server.limits import LIMITS
from benthic.server.types.base import Strict, Within, fault


class RenderRequest(Strict):
    """Texts to render, each by itself."""

    texts: Annotated[list[str], Within("render_texts")]
    """Markdown with LaTeX."""

    @field_validator("texts")
    @classmethod
    def _bounded(cls, texts: list[str]) -> list[str]:
        size, limit = sum(map(len, texts)), LIMITS["render_characters"]
        if size > limit.high:
            raise fault(f"{size:,} characters; use at most {limit.high:,} ({limit.meaning})")
        return texts


class RenderedBlock(TypedDict):
    """A paragraph, list, table ... of a text: the line it begins in, and its HTML."""

    line: int
    html: str


class RenderReply(TypedDict):
    """The blocks of each text."""

    rendered: list[list[RenderedBlock]]
