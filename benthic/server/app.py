"""The routes, errors in OpenAI's shape, and `serve`: a model folder behind a port."""

import contextlib
import importlib.metadata
import logging
import signal
import sys
import traceback
from dataclasses import dataclass

from benthic.base.errors import InputError, Interrupted
from benthic.base.signals import leave_to_rank_0

try:
    import latex2mathml  # noqa: F401  (these are here only to fail with the fix)
    import markdown_it  # noqa: F401
    import nh3  # noqa: F401
    import pygments  # noqa: F401
    import uvicorn  # noqa: F401
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
except ModuleNotFoundError as missing:
    raise InputError(f"the server needs {missing.name}, not installed -> pip install 'benthic[server]'") from missing

from benthic.inference.config import EngineConfig
from benthic.inference.llm import LLM
from benthic.parallel.ranks import follows
from benthic.server import render, static
from benthic.server.auth import Gate, read_key
from benthic.server.completions import Chat, Service
from benthic.server.config import ServeConfig
from benthic.server.listener import Server, bind, url
from benthic.server.protocol import ApiError, dump
from benthic.server.worker import Worker
from benthic.tokenizer import chat
from benthic.tokenizer.templates import THINKS, ThinkingRefused

log = logging.getLogger("benthic.server")


def serve(config: ServeConfig) -> None:
    """Serve until a signal comes, then finish what was accepted and raise Interrupted.

    Raises InputError before the model is loaded where the address is taken, or open to others without a key.
    """
    if follows(config.parallel):
        leave_to_rank_0()
        _load(config).follow()
        return
    key = read_key(config)
    listener = bind(config.host, config.port)
    try:
        llm = _load(config)
        service = _service(config, llm)
        server = Server(build(service, config.host, key), service.worker, config.shutdown_timeout)
        service.worker.run()
        print(f"{config.name} is served at {url(listener)}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
        service.worker.join(timeout=5)
        llm.close()
    finally:
        listener.close()
    raise Interrupted(server.signal, f"{signal.Signals(server.signal).name}: the server has closed")


def _load(config: ServeConfig) -> LLM:
    """The model, or this process's share of it."""
    limits = EngineConfig(
        max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len, quantization=config.quantization
    )
    return LLM(
        config.model, device=config.device, dtype=config.dtype, chat_template=config.chat_template, config=limits,
        parallel=config.parallel,
    )  # fmt: skip


def _service(config: ServeConfig, llm: LLM) -> Service:
    """The model, ready to chat. InputError where its chat template cannot be used with its tokenizer."""
    if llm.tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer.json -> add the tokenizer that the model was trained with")
    thinking = THINKS[config.thinking]
    chat.check(llm.tokenizer, thinking)
    return Service(
        name=config.name,
        tokenizer=llm.tokenizer,
        worker=Worker(llm.engine, config.max_num_seqs + config.max_queued_requests),
        max_model_len=llm.engine.config.max_model_len,
        thinking=thinking,
    )


def build(service: Service, host: str, key: str) -> Gate:
    """The ASGI app: the gate, and the routes behind it."""
    handled = (ApiError, HTTPException, ClientDisconnect, Exception)
    app = Starlette(routes=routes(service), exception_handlers=dict.fromkeys(handled, _answer_error))
    app.router.redirect_slashes = False
    return Gate(app, host, key)


def routes(service: Service) -> list[Route]:
    """Every route of the server."""
    about = About(service)
    return [
        Route("/health", about.health),
        Route("/version", about.version),
        Route("/v1/models", about.models),
        Route("/v1/chat/completions", Chat(service), methods=["POST"]),
        *render.routes(),
        *static.routes(),
    ]


@dataclass(frozen=True)
class About:
    """The routes that say what the server is."""

    service: Service

    async def health(self, request: Request) -> Response:
        """200 while requests are accepted, 503 while the server drains or after the engine has failed."""
        if self.service.worker.refusal:
            raise ApiError(503, self.service.worker.refusal, code="unavailable")
        return _json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        service = self.service
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "benthic"}
        return _json({"object": "list", "data": [{**model, **_details(service)}]})

    async def version(self, request: Request) -> Response:
        """The package's version."""
        return _json({"version": _version()})


def _details(service: Service) -> dict[str, object]:
    """What a client may ask of the model: its context, and the choices of thinking of its chat template."""
    thinking = []
    for choice in (False, True):
        with contextlib.suppress(ThinkingRefused):
            chat.check(service.tokenizer, choice)
            thinking.append(choice)
    return {"max_model_len": service.max_model_len, "thinking": thinking}


def _version() -> str:
    try:
        return importlib.metadata.version("benthic")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"  # a checkout that was not installed


def _json(value: object) -> Response:
    return Response(dump(value), media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    """Whatever a route raises, in OpenAI's shape."""
    if isinstance(error, HTTPException):  # unknown route or wrong method
        message = f"{error.detail}: {request.method} {request.scope['path']}"[:200]
        error = ApiError(error.status_code, message, headers=tuple((error.headers or {}).items()))
    elif isinstance(error, ClientDisconnect):
        error = ApiError(400, "the client hung up")  # nobody reads it
    elif not isinstance(error, ApiError):
        frames = "".join(traceback.format_tb(error.__traceback__))  # not the message, which could quote a prompt
        log.error("%s in %s\n%s", type(error).__name__, request.scope["path"], frames)
        error = ApiError(500, "internal error", code="internal")
    return Response(dump(error.body()), error.status, dict(error.headers), "application/json")
