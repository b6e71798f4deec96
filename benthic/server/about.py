"""The routes that say what the server is, and which OpenAI routes it does not have."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from benthic.server.errors import ApiError
from benthic.server.route import Route, described, get, json_response
from benthic.server.service import Service
from benthic.server.types.replies import ErrorReply, Health, ModelCard, ModelList, Version

NO_EMBEDDINGS = "this server generates text and makes no embeddings -> send texts to a server with an embedding model"


@dataclass(frozen=True)
class About:
    """One served model."""

    service: Service

    async def health(self) -> Response:
        """200 while requests are accepted, 503 while the server drains or after the engine has failed."""
        if self.service.worker.refusal:
            raise ApiError(503, self.service.worker.refusal, code="unavailable")
        return json_response({"status": "ok"})

    async def version(self) -> Response:
        """The package's version."""
        return json_response({"version": version()})

    async def models(self) -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, model: str) -> Response:
        """The model by its name."""
        self.service.check_model(model)
        return json_response(self._card())

    async def embeddings(self, ask: dict[str, Any]) -> Response:
        """Always refused."""
        raise ApiError(404, NO_EMBEDDINGS, code="unsupported")

    def _card(self) -> ModelCard:
        service = self.service
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "benthic",
            "max_model_len": service.max_model_len,
        }


def version() -> str:
    """Of the installed package."""
    try:
        return importlib.metadata.version("benthic")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"  # a checkout that was not installed


def routes(service: Service) -> list[Route]:
    """All of them."""
    about = About(service)
    return [
        get("/health", about.health, Health, "Whether requests are accepted", (403, 405, 431, 500, 503)),
        get("/version", about.version, Version, "The version of Benthic"),
        get("/v1/models", about.models, ModelList, "The served models"),
        get("/v1/models/{model:path}", about.model, ModelCard, "One served model"),
        Route(
            "/v1/embeddings", about.embeddings, read=lambda body: {}, methods=["POST"], status_code=404,
            response_model=ErrorReply, responses=described((401, 403, 405, 408, 413, 431, 500)),
            summary="Refused: no embeddings are made",
        ),
    ]  # fmt: skip
