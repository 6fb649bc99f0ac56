"""The operator's process on a cluster: what it is made of, in which order it begins and ends."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import uuid
from collections.abc import Coroutine
from contextlib import AsyncExitStack

import structlog

from trimtab_operator.core import credentials
from trimtab_operator.core.api_server import connect
from trimtab_operator.core.leader import Elector, Timing, alone
from trimtab_operator.core.metrics import Metrics
from trimtab_operator.core.probes import serve
from trimtab_operator.core.runtime import WATCHED, Runtime
from trimtab_operator.core.settings import Settings
from trimtab_operator.core.trim import trim
from trimtab_operator.core.waiting import cancelled
from trimtab_operator.core.watchdog import watchdog
from trimtab_operator.kinds import kinds
from trimtab_operator.main import KopfFeed, Watches

_LEASE_REQUESTS_PER_SECOND = 10.0
_SWITCH_SECONDS = 0.001
"""For so long kopf's thread may keep the loop from going on; Python's default of 5 ms, paid at each system call while
both are busy, would be most of the time of a request."""

_GARBAGE_THRESHOLDS = (10_000, 20, 20)
"""Python's own (700, 10, 10) would search for cycles among the objects of a burst again and again; there are few."""

log = structlog.stdlib.get_logger(__name__)


async def run(settings: Settings) -> None:
    """List everything, watch, and work whenever this replica leads, until SIGTERM or SIGINT.

    Raises:
        CredentialsError: There is no access to a cluster.
        OSError: The port of the probes is in use.
        WorkEnded: A part of the work ended by itself.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    # The pod's name alone would not do: a container that is started again is another process.
    identity = f"{settings.identity}_{uuid.uuid4().hex[:8]}"
    user_agent = f"trimtab-operator/{settings.operator_version} ({identity})"
    found = await credentials.load()
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        # Of its own: no burst of the workers may delay a renewal.
        leases = await stack.enter_async_context(
            connect(
                found,
                requests_per_second=_LEASE_REQUESTS_PER_SECOND,
                burst=int(_LEASE_REQUESTS_PER_SECOND),
                observe=metrics.observe_request,
                user_agent=user_agent,
                read_attempts=1,
            )
        )
        elector = Elector(
            leases,
            name=settings.lease_name,
            namespace=settings.lease_namespace,
            identity=identity,
            # Uninstalling removes the service account, and with it the Lease; nobody can create it again.
            owner=await found.service_account(settings.lease_namespace),
            timing=Timing(
                settings.lease_duration_seconds, settings.renew_deadline_seconds, settings.retry_period_seconds
            ),
        )
        elects = settings.leader_election
        kube = await stack.enter_async_context(
            connect(
                found,
                requests_per_second=settings.requests_per_second,
                burst=settings.request_burst,
                observe=metrics.observe_request,
                user_agent=user_agent,
                fence=elector.check if elects else lambda: None,
                keep=trim,
            )
        )
        controllers, companions = kinds(kube, settings)
        feed = KopfFeed(lambda: runtime.suspect(), len(WATCHED) * max(1, len(settings.watch_namespaces)))
        runtime = Runtime(kube, feed, controllers, settings, companions=companions, metrics=metrics)
        metrics.show_leadership(
            lambda: elector.leading if elects else runtime.workers.working, lambda: elector.transitions
        )
        await stack.enter_async_context(
            serve(settings.metrics_port, metrics, unhealthy=runtime.unhealthy, ready=lambda: runtime.synced)
        )
        await stack.enter_async_context(watchdog(settings.renew_deadline_seconds, lambda: elector.at_work))
        stack.push_async_callback(runtime.stop)
        if not await _unless(stop, runtime.start()):
            return
        watches = Watches(feed, settings.watch_namespaces, metrics.watch_restarts.inc)
        watches.start()
        stack.push_async_callback(watches.stop)
        # What changed between the lists and the watches, before anyone counts on the store.
        if not await _unless(stop, feed.listening()) or not await _unless(stop, runtime.compare()):
            return
        # What is in the store by now has no cycles: hundreds of thousands of objects that need no search for any.
        gc.collect()
        gc.freeze()
        await (elector.run(runtime.workers, stop) if elects else alone(runtime.workers, stop))


async def _unless(stop: asyncio.Event, start: Coroutine[object, object, None]) -> bool:
    """Run something to its end, unless told to stop before; whether it came to its end."""
    starting = asyncio.create_task(start)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    ended = starting.done()
    await cancelled(starting, stopping)
    if ended:
        starting.result()
    return ended
