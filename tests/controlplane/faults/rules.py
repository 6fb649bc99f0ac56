"""What may go wrong between the operator and the API server: one class a fault, and rules that say when."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

Object = dict[str, Any]
READ = "GET"
WRITE = "POST|PATCH|PUT|DELETE"
ANY = f"{READ}|{WRITE}"


class Dropped(Exception):
    """The connection is to be closed without an answer."""


@dataclass(frozen=True)
class Answer:
    """What the proxy says in the API server's place."""

    code: int
    reason: str
    retry_after: int | None = None

    @property
    def status(self) -> Object:
        """The body."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": f"{HTTPStatus(self.code).phrase}, for a test",
        }


class Fault:
    """Passes everything on as it is; the others override what they disturb."""

    async def before(self) -> Answer | None:
        """Called before the request is carried out; an answer keeps it from the API server."""
        return None

    async def after(self) -> None:
        """Called when the API server has carried the request out, before the client hears of it."""

    async def frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The events of a watch, one line each."""
        async for frame in frames:
            yield frame


@dataclass(frozen=True)
class Refuse(Fault):
    """The request is answered with an error: 409, 429, 500, 503 …"""

    code: int
    reason: str
    retry_after: int | None = None

    async def before(self) -> Answer | None:
        return Answer(self.code, self.reason, self.retry_after)


@dataclass(frozen=True)
class Delay(Fault):
    """The request takes its time on the way there, and its answer on the way back."""

    seconds: float

    async def before(self) -> Answer | None:
        await asyncio.sleep(self.seconds)
        return None

    async def after(self) -> None:
        await asyncio.sleep(self.seconds)


@dataclass(frozen=True)
class DropBefore(Fault):
    """The connection breaks, and the request is not carried out."""

    async def before(self) -> Answer | None:
        raise Dropped


@dataclass(frozen=True)
class DropAfter(Fault):
    """The request is carried out, and the connection breaks before the answer."""

    async def after(self) -> None:
        raise Dropped


@dataclass(eq=False)
class Hang(Fault):
    """No answer, until the client has had enough or `release` is called: then the connection breaks.

    With `carried_out` the API server gets the request first.
    """

    carried_out: bool = False
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let go of what hangs."""
        self._released.set()

    async def before(self) -> Answer | None:
        if not self.carried_out:
            await self._hang()
        return None

    async def after(self) -> None:
        if self.carried_out:
            await self._hang()

    async def _hang(self) -> None:
        self.reached.set()
        await self._released.wait()
        raise Dropped


@dataclass(frozen=True)
class Truncate(Fault):
    """A watch ends in the middle of a frame, after so many whole ones."""

    whole: int

    async def frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        count = 0
        async for frame in frames:
            if count == self.whole:
                yield frame[: len(frame) // 2]
                raise Dropped
            count += 1
            yield frame


@dataclass(frozen=True)
class Expire(Fault):
    """A watch ends with a 410 in the stream, after so many frames."""

    whole: int

    async def frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        count = 0
        async for frame in frames:
            if count == self.whole:
                yield json.dumps({"type": "ERROR", "object": Answer(410, "Expired").status}).encode() + b"\n"
                return
            count += 1
            yield frame


@dataclass(frozen=True)
class Freeze(Fault):
    """A watch stays open and says nothing more, not even a bookmark; what happens meanwhile is lost to it."""

    async def frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for _ in frames:
            pass
        return
        yield b""


@dataclass(frozen=True)
class Swallow(Fault):
    """Some events of a watch are lost: between two states that are seen, those in between are not."""

    lost: Callable[[str, Object], bool]
    """Takes an event's type and object."""

    async def frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for frame in frames:
            event = json.loads(frame)
            if not self.lost(event["type"], event["object"]):
                yield frame


@dataclass
class Rule:
    """A fault, and the requests that it is for.

    Attributes:
        fault: What happens to them.
        method: A pattern for the whole method, such as `WRITE`.
        path: A pattern to be found in the path, such as `/jobs` or `/finetunejobs/[^/]+/status`.
        skip: So many matching requests pass first.
        times: So many are disturbed; None: all later ones.
        every: Of these, every so manieth.
        watches: Whether it is for watches, and for nothing else.
        hits: How many were disturbed.
    """

    fault: Fault
    method: str = ANY
    path: str = ""
    skip: int = 0
    times: int | None = None
    every: int = 1
    watches: bool = False
    hits: int = 0
    _seen: int = 0

    def takes(self, method: str, path: str, watch: bool) -> bool:
        """Whether this request is disturbed; counts it."""
        if watch != self.watches or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self._seen += 1
        due = self._seen > self.skip and (self._seen - self.skip - 1) % self.every == 0
        if not due or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True
