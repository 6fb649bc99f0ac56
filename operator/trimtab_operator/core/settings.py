"""What an administrator sets: read once from the environment, then passed on as a value."""

from __future__ import annotations

import os
import socket
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

POD_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ServiceAddress(StrEnum):
    """How a Service is addressed in a URL: by its DNS name, or by its cluster IP (local mode has no DNS)."""

    DNS = "dns"
    CLUSTER_IP = "clusterIP"


Cidr = Annotated[str, AfterValidator(lambda text: str(ip_network(text)))]


class Settings(BaseModel):
    """Everything that plans and loops may depend on besides the objects themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trainer_image: str = "trimtab-trainer:0.1.0"
    serving_image: str = "trimtab-serving:0.1.0"
    operator_version: str = "0.1.0"
    watch_namespaces: tuple[str, ...] = ()
    """Empty: all namespaces."""
    service_address: ServiceAddress = ServiceAddress.DNS
    cluster_domain: str = "cluster.local"
    """The cluster's DNS domain, for the URLs of endpoints."""
    workers: int = Field(default=16, ge=1, le=256)
    """Objects that are reconciled at the same time."""
    resync_seconds: float = Field(default=600, gt=0)
    """Between two complete lists, which find what the watches missed."""
    progress_poll_seconds: float = Field(default=10, gt=0)
    """Between two questions to one stage's `/progress`, and so between two progress writes."""
    complaint_seconds: float = Field(default=20, gt=0)
    """A child that does not get on for so long is asked about: the API's Events say why."""
    requests_per_second: float = Field(default=500, gt=0)
    """Requests to the API server, on average."""
    request_burst: int = Field(default=1000, ge=1)
    """Requests that may go out at once after a pause."""
    backoff_cap_seconds: float = Field(default=120, gt=0)
    """Longest wait before an object that failed is tried again."""
    stop_grace_seconds: int = Field(default=120, ge=1)
    """terminationGracePeriodSeconds of training pods: time to save a checkpoint."""
    metrics_port: int = 9464
    leader_election: bool = True
    """Off for a process that is the only one for sure; local mode has none."""
    lease_name: str = "trimtab-operator"
    """Of the Lease that the replicas hold in turn."""
    lease_namespace: str = "default"
    """By default the pod's own."""
    lease_duration_seconds: int = Field(default=10, ge=1)
    """How long others respect a Lease that is not renewed."""
    renew_deadline_seconds: float = Field(default=6, gt=0)
    """A leader whose last renewal is older than this ends its work."""
    retry_period_seconds: float = Field(default=1.5, gt=0)
    """Between two renewals, and between two looks of a replica that waits."""
    identity: str = ""
    """Names this replica in the Lease, in Events and to the audit log: by default the pod."""
    cpu_threads: int = Field(default=1, ge=1)
    """OMP_NUM_THREADS of a training process whose stage asks for no CPUs."""
    allow_file_uris: bool = False
    """`file:///` is for local mode only."""
    network_policies: bool = True
    """A NetworkPolicy for the pods of each job."""
    egress_cidrs: tuple[Cidr, ...] = ("0.0.0.0/0", "::/0")
    """Addresses that a job's pods may reach beside each other and DNS: models, data, object stores. Link-local ones,
    with the metadata services of clouds, are left out of wider ranges."""
    metrics_namespaces: tuple[str, ...] = ("monitoring",)
    """Namespaces whose pods, Prometheus above all, may read a training pod's `/metrics`."""
    queues: bool = True
    """A training Job with a `queueName` is created suspended, for Kueue to admit. Local mode, whose slots are the only
    queue, has nobody who would."""

    @model_validator(mode="after")
    def _lease_times(self) -> Self:
        if not self.retry_period_seconds < self.renew_deadline_seconds < self.lease_duration_seconds:
            raise ValueError(
                "retry_period_seconds < renew_deadline_seconds < lease_duration_seconds must hold; they are "
                f"{self.retry_period_seconds:g}, {self.renew_deadline_seconds:g} and {self.lease_duration_seconds}"
            )
        return self


_LISTS = [name for name, field in Settings.model_fields.items() if isinstance(field.default, tuple)]


def from_environment(environment: dict[str, str] | None = None) -> Settings:
    """Settings from `TRIMTAB_OPERATOR_<FIELD>` variables; lists are comma-separated."""
    source = os.environ if environment is None else environment
    values: dict[str, object] = {
        "lease_namespace": source.get("POD_NAMESPACE") or _pod_namespace(),
        "identity": source.get("POD_NAME") or socket.gethostname(),
    }
    for field in Settings.model_fields:
        raw = source.get(f"TRIMTAB_OPERATOR_{field.upper()}")
        if raw is not None:
            values[field] = tuple(part for part in raw.split(",") if part) if field in _LISTS else raw
    return Settings.model_validate(values)


def _pod_namespace() -> str:
    """The namespace of the pod that we run in; "default" outside of one."""
    try:
        return POD_NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"
