"""The one gate in front of every route: who may ask, from where, and how much.

It decides on the raw bytes of the request, before anything decodes or routes them: a path that only looks like an open
one (`//health`, `/%68ealth`, `/health/`) is closed.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from benthic.base.errors import InputError
from benthic.server import static
from benthic.server.config import ServeConfig
from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.wire import dump

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = (b"/health", *static.paths())  # answered without a key: a probe, and a static page without secrets


def read_key(config: ServeConfig) -> str:
    """The key from the flag, the file or BENTHIC_API_KEY, in this order; "" when none is set.

    Raises InputError for a key that no header can carry, and where others could reach a server without a key.
    """
    key = config.api_key or _first_line(config.api_key_file) or os.environ.get("BENTHIC_API_KEY", "")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise InputError("the API key holds characters that a header cannot carry -> use letters, digits and -_.")
    if not key and not is_loopback(config.host):
        raise InputError(
            f"host {config.host} is reachable from other machines and no API key is set "
            "-> set BENTHIC_API_KEY or --api-key-file, or use --host 127.0.0.1"
        )
    return key


def _first_line(path: str) -> str:
    if not path:
        return ""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read api_key_file {path} ({type(error).__name__}) -> check the path") from error
    if not lines or not lines[0].strip():
        raise InputError(f"the first line of api_key_file {path} is empty -> put the key there")
    return lines[0].strip()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def caller(scope: Scope) -> str:
    """Who asks, as far as turns and logs are concerned: the key's short hash, or the address where no key is needed."""
    return scope.get("caller") or (scope.get("client") or ("unknown",))[0]


class Gate:
    """ASGI middleware. `key` "" asks for none; a server on a loopback `host` answers to local names only."""

    def __init__(self, app: App, host: str, key: str):
        self._app = app
        self._loopback = is_loopback(host)
        self._digest = hashlib.sha256(key.encode()).digest() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks HTTP only, not {scope['type']}")
        try:
            self._check(scope)
        except ApiError as error:
            await refuse(error, send)
        else:
            await self._app(scope, _bounded(receive), send)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that must not reach a route."""
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > LIMITS["header_count"].high or size > LIMITS["header_bytes"].high:
            raise ApiError(431, "the headers are too large", code="headers_too_large")
        if self._loopback:
            _check_local(headers, scope["scheme"])
        if self._digest and scope["raw_path"] not in OPEN_PATHS:
            self._check_key(_values(headers, b"authorization"))
            scope["caller"] = f"key-{self._digest.hex()[:8]}"
        length = _values(headers, b"content-length")
        if length and (len(length[0]) > 18 or int(length[0]) > LIMITS["body_bytes"].high):
            raise _too_large()

    def _check_key(self, given: list[bytes]) -> None:
        """Hashes are compared in constant time, so neither the key's length nor its beginning can be timed."""
        kind, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        if not hmac.compare_digest(digest, self._digest) or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "missing or wrong API key -> send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=(("www-authenticate", "Bearer"),),
            )


def _check_local(headers: list[tuple[bytes, bytes]], scheme: str) -> None:
    """A name that a stranger's DNS points at this machine, or a page of another site, gets nothing."""
    hosts = _values(headers, b"host")
    if len(hosts) != 1 or not is_loopback(_hostname(hosts[0].decode("latin-1"))):
        raise ApiError(403, "the Host header does not name this machine -> use localhost or 127.0.0.1", code="host")
    for origin in _values(headers, b"origin"):
        if origin.lower() != scheme.encode() + b"://" + hosts[0].lower():
            raise ApiError(403, "requests from pages of another origin are refused", code="origin")


def _hostname(host: str) -> str:
    """A Host header without its port: `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LIMITS['body_bytes'].high:,} bytes", code="body_too_large")


def _bounded(receive: Receive) -> Receive:
    """`receive` that raises ApiError once the body is longer, or takes longer, than the limits allow."""
    size, more, deadline = 0, True, asyncio.get_running_loop().time() + LIMITS["body_seconds"].high

    async def bounded() -> Message:
        nonlocal size, more
        if not more:
            return await receive()  # waits for the client to hang up
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        if size > LIMITS["body_bytes"].high:
            raise _too_large()
        return message

    return bounded


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error in OpenAI's shape."""
    headers = [("content-type", "application/json"), *error.headers]
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    body = dump(error.body())
    encoded.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
