"""Progress: asks the running training pods, outside the workers; a pod that can't be reached fails nothing."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable

import aiohttp
import structlog
from pydantic import ValidationError

from trimtab_operator.core.controller import Reader
from trimtab_operator.core.kube import FINETUNEJOB, Ref
from trimtab_operator.core.rate import TokenBucket
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob.board import ProgressBoard, Target
from trimtab_operator.finetunejob.network import PROGRESS_PORT
from trimtab_trainer.config import Progress

TIMEOUT_SECONDS = 2.0
_LONGEST_ANSWER = 65_536
_AT_ONCE = 64
_PER_SECOND = 50
"""Thousands of running stages are asked less often, rather than let the asking fill the loop."""

log = structlog.stdlib.get_logger(__name__)


class ProgressPoller:
    """A companion of the runtime: polls every `settings.progress_poll_seconds`, and wakes owners with news.

    With more stages than can be asked in that time, a round takes longer.
    """

    def __init__(self, board: ProgressBoard, settings: Settings) -> None:
        self._board = board
        self._settings = settings
        self._bucket = TokenBucket(_PER_SECOND, _AT_ONCE)

    async def run(self, reader: Reader, wake: Callable[[Ref], None]) -> None:
        """Poll until cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                await asyncio.sleep(self._settings.progress_poll_seconds)
                gone = [
                    owner
                    for owner in self._board.owners()
                    if reader.get(FINETUNEJOB, owner.namespace, owner.name) is None
                ]
                for owner in gone:
                    self._board.forget(owner)
                await self.poll(session, wake)

    async def poll(self, session: aiohttp.ClientSession, wake: Callable[[Ref], None]) -> None:
        """Ask every target once, a few at a time, and wake the owners that have news."""
        asked = [(owner, target) for owner in self._board.owners() for target in self._board.targets(owner)]
        for start in range(0, len(asked), _AT_ONCE):
            some = asked[start : start + _AT_ONCE]
            answers = await asyncio.gather(*(self._ask(session, target) for _, target in some))
            for (owner, target), answer in zip(some, answers, strict=True):
                if answer is not None and self._board.put(target, answer):
                    wake(owner)

    async def _ask(self, session: aiohttp.ClientSession, target: Target) -> Progress | None:
        await self._bucket.take()
        try:
            async with session.get(url_of(target.address), allow_redirects=False) as response:
                if response.status != 200:
                    return None
                body = b""
                async for chunk in response.content.iter_chunked(4096):
                    body += chunk
                    if len(body) > _LONGEST_ANSWER:
                        return None
            return Progress.model_validate_json(body)
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError, ValueError) as error:
            log.debug("no progress", stage=target.stage, address=target.address, reason=repr(error))
            return None


def url_of(address: str) -> str:
    """Where a pod answers; ValueError where the address is no IP address."""
    ip = ipaddress.ip_address(address)
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    return f"http://{host}:{PROGRESS_PORT}/progress"
