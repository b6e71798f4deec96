"""The routes, errors in OpenAI's shape, and `serve`: a model folder behind a port."""

import gc
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benthic.base.errors import InputError, Interrupted
from benthic.base.signals import leave_to_rank_0

try:
    import latex2mathml  # noqa: F401  (these are here only to fail with the fix)
    import markdown_it  # noqa: F401
    import nh3  # noqa: F401
    import pygments  # noqa: F401
    import uvicorn  # noqa: F401
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute, Route
except ModuleNotFoundError as missing:
    raise InputError(f"the server needs {missing.name}, not installed -> pip install 'benthic[server]'") from missing

from benthic.inference.config import EngineConfig, StructuredOutputsParams
from benthic.inference.llm import LLM
from benthic.parallel.ranks import follows
from benthic.server import about, generate, metrics, render, static, tokens
from benthic.server.access import AccessLog, Decode, writer
from benthic.server.config import ServeConfig
from benthic.server.errors import ApiError
from benthic.server.gate import OPEN_PATHS, Gate
from benthic.server.keys import Keys, read_keys
from benthic.server.listener import Server, bind, url
from benthic.server.openapi import document
from benthic.server.queue import Queue
from benthic.server.route import get, json_response
from benthic.server.service import Check, Forms, Service
from benthic.server.stream import Ticket
from benthic.server.types.replies import Schema
from benthic.server.wire import dump
from benthic.server.worker import Worker
from benthic.tokenizer import chat
from benthic.tokenizer.templates import THINKS

log = logging.getLogger("benthic.server")


def serve(config: ServeConfig) -> None:
    """Serve until a signal comes, then finish what was accepted and raise Interrupted.

    Raises InputError before the model is loaded where the address is taken, or open to others without a key.
    """
    if follows(config.parallel):
        leave_to_rank_0()
        _load(config).follow()
        return
    keys = read_keys(config)
    write = writer(config.access_log, sys.stderr)
    listener = bind(config.host, config.port)
    try:
        llm = _load(config)
        service = _service(config, llm)
        app = build(
            service, config.host, keys, origins=config.allowed_origins, engine=llm.engine, write=write,
            decode=service.tokenizer.decode if config.log_prompts else None,
        )  # fmt: skip
        server = Server(app, service.worker, config.shutdown_timeout)
        service.worker.run()
        gc.freeze()  # the model and all modules stay; collections that look at them stall the loop for 0.2 s
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
        worker=Worker(llm.engine, _turns(config, llm.engine.scheduler.max_rows), config.request_timeout),
        max_model_len=llm.engine.config.max_model_len,
        vocab_size=llm.engine.vocab_size,
        thinking=thinking,
        forms=Forms(_compiler(llm)),
    )


def _compiler(llm: LLM) -> Check:
    """Compiles a form of answers for the engine; two threads may ask."""
    lock = threading.Lock()  # the engine makes its grammars at first use

    def check(form: StructuredOutputsParams) -> None:
        with lock:
            llm.engine.grammars.compile(form)

    return check


def _turns(config: ServeConfig, rows: int) -> Queue[Ticket]:
    """The queue before an engine that runs `rows` requests: it gets a few more, to have the next at hand."""
    return Queue(rows + max(1, rows // 8), config.max_queued_requests, config.max_queued_tokens)


def build(
    service: Service,
    host: str,
    keys: Keys,
    more: Sequence[BaseRoute] = (),
    *,
    open_paths: Sequence[bytes] = (*OPEN_PATHS, *static.paths()),
    origins: Sequence[str] = (),
    engine: Any = None,
    write: Callable[[str], object] | None = None,
    decode: Decode | None = None,
) -> AccessLog:
    """The ASGI app: the access log, the gate, and the routes, of which `more` come from outside this file. The static
    page's `open_paths` need no key; pages of `origins` may ask; metrics read `engine`; `write` and `decode` are the
    log's."""
    counts = metrics.Metrics(service.name, service.worker.turns, engine)
    service.worker.watch(counts)
    handled = (ApiError, HTTPException, ClientDisconnect, Exception)
    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers=dict.fromkeys(handled, _answer_error),
    )  # fmt: skip
    app.router.routes.extend(routes(service, [*metrics.routes(counts), *more]))
    counts.know([route.path for route in app.router.routes if isinstance(route, Route)])
    gate = Gate(app, host, keys, open_paths=open_paths, origins=origins)
    return AccessLog(gate, counts, write, decode)


def routes(service: Service, more: Sequence[BaseRoute] = ()) -> list[BaseRoute]:
    """Every route of the server."""
    all: list[BaseRoute] = [*about.routes(service), *generate.routes(service), *tokens.routes(service)]
    all += [*render.routes(), *static.routes(), *more]

    async def openapi() -> Response:
        """The schema of every route."""
        return json_response(schema)

    all.append(get("/openapi.json", openapi, Schema, "The schema of every route"))
    schema = document(all)
    for route in all:
        if isinstance(route, Route) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # only now: the schema needs not say that
    return all


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
