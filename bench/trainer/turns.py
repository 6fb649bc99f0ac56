"""A worker's side of the interleaving: it trains when it is told to, for so many steps, and says what they took."""

from __future__ import annotations

import json
import os
import sys
import time


class Turns:
    """Steps in turns; between them the process waits and uses no time."""

    def __init__(self, steps: int) -> None:
        """`steps`: of one turn. What the libraries print goes to standard error; standard output is the driver's."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._steps, self._done, self._tokens, self._sets = steps, 0, 0, 0
        self._clocks = (0.0, 0.0)

    def wait(self) -> None:
        """Until the driver gives the turn; ends the process when it has had enough."""
        print("ready", file=self._out, flush=True)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self._done = self._tokens = self._sets = 0
        self._clocks = (time.perf_counter(), time.process_time())

    def step_done(self, tokens: int, sets: int) -> None:
        """After each optimiser step: its input tokens without padding, and its texts, pairs or rankings."""
        self._done, self._tokens, self._sets = self._done + 1, self._tokens + tokens, self._sets + sets
        if self._done == self._steps:
            wall, cpu = time.perf_counter() - self._clocks[0], time.process_time() - self._clocks[1]
            told = {"wall": wall, "cpu": cpu, "tokens": self._tokens, "sets": self._sets}
            print(json.dumps(told), file=self._out, flush=True)
            self.wait()
