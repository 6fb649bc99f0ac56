"""The command line and environment of `torchrun`. Pure, but for finding a free port."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from trimtab_trainer.config import NODE_RANK_VARIABLE, RENDEZVOUS_VARIABLE, TrainConfig
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.supervisor.processes import PARENT_VARIABLE
from trimtab_trainer.supervisor.run_folder import MEASUREMENT_VARIABLE, RESUME_STEP_VARIABLE, RUN_FOLDER_VARIABLE

WORKER_MODULE = "trimtab_trainer.engine.worker"
LOOPBACK = "127.0.0.1"


def node_rank(environ: Mapping[str, str], nodes: int) -> int:
    """Index of this pod, from 0; `BadConfiguration` where the Job and the stage's file disagree."""
    value = environ.get(NODE_RANK_VARIABLE, "0")
    if not value.isdecimal() or int(value) >= nodes:
        raise BadConfiguration(
            f"{NODE_RANK_VARIABLE}={value!r}: expected 0 to {nodes - 1}, since the stage has {nodes} nodes"
        )
    return int(value)


def rendezvous(environ: Mapping[str, str], nodes: int) -> tuple[str, int]:
    """Host and port at which the nodes meet; a free local port for a single node that names none."""
    endpoint = environ.get(RENDEZVOUS_VARIABLE)
    if endpoint:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdecimal():
            raise BadConfiguration(f"{RENDEZVOUS_VARIABLE}={endpoint!r}: expected HOST:PORT")
        return host, int(port)
    if nodes > 1:
        raise BadConfiguration(
            f"{RENDEZVOUS_VARIABLE} is not set, but the stage has {nodes} nodes; set it to HOST:PORT of pod 0"
        )
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return LOOPBACK, int(probe.getsockname()[1])


def torchrun_command(config: TrainConfig, config_file: Path, rank: int, endpoint: tuple[str, int]) -> list[str]:
    """The argument list; no shell sees it."""
    host, port = endpoint
    return [
        sys.executable,
        "-m",
        "trimtab_trainer.supervisor.torchrun",
        f"--nnodes={config.nodes}",
        f"--nproc-per-node={config.processes_per_node}",
        f"--node-rank={rank}",
        "--rdzv-backend=static",
        f"--rdzv-id={config.job.uid}-{config.stage}-{config.attempt}",
        f"--rdzv-endpoint={host}:{port}",
        f"--master-addr={host}",
        f"--master-port={port}",
        "--max-restarts=0",
        "--module",
        WORKER_MODULE,
        str(config_file),
    ]


def torchrun_environment(
    environ: Mapping[str, str],
    config: TrainConfig,
    run_folder: Path,
    resume_step: int | None,
    measurement: Path | None = None,
) -> dict[str, str]:
    """This process's environment and what the training processes need beside it."""
    added = {
        PARENT_VARIABLE: str(os.getpid()),
        RUN_FOLDER_VARIABLE: str(run_folder),
        "OMP_NUM_THREADS": str(config.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # DeepSpeed loads its checkpoints as free pickles
    }
    if resume_step is not None:
        added[RESUME_STEP_VARIABLE] = str(resume_step)
    if measurement is not None:
        added[MEASUREMENT_VARIABLE] = str(measurement)
    kept = {name: value for name, value in environ.items() if name != RESUME_STEP_VARIABLE}
    return {**kept, **added}
