"""What a kubelet and Prometheus ask: /healthz, /readyz and /metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import generate_latest

from trimtab_operator.core.metrics import Metrics


@asynccontextmanager
async def serve(
    port: int,
    metrics: Metrics,
    *,
    unhealthy: Callable[[], str | None],
    ready: Callable[[], bool],
    host: str = "0.0.0.0",  # noqa: S104 - a kubelet asks from outside the pod
) -> AsyncIterator[int]:
    """Answer while the block runs; the value is the port.

    Args:
        port: 0 takes a free one.
        metrics: What /metrics shows.
        unhealthy: Why the process should be restarted; None where it should not.
        ready: Whether every kind has been listed.
        host: Address to listen on.

    Raises:
        OSError: The port is in use.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(metrics.registry), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def healthz(_: web.Request) -> web.Response:
        cause = unhealthy()
        return web.Response(text=cause or "ok", status=200 if cause is None else 503)

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok", status=200) if ready() else web.Response(text="not listed yet", status=503)

    app = web.Application()
    app.add_routes([web.get("/metrics", show_metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
