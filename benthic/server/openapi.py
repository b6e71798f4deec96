"""/openapi.json: the schema of every route, made from the routes' own types, loading nothing from elsewhere."""

from collections.abc import Sequence
from typing import Any, Literal

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.routing import BaseRoute, Route

from benthic.server import static
from benthic.server.about import version
from benthic.server.types import replies
from benthic.server.types.chat import ChatRequest
from benthic.server.types.completions import CompletionRequest
from benthic.server.types.replies import ErrorReply
from benthic.server.types.tokens import DetokenizeRequest, TokenizeChat, TokenizeText

STREAMS = {"/v1/chat/completions": "ChatChunk", "/v1/completions": "CompletionReply"}
OPEN = ("/health", *(path.decode() for path in static.paths()))
SECURITY: list[dict[str, list[str]]] = [{"key": []}]
REF = "#/components/schemas/"


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document. Routes without types, such as files, are named with the first line of their docstring."""
    typed = [route for route in routes if isinstance(route, APIRoute)]
    whole = get_openapi(title="Benthic", version=version(), routes=typed, description=__doc__)
    schemas = whole["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own reader is not used
        schemas.pop(name, None)
    for model in (ChatRequest, CompletionRequest, TokenizeText, TokenizeChat, DetokenizeRequest):
        _add(schemas, model, "validation")  # again: FastAPI writes large whole numbers as inexact ones
    for name in STREAMS.values():
        _add(schemas, getattr(replies, name), "serialization")
    for path, operations in whole["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status, answer in operation["responses"].items():
                if status != "200":  # errors are JSON whatever the route gives else
                    answer["content"] = {"application/json": {"schema": {"$ref": f"{REF}{ErrorReply.__name__}"}}}
            if path in STREAMS:
                stream = {"schema": {"$ref": REF + STREAMS[path]}}
                operation["responses"]["200"]["content"]["text/event-stream"] = stream
    for route in routes:
        if isinstance(route, Route) and not isinstance(route, APIRoute):
            whole["paths"].setdefault(route.path_format, {}).update(_plain(route))
    for path, operations in whole["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN else SECURITY
    whole["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Where the server has a key."}
    }
    return whole


def _add(schemas: dict[str, Any], kind: Any, mode: Literal["validation", "serialization"]) -> None:
    made = TypeAdapter(kind).json_schema(ref_template=REF + "{model}", mode=mode)
    schemas.update(made.pop("$defs", {}))
    schemas[kind.__name__] = made


def _plain(route: Route) -> dict[str, Any]:
    summary = (route.endpoint.__doc__ or route.name).strip().partition("\n")[0]
    answer = {"200": {"description": summary}}
    return {
        method.lower(): {"summary": summary, "operationId": f"{route.name}_{method.lower()}", "responses": answer}
        for method in sorted((route.methods or {"GET"}) - {"HEAD"})
    }
