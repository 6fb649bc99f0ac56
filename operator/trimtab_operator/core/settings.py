"""What an administrator sets: read once from the environment, then passed on as a value."""

from __future__ import annotations

import os
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class ServiceAddress(StrEnum):
    """How a Service is addressed in a URL: by its DNS name, or by its cluster IP (local mode has no DNS)."""

    DNS = "dns"
    CLUSTER_IP = "clusterIP"


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
    workers: int = Field(default=16, ge=1, le=256)
    resync_seconds: float = Field(default=600, gt=0)
    progress_poll_seconds: float = Field(default=10, gt=0)
    """Between two questions to one stage's `/progress`, and so between two progress writes."""
    complaint_seconds: float = Field(default=20, gt=0)
    """A child that does not get on for so long is asked about: the API's Events say why."""
    requests_per_second: float = Field(default=500, gt=0)
    request_burst: int = Field(default=1000, ge=1)
    backoff_cap_seconds: float = Field(default=120, gt=0)
    stop_grace_seconds: int = Field(default=120, ge=1)
    """terminationGracePeriodSeconds of training pods: time to save a checkpoint."""
    metrics_port: int = 9464
    cpu_threads: int = Field(default=1, ge=1)
    """OMP_NUM_THREADS of a training process whose stage asks for no CPUs."""
    allow_file_uris: bool = False
    """`file:///` is for local mode only."""
    queues: bool = True
    """A training Job with a `queueName` is created suspended, for Kueue to admit. Local mode, whose slots are the only
    queue, has nobody who would."""


def from_environment(environment: dict[str, str] | None = None) -> Settings:
    """Settings from `TRIMTAB_OPERATOR_<FIELD>` variables; lists are comma-separated."""
    source = os.environ if environment is None else environment
    values: dict[str, object] = {}
    for field in Settings.model_fields:
        raw = source.get(f"TRIMTAB_OPERATOR_{field.upper()}")
        if raw is not None:
            values[field] = tuple(part for part in raw.split(",") if part) if field == "watch_namespaces" else raw
    return Settings.model_validate(values)
