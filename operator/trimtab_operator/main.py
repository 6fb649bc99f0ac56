"""kopf's part: process, credentials, watches. Its handlers feed the runtime; `python -m trimtab_operator` starts it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import kopf

from trimtab_operator.core import credentials
from trimtab_operator.core.api_server import connect
from trimtab_operator.core.kube import CHILDREN, CLAIM, OWNERS, Change, Kind, Object, Sink
from trimtab_operator.core.metrics import Metrics
from trimtab_operator.core.probes import serve
from trimtab_operator.core.runtime import CHILD_LABELS, Runtime
from trimtab_operator.core.settings import from_environment
from trimtab_operator.kinds import kinds

SETTINGS = from_environment()


class EndlessBackoffs:
    """Seconds between two tries of kopf's own requests: it never gives up, so no outage ends the process."""

    def __iter__(self) -> Iterator[float]:
        """A new run for each request: 1, 2, 4, 8, then about 10 for ever."""
        delay = 1.0
        while True:
            yield delay * random.uniform(0.8, 1.2)  # noqa: S311
            delay = min(delay * 2, 10.0)


class KopfFeed:
    """`Feed` of what kopf's watches bring."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []

    def subscribe(self, sink: Sink) -> None:
        """Deliver every later event to `sink`."""
        self._sinks.append(sink)

    def take(self, kind: Kind, event_type: str | None, obj: Object) -> None:
        """Pass on one raw event of a watch; the items of a list have no type."""
        change = Change.DELETE if event_type == "DELETED" else Change.UPSERT
        for sink in self._sinks:
            sink(change, {**obj, "apiVersion": kind.api_version, "kind": kind.kind})


class Process:
    """What lives from kopf's startup to its cleanup."""

    def __init__(self) -> None:
        self.feed = KopfFeed()
        self.runtime: Runtime | None = None
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Connect, answer probes, list everything, start the workers. Takes as long as the API server is away."""
        metrics = Metrics()
        kube = await self._stack.enter_async_context(
            connect(
                await credentials.load(),
                requests_per_second=SETTINGS.requests_per_second,
                burst=SETTINGS.request_burst,
                observe=metrics.observe_request,
            )
        )
        controllers, companions = kinds(kube, SETTINGS)
        runtime = Runtime(kube, self.feed, controllers, SETTINGS, companions=companions, metrics=metrics)
        self.runtime = runtime
        await self._stack.enter_async_context(
            serve(SETTINGS.metrics_port, metrics, unhealthy=runtime.unhealthy, ready=lambda: runtime.synced)
        )
        self._stack.push_async_callback(runtime.stop)
        await runtime.start()

    async def stop(self) -> None:
        """Workers first, the HTTP session last."""
        await self._stack.aclose()


PROCESS = Process()


@kopf.on.startup()
async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
    """Bound what kopf would do without bounds, then start the runtime."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.queueing.idle_timeout = 0.05
    settings.queueing.worker_limit = 64
    settings.watching.server_timeout = 300
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = EndlessBackoffs()
    selector = ",".join(f"{label}={value}" for label, value in CHILD_LABELS.items())
    for kind in CHILDREN:
        group, _sep, version = kind.api_version.rpartition("/")
        settings.watching.label_selectors[group, version, kind.plural] = selector
    try:
        await PROCESS.start()
    except (OSError, credentials.CredentialsError) as error:
        remedy = "; set TRIMTAB_OPERATOR_METRICS_PORT to a free port" if isinstance(error, OSError) else ""
        raise kopf.PermanentError(f"the operator can't start: {error}{remedy}") from error


@kopf.on.login()
async def login(**_: Any) -> kopf.ConnectionInfo:
    """The same credentials as the runtime's; asked again when the API server refuses them."""
    found = await credentials.load()
    scheme, _sep, token = (await found.authorization() or "").partition(" ")
    return kopf.ConnectionInfo(
        server=found.server,
        ca_path=found.ca_file,
        insecure=found.insecure,
        scheme=scheme or None,
        token=token or None,
        certificate_path=found.certificate_file,
        private_key_path=found.key_file,
        proxy_url=found.proxy,
    )


@kopf.on.cleanup()
async def cleanup(**_: Any) -> None:
    """End in order, while the loop still runs."""
    await PROCESS.stop()


@kopf.on.probe(id="runtime")
async def probe(**_: Any) -> str:
    """For `kopf run --liveness`; the same answer as /healthz."""
    cause = PROCESS.runtime.unhealthy() if PROCESS.runtime else None
    if cause is not None:
        raise RuntimeError(cause)
    return "ok"


def _watch(kind: Kind) -> None:
    group, _sep, version = kind.api_version.rpartition("/")

    @kopf.on.event(group, version, kind.plural)
    async def take(event: kopf.RawEvent, **_: Any) -> None:
        PROCESS.feed.take(kind, event["type"], dict(event["object"]))


for _kind in (*OWNERS, *CHILDREN, CLAIM):
    _watch(_kind)
