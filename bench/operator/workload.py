"""What the benchmark submits: jobs of one stage, in one namespace, with a claim that is bound beforehand."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.operator import grant

from trimtab_operator.core import credentials
from trimtab_operator.core.api_server import ApiServer, connect
from trimtab_operator.core.kube import Object

NAMESPACE = "bench"
CONCURRENCY = 16
"""Requests at once, of the bulk client and of the bare loop: as many as the operator has workers."""
PODS_A_NODE = 500
_UNBOUND = 1_000_000


def manifest(name: str) -> Object:
    """A FineTuneJob of one stage, as small as a real one can be."""
    model = {"config": {"model_type": "llama", "hidden_size": 64}, "tokenizer": {"train": {"vocabularySize": 512}}}
    return {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": model,
            "artifacts": {"uri": "pvc://bench/models"},
            "stages": [
                {
                    "name": "pretrain",
                    "pretrain": {"data": [{"uri": "pvc://bench/data.jsonl"}], "maxLength": 128},
                    "train": {"epochs": 1, "globalBatchSize": 8, "learningRate": 0.001},
                    "resources": {"limits": {"cpu": "50m", "memory": "64Mi"}},
                    "annotations": {"test.trimtab.dev/stages": "1"},
                }
            ],
        },
    }


def names(count: int, prefix: str = "job") -> list[str]:
    """Names of one length, so that every object has the same size."""
    return [f"{prefix}-{index:05}" for index in range(count)]


def prepare_cluster(control_plane: ControlPlane, jobs: int) -> None:
    """CRDs, the operator's rights, the namespace with its bound claim, and nodes for so many pods at once."""
    install_crds(control_plane)
    grant(control_plane)
    control_plane.add_nodes(3 + jobs // PODS_A_NODE)
    control_plane.kubectl("create", "namespace", NAMESPACE)
    size = {"storage": "1Gi"}
    claim = {"name": "bench", "namespace": NAMESPACE}
    shared = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    objects = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "bench"},
            "spec": {**shared, "capacity": size, "claimRef": claim, "hostPath": {"path": "/nowhere"}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": claim,
            "spec": {**shared, "volumeName": "bench", "resources": {"requests": size}},
        },
    ]
    control_plane.kubectl(
        "create", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    )
    inside = f"--namespace={NAMESPACE}"
    control_plane.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/bench", "--timeout=60s", inside)
    control_plane.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s", inside)


async def submit(kube: ApiServer, name: str) -> Object:
    """Create one job."""
    return await kube.create(manifest(name), manager="bench")


@asynccontextmanager
async def client(kubeconfig: Path) -> AsyncIterator[ApiServer]:
    """The operator's own client class, without its bound on requests a second."""
    os.environ["KUBECONFIG"] = str(kubeconfig)
    async with connect(await credentials.load(), requests_per_second=_UNBOUND, burst=_UNBOUND) as kube:
        yield kube


async def at_once(work: Iterable[Callable[[], Awaitable[object]]], bound: int = CONCURRENCY) -> None:
    """Do all of it, in order, `bound` pieces at a time."""
    pieces = iter(work)

    async def worker() -> None:
        for piece in pieces:
            await piece()

    async with asyncio.TaskGroup() as group:
        for _ in range(bound):
            group.create_task(worker())
