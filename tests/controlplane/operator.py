"""The real operator as a process beside the control plane, with the chart's rights and under its policies."""

from __future__ import annotations

import http.client
import os
import signal
import sys
import time
from pathlib import Path
from typing import Self

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.controlplane.chart import install_rights_and_policies
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.process import Component, reserve_port

START_SECONDS = 120
"""How long the first list of everything may take: far more than it does, for busy machines."""


def grant(control_plane: ControlPlane, *chart: str) -> None:
    """Give the user `operator` what it may do; `chart`: options for Helm."""
    install_rights_and_policies(control_plane, *chart)


class Operator:
    """`python -m trimtab_operator` as the user `operator`; a context manager that starts and stops it.

    Attributes:
        identity: Names this replica; several may run at once.
        log: What it wrote, over all its starts.
    """

    def __init__(
        self,
        control_plane: ControlPlane,
        *,
        identity: str = "operator",
        kubeconfig: Path | None = None,
        chart: tuple[str, ...] = (),
        **settings: object,
    ) -> None:
        """Not started yet.

        Args:
            control_plane: Where it works.
            identity: Names this replica.
            kubeconfig: Of a proxy in front of the API server.
            chart: Options for Helm, which decide on its rights.
            settings: Fields of the operator's `Settings`.
        """
        self._chart = chart
        self.identity = identity
        self._kubeconfig = kubeconfig or control_plane.kubeconfig("operator")
        self._control_plane = control_plane
        self._settings = {"identity": identity, **settings}
        self._reservation = reserve_port()
        self._port = self._reservation.getsockname()[1]
        self._process: Component | None = None
        self.log = control_plane.root / "logs" / f"{identity}.log"

    def __enter__(self) -> Self:
        grant(self._control_plane, *self._chart)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops it, if it runs, in order: so the next one need not wait for the Lease."""
        if self._process is not None:
            self.stop()
        self._reservation.close()

    def start(self, *, leads: bool = True) -> None:
        """Starts it and waits until it has listed everything and, unless another replica does, leads.

        Raises:
            ClusterError: It ends, or is not ready after `START_SECONDS`; with the end of its log.
        """
        settings = {"metrics_port": self._port, **self._settings}
        environment = {
            **os.environ,
            "KUBECONFIG": str(self._kubeconfig),
            **{f"TRIMTAB_OPERATOR_{field.upper()}": str(value) for field, value in settings.items()},
        }
        process = Component("operator", [sys.executable, "-m", "trimtab_operator"], self.log, environment)
        self._process = process
        deadline = time.monotonic() + START_SECONDS
        while not (self._is_ready() and (self.leads() or not leads)):
            process.check()
            if time.monotonic() > deadline:
                process.fail(f"not ready after {START_SECONDS} s")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """`kill -9`; nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def stop(self) -> int:
        """SIGTERM, as a kubelet does; its exit status."""
        assert self._process is not None
        status = self._process.terminate()
        self._process = None
        return status

    def wait(self) -> int:
        """The exit status, once it has ended after a signal."""
        assert self._process is not None
        status = self._process.wait()
        self._process = None
        return status

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal and does not wait."""
        assert self._process is not None
        self._process.send_signal(number)

    def is_running(self) -> bool:
        """Whether the process that was started last has not ended."""
        if self._process is None:
            return False
        self._process.check()
        return True

    def leads(self) -> bool:
        """Whether it says that it may write."""
        try:
            return self.value("leader") == 1
        except (OSError, http.client.HTTPException):  # it does not run, or stands still
            return False

    def value(self, metric: str) -> float:
        """The value of a metric without labels, named without its prefix."""
        (sample,) = self.metrics()[f"trimtab_operator_{metric}"].samples
        return sample.value

    def metrics(self) -> dict[str, Metric]:
        """`/metrics`, parsed, by family."""
        return {family.name: family for family in text_string_to_metric_families(self._get("/metrics")[1])}

    def _is_ready(self) -> bool:
        try:
            return self._get("/readyz")[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()
