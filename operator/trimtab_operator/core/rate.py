"""A token bucket: so many requests a second on average, so many at once."""

from __future__ import annotations

import asyncio


class TokenBucket:
    """Lets `rate` callers a second through, and `burst` at once after a pause; the others wait in order."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled_at: float | None = None
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Wait for a token."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            self._fill(loop.time())
            while self._tokens < 1:
                await asyncio.sleep((1 - self._tokens) / self._rate)
                self._fill(loop.time())
            self._tokens -= 1

    def _fill(self, now: float) -> None:
        elapsed = now - self._filled_at if self._filled_at is not None else 0.0
        self._tokens = min(self._burst, self._tokens + elapsed * self._rate)
        self._filled_at = now
