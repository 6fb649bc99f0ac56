"""The process group, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

COLLECTIVE_TIMEOUT = timedelta(hours=24)
"""A hang is the supervisor's to end, by the stage's own deadline; torch's 30 minutes would cut a long save short."""


class Group:
    """All training processes of the stage."""

    def __init__(self) -> None:
        """Join, with NCCL where this process has a GPU of its own and gloo elsewhere."""
        local_rank = int(os.environ["LOCAL_RANK"])
        self.is_first_of_pod = local_rank == 0
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        import deepspeed.ops

        # DeepSpeed would compile this optional kernel at start; the image has no compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False
        )
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Sum of each value over all processes, in fp64."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def max(self, value: float) -> float:
        """Largest value of all processes, in fp64."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def largest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Largest of each value over all processes."""
        shared = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        found: NDArray[np.float32] = shared.cpu().numpy()
        return found

    def broadcast(self, value: int) -> int:
        """Rank 0's value."""
        shared = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(0.0)
