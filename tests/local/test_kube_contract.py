"""The contract of `Kube`, shown of local mode; tests/controlplane runs the same file against a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.kube_contract.suite import *  # noqa: F403
from tests.kube_contract.support import Api, Recorder
from trimtab.local.addresses import Addresses
from trimtab.local.kube import LocalKube
from trimtab.local.state import State


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    addresses = Addresses(tmp_path, lambda: ())
    state = State(tmp_path / "state.sqlite3")
    kube = LocalKube(state, addresses.take)
    recorder = Recorder()
    kube.subscribe(recorder)
    yield Api(kube, "contract", recorder)
    state.close()
