"""The contract of `Kube`, shown of local mode; tests/controlplane runs the same files against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.kube_contract.suite import *  # noqa: F403
from tests.kube_contract.support import Api, Recorder
from tests.kube_contract.workloads import *  # noqa: F403

from trimtab.local.addresses import Addresses
from trimtab.local.kube import LocalKube
from trimtab.local.kubelet import Kubelet
from trimtab.local.state import State
from trimtab.local.workdir import Workdir
from trimtab.local.workloads import Workloads


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    workdir = Workdir(tmp_path)
    addresses = Addresses(tmp_path, lambda: ())
    with workdir.lock() as lock:
        state = State(workdir.state)
        kube = LocalKube(state, addresses.take)
        recorder = Recorder()
        kube.subscribe(recorder)
        async with asyncio.TaskGroup() as tasks:
            kubelet = Kubelet(kube, workdir, addresses, lock, tasks)
            kubelet.begin()
            Workloads(kube, lambda _: True).begin()
            yield Api(kube, "contract", recorder)
            await kubelet.close()
        state.close()
