"""A container's probes: a command that exits 0, or an HTTP answer below 400."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from trimtab.local.container import Place, Process, command, named_port
from trimtab.local.processes import start

Probe = Mapping[str, Any]
Ask = Callable[[Probe], Awaitable[str | None]]
"""One question: None when all is well, else what is wrong."""


async def verdicts(probe: Probe, ask: Ask) -> AsyncIterator[str | None]:
    """Each change of the probe's verdict, by its thresholds; the first answer that reaches one counts as a change."""
    await asyncio.sleep(probe.get("initialDelaySeconds", 0))
    said: bool | None = None
    former: bool | None = None
    row = 0
    while True:
        fault = await ask(probe)
        good = fault is None
        row = row + 1 if good is former else 1
        former = good
        if good is not said and row >= (probe.get("successThreshold", 1) if good else probe.get("failureThreshold", 3)):
            said = good
            yield fault
        await asyncio.sleep(probe.get("periodSeconds", 10))


def asker(process: Process, place: Place, container: Mapping[str, Any], result: Path) -> Ask:
    """Asks the probes of a container that runs as `process`; `result` is a file for a command's exit code."""

    async def ask(probe: Probe) -> str | None:
        seconds = probe.get("timeoutSeconds", 1)
        if action := probe.get("httpGet"):
            port = named_port(container, action["port"])
            return await _http(f"http://{place.address}:{port}{action.get('path', '/')}", seconds)
        return await _command(replace(process, command=command(probe["exec"]["command"], place)), result, seconds)

    return ask


async def _http(url: str, seconds: float) -> str | None:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=seconds)) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            return None if answer.status < 400 else f"{url}: HTTP {answer.status}"
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"{url}: {str(error) or 'no answer in time'}"


async def _command(process: Process, result: Path, seconds: float) -> str | None:
    child = await start(process, result=result)
    try:
        async with asyncio.timeout(seconds):
            ended = await child.ended()
    except TimeoutError:
        child.kill()
        await child.ended()
        return f"no answer in {seconds} s"
    finally:
        child.kill()
    return None if ended.exit_code == 0 else f"exit code {ended.exit_code}: {ended.output.strip()[-300:]}"
