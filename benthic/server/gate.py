"""The one gate in front of every route: who may ask, from where, and how much.

It decides on the raw bytes of the request, before anything decodes or routes them: a path that only looks like an open
one (`//health`, `/%68ealth`, `/health/`) is closed.
"""

import asyncio
from collections.abc import Sequence

from benthic.server.asgi import App, Message, Receive, Scope, Send
from benthic.server.errors import ApiError
from benthic.server.keys import Keys, is_loopback
from benthic.server.limits import LIMITS
from benthic.server.wire import dump

OPEN_PATHS = (b"/health",)  # answered without a key: a probe holds no secret
ALLOWED = (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")
EXPOSED = (b"access-control-expose-headers", b"retry-after, x-request-id")


def caller(scope: Scope) -> str:
    """Who asks, as far as turns and logs are concerned: the owner of the key, or the address where none is needed."""
    return scope.get("caller") or (scope.get("client") or ("unknown",))[0]


class Gate:
    """ASGI middleware. Every path needs one of `keys`, where there are any, but `open_paths`, raw bytes compared
    exactly. A server on a loopback `host` answers to local names only, and pages of other `origins` get nothing.
    """

    def __init__(
        self,
        app: App,
        host: str,
        keys: Keys,
        *,
        open_paths: Sequence[bytes] = OPEN_PATHS,
        origins: Sequence[str] = (),
    ):
        self._app = app
        self._loopback = is_loopback(host)
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._origins = frozenset(origin.encode("latin-1") for origin in origins)
        self._held = 0  # bytes of all bodies that have arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks HTTP only, not {scope['type']}")
        if origin := self._welcome(scope):
            send = _shared(send, origin)
        try:
            preflight = self._check(scope, bool(origin))
        except ApiError as error:
            await refuse(error, send)
            return
        if preflight:
            await send({"type": "http.response.start", "status": 204, "headers": _preflight(scope)})
            await send({"type": "http.response.body", "body": b""})
            return
        body = Body(self, receive)
        try:
            await self._app(scope, body, send)
        finally:
            self._held -= body.size

    def hold(self, size: int) -> None:
        """Count bytes of a body. ApiError 503 where all bodies together are too large."""
        self._held += size
        if self._held > LIMITS["all_body_bytes"].high:
            message = "the bodies of all requests are too large together -> try again later"
            raise ApiError(503, message, code="bodies_too_large", headers=(("retry-after", "1"),))

    def _welcome(self, scope: Scope) -> bytes:
        """The origin of a page that is allowed to ask though it is not ours, else b""."""
        given = _values(scope["headers"], b"origin")
        return given[0] if len(given) == 1 and (given[0] in self._origins or b"*" in self._origins) else b""

    def _check(self, scope: Scope, welcome: bool) -> bool:
        """Raise ApiError for a request that must not reach a route; True for a browser's question whether a page of a
        welcome origin may ask at all, which carries no key."""
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > LIMITS["header_count"].high or size > LIMITS["header_bytes"].high:
            raise ApiError(431, "the headers are too large", code="headers_too_large")
        if self._loopback:
            _check_local(headers, scope["scheme"], welcome)
        if welcome and scope["method"] == "OPTIONS" and _values(headers, b"access-control-request-method"):
            return True
        if self._keys and scope["raw_path"] not in self._open_paths:
            scope["caller"] = self._owner(_values(headers, b"authorization"))
        length = _values(headers, b"content-length")
        if length and (len(length[0]) > 18 or int(length[0]) > LIMITS["body_bytes"].high):
            raise _too_large()
        return False

    def _owner(self, given: list[bytes]) -> str:
        kind, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        owner = self._keys.owner(key.strip())
        if not owner or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "missing or wrong API key -> send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=(("www-authenticate", "Bearer"),),
            )
        return owner


class Body:
    """`receive` that raises ApiError once the body is longer, or takes longer, than the limits allow."""

    def __init__(self, gate: Gate, receive: Receive):
        self._gate, self._receive = gate, receive
        self._deadline = asyncio.get_running_loop().time() + LIMITS["body_seconds"].high
        self._more = True
        self.size = 0  # bytes that the gate has counted

    async def __call__(self) -> Message:
        if not self._more:
            return await self._receive()  # waits for the client to hang up
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None
        size = len(message.get("body", b""))
        self.size += size
        self._gate.hold(size)
        self._more = message.get("more_body", False)
        if self.size > LIMITS["body_bytes"].high:
            raise _too_large()
        return message


def _shared(send: Send, origin: bytes) -> Send:
    """`send` that lets the page of `origin` read the answer."""

    async def shared(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(b"access-control-allow-origin", origin), EXPOSED, (b"vary", b"origin")]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return shared


def _preflight(scope: Scope) -> list[tuple[bytes, bytes]]:
    wanted = _values(scope["headers"], b"access-control-request-headers")
    return [*ALLOWED, *((b"access-control-allow-headers", names) for names in wanted[:1])]


def _check_local(headers: list[tuple[bytes, bytes]], scheme: str, welcome: bool) -> None:
    """A name that a stranger's DNS points at this machine, or a page of another site, gets nothing."""
    hosts = _values(headers, b"host")
    if len(hosts) != 1 or not is_loopback(_hostname(hosts[0].decode("latin-1"))):
        raise ApiError(403, "the Host header does not name this machine -> use localhost or 127.0.0.1", code="host")
    for origin in _values(headers, b"origin"):
        if not welcome and origin.lower() != scheme.encode() + b"://" + hosts[0].lower():
            message = "requests from pages of another origin are refused -> serve with --allowed-origins"
            raise ApiError(403, message, code="origin")


def _hostname(host: str) -> str:
    """A Host header without its port: `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _values(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LIMITS['body_bytes'].high:,} bytes", code="body_too_large")


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error in OpenAI's shape."""
    headers = [("content-type", "application/json"), *error.headers]
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    body = dump(error.body())
    encoded.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
