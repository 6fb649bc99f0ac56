"""The objects of an endpoint: for each revision a ConfigMap with its JSON and a Deployment; one Service."""

from __future__ import annotations

import hashlib

from trimtab_operator.api.modelendpoint import ModelEndpoint, Revision
from trimtab_operator.core import podtemplate
from trimtab_operator.core.kube import CONFIGMAP, DEPLOYMENT, SERVICE, Kind, Object
from trimtab_operator.core.names import (
    COMPONENT_SERVE,
    LABEL_COMPONENT,
    LABEL_ENDPOINT,
    LABEL_MANAGED_BY,
    LABEL_REVISION,
    MANAGED_BY,
    child_name,
    label_value,
)
from trimtab_operator.core.settings import ServiceAddress, Settings
from trimtab_serving.config import DEFAULT_PORT, EndpointIdentity, Engine, ServeConfig
from trimtab_trainer.config import (
    LISTEN_ADDRESS_VARIABLE,
    TERMINATION_LOG_VARIABLE,
    VOLUMES_VARIABLE,
    Artifact,
    dump,
)

CONFIG_FILE = "serve.json"
PRE_STOP_SECONDS = 15
"""The pod leaves the Service's endpoints while it still takes requests."""
_SPARE_SECONDS = 15
_PROBE_SECONDS = 30
_START_TRIES = 240
"""Every 5 s: 20 minutes to verify and load a model."""


def serve_config(obj: Object, endpoint: ModelEndpoint, revision: Revision) -> ServeConfig:
    """The revision's JSON."""
    engine = endpoint.spec.engine
    return ServeConfig(
        endpoint=EndpointIdentity(namespace=obj["metadata"]["namespace"], name=obj["metadata"]["name"]),
        revision=revision.revision,
        served_model_name=endpoint.spec.served_model_name,
        model=Artifact(uri=revision.uri, digest=revision.digest),
        engine=Engine.model_validate(engine.model_dump(exclude_none=True) if engine else {}),
    )


def config_map(obj: Object, endpoint: ModelEndpoint, revision: Revision) -> Object:
    """Immutable, and named by its content: a changed option makes a new one, and with it new pods."""
    text = dump(serve_config(obj, endpoint, revision))
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {
        **_child(CONFIGMAP, obj, _name(obj, revision, fingerprint), _labels(obj, revision)),
        "immutable": True,
        "data": {CONFIG_FILE: text},
    }


def deployment(obj: Object, endpoint: ModelEndpoint, revision: Revision, settings: Settings) -> Object:
    """The pods of one revision."""
    spec = endpoint.spec
    config = serve_config(obj, endpoint, revision)
    labels = _labels(obj, revision)
    claim = podtemplate.claim_of(revision.uri)
    volumes, mounts, table = podtemplate.claims({claim: True} if claim else {})
    path = f"{podtemplate.CONFIG_PATH}/{CONFIG_FILE}"
    health = {"path": "/health", "port": "http", "scheme": "HTTP"}
    container = podtemplate.container(
        "vllm",
        spec.image or settings.serving_image,
        ["python", "-m", "trimtab_serving", path],
        mounts,
        env=podtemplate.environment(
            {
                VOLUMES_VARIABLE: table,
                TERMINATION_LOG_VARIABLE: podtemplate.TERMINATION_LOG,
                LISTEN_ADDRESS_VARIABLE: podtemplate.POD_IP,
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
            },
            spec,
        ),
        ports=[{"name": "http", "containerPort": DEFAULT_PORT, "protocol": "TCP"}],
        resources=podtemplate.resources(spec.resources),
        startupProbe={
            "exec": {"command": ["python", "-m", "trimtab_serving.probe", path]},
            "periodSeconds": 5,
            "timeoutSeconds": _PROBE_SECONDS,
            "failureThreshold": _START_TRIES,
        },
        readinessProbe={"httpGet": health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
        livenessProbe={"httpGet": health, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        lifecycle={"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
    )
    template = podtemplate.template(
        spec,
        labels=labels,
        config_map=config_map(obj, endpoint, revision)["metadata"]["name"],
        container=container,
        volumes=volumes,
        grace_seconds=PRE_STOP_SECONDS + config.shutdown_seconds + _SPARE_SECONDS,
    )
    return {
        **_child(DEPLOYMENT, obj, _name(obj, revision), labels),
        "spec": {
            "replicas": spec.replicas,
            "revisionHistoryLimit": 1,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": selector(obj, revision.revision)},
            "template": template,
        },
    }


def service(obj: Object, revision: Revision) -> Object:
    """The stable address; it selects one revision."""
    labels = {key: value for key, value in _labels(obj, revision).items() if key != LABEL_REVISION}
    return {
        **_child(SERVICE, obj, obj["metadata"]["name"], labels),
        "spec": {
            "type": "ClusterIP",
            "selector": selector(obj, revision.revision),
            "ports": [{"name": "http", "port": DEFAULT_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def selector(obj: Object, revision: str) -> dict[str, str]:
    """Labels of a revision's pods."""
    return {LABEL_ENDPOINT: label_value(obj["metadata"]["name"]), LABEL_REVISION: revision}


def url(obj: Object, cluster_ip: str | None, settings: Settings) -> str | None:
    """Base URL of the OpenAI API, as its clients want it: with /v1. None while the address is not known."""
    if cluster_ip is None:
        return None
    if settings.service_address is ServiceAddress.CLUSTER_IP:
        host = f"[{cluster_ip}]" if ":" in cluster_ip else cluster_ip
    else:
        host = f"{obj['metadata']['name']}.{obj['metadata']['namespace']}.svc.{settings.cluster_domain}"
    return f"http://{host}:{DEFAULT_PORT}/v1"


def _name(obj: Object, revision: Revision, *parts: str) -> str:
    return child_name(obj["metadata"]["name"], obj["metadata"]["uid"], revision.revision, *parts)


def _child(kind: Kind, obj: Object, name: str, labels: dict[str, str]) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": obj["metadata"]["namespace"],
            "labels": labels,
            "ownerReferences": [podtemplate.owner_reference(obj)],
        },
    }


def _labels(obj: Object, revision: Revision) -> dict[str, str]:
    return {
        **selector(obj, revision.revision),
        LABEL_COMPONENT: COMPONENT_SERVE,
        LABEL_MANAGED_BY: MANAGED_BY,
    }
