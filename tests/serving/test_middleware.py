"""Which paths pass, at the level of ASGI."""

import json
from typing import Any

import pytest

from trimtab_serving.middleware import ALLOWED_PATHS, AllowedPaths


async def answer(scope: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client is sent: by the middleware, or `passed` by the application behind it."""
    sent: list[dict[str, Any]] = []

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "passed"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the middleware reads no request")

    await AllowedPaths(application)(scope, receive, send)
    return sent


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"])
async def test_these_pass(path: str) -> None:
    assert await answer({"type": "http", "method": "POST", "path": path}) == [{"type": "passed"}]


def test_there_are_no_others() -> None:
    assert len(ALLOWED_PATHS) == 5


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/invocations",
        "/docs",
        "/openapi.json",
        "/tokenize",
        "/load",
        "/server_info",
        "/v1/load_lora_adapter",
        "/v1/models/",
        "//v1/models",
        "/v1/models/../../invocations",
        "/V1/MODELS",
        "/health\n",
        "/metrics/x",
        "",
    ],
)
async def test_these_are_closed(path: str) -> None:
    start, body = await answer({"type": "http", "method": "GET", "path": path})
    assert start["status"] == 404
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    error = json.loads(body["body"])["error"]
    assert error["code"] == 404
    assert error["type"] == "NotFoundError"
    assert "/v1/chat/completions" in error["message"]


async def test_a_websocket_is_refused_and_the_lifespan_passes() -> None:
    assert await answer({"type": "websocket", "path": "/v1/models"}) == [{"type": "websocket.close", "code": 1008}]
    assert await answer({"type": "lifespan"}) == [{"type": "passed"}]
