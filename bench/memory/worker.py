"""One process of a stage whose memory is measured: `python -m bench.memory.worker STAGE.json RESULT.json`.

The peak is counted from the process's size after all imports. The kernel's high-water mark is reset there and at
the begin of each phase, so the result tells which phase needs most.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.engine import checkpoint, loop, ppo, setup, train
from trimtab_trainer.engine.memory import HostMemory
from trimtab_trainer.supervisor import processes
from trimtab_trainer.supervisor.run_folder import RunFolder


class Phases:
    """The peak of each phase, in bytes above the size after imports."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._start = self._memory.used()
        self._now = "load"
        self.peaks: dict[str, int] = {}
        self.rests: dict[str, int] = {}
        self._memory.reset()

    def enter(self, name: str) -> str:
        """Begin a phase; returns the one before."""
        before = self._now
        self.peaks[before] = max(self.peaks.get(before, 0), self._memory.peak() - self._start)
        self.rests[before] = self._memory.used() - self._start
        self._now = name
        self._memory.reset()
        return before

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """A call of this function is a phase."""
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self.enter(before)

        setattr(owner, name, outer)


def main() -> None:
    """Train the stage and write what its phases took."""
    processes.keep_freed_memory()
    config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
    phases = Phases()
    phases.wrap(setup.Engine, "__init__", "engine")
    phases.wrap(setup.Engine, "backward", "backward")
    phases.wrap(setup.Engine, "step", "update")
    for each in (loop.Loop, ppo.PpoLoop):
        phases.wrap(each, "step", "step")
        phases.wrap(each, "validate", "validate")
    phases.wrap(checkpoint, "save", "save")
    phases.wrap(train, "publish_result", "publish")
    with tempfile.TemporaryDirectory() as folder:
        train.train(config, RunFolder(Path(folder)), lambda: False)
    phases.enter("end")
    Path(sys.argv[2]).write_text(json.dumps({"peaks": phases.peaks, "rests": phases.rests}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
