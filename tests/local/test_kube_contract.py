"""The contract of `Kube`, shown of local mode; tests/controlplane runs the same files against a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.kube_contract.suite import *  # noqa: F403
from tests.kube_contract.support import Api, Recorder
from tests.kube_contract.workloads import *  # noqa: F403
from tests.local.node import node


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with node(tmp_path) as running:
        recorder = Recorder()
        running.kube.subscribe(recorder)
        yield Api(running.kube, "contract", recorder)
