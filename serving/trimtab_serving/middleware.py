"""The paths that a served model answers; all others are closed.

vLLM loads the class by its name (`--middleware`) and puts it outside everything else, authentication included.
What it closes: `/invocations`, `/tokenize`, `/load`, `/server_info` and whatever a later version adds; vLLM's own API
key guards none of these.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

ALLOWED_PATHS = frozenset({"/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"})
"""Compared with the decoded path, byte for byte: no prefix, no trailing slash."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class AllowedPaths:
    """ASGI middleware: passes the allowed paths on, answers others with 404 and refuses WebSockets."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or hand it on."""
        match scope["type"]:
            case "lifespan":
                await self._app(scope, receive, send)
            case "http" if scope["path"] in ALLOWED_PATHS:
                await self._app(scope, receive, send)
            case "http":
                await _not_found(scope, send)
            case _:
                await send({"type": "websocket.close", "code": 1008})


async def _not_found(scope: Scope, send: Send) -> None:
    error = {
        "message": f"{scope['method']} {scope['path'][:200]} is not served; this address answers "
        + ", ".join(sorted(ALLOWED_PATHS)),
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": body})
