"""The page at `/`: files that stay as they are while the server runs, under a policy that allows this origin only."""

from hashlib import sha256
from importlib.resources import files
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline script or style, nothing from elsewhere, no frame around the page and no HTML from strings but in one place.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "object-src 'none'",
        "frame-src 'none'",
        "worker-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types benthic",
    )
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


def paths() -> tuple[bytes, ...]:
    """The paths of the page, exactly. They are answered without a key and hold no secret."""
    return tuple(path.encode() for path in _files())


def routes() -> list[Route]:
    """GET and HEAD of the page and of each of its files."""
    return [Route(path, _File(name, content).get) for path, (name, content) in _files().items()]


def _files() -> dict[str, tuple[str, bytes]]:
    """Path -> name and content."""
    found = {entry.name: entry.read_bytes() for entry in files("benthic.server").joinpath("web").iterdir()}
    return {"/" if name == "index.html" else f"/web/{name}": (name, content) for name, content in sorted(found.items())}


class _File:
    """One file as an endpoint. Browsers keep it and ask whether it is still the same."""

    def __init__(self, name: str, content: bytes):
        self._content = content
        self._headers = {
            **HEADERS,
            "content-type": _TYPES[PurePosixPath(name).suffix],
            "cache-control": "no-cache",
            "etag": f'"{sha256(content).hexdigest()[:32]}"',
        }

    async def get(self, request: Request) -> Response:
        """The content, or 304 where the browser has it."""
        known = request.headers.get("if-none-match", "")
        if self._headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
