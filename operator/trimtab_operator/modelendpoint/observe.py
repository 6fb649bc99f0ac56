"""Everything that the plan of a ModelEndpoint depends on, read from the store into frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from trimtab_operator.api.base import parsed
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.modelendpoint import ModelEndpoint
from trimtab_operator.core.controller import Reader
from trimtab_operator.core.kube import CONFIGMAP, DEPLOYMENT, FINETUNEJOB, POD, SERVICE, Object, ref_of
from trimtab_operator.core.names import LABEL_ENDPOINT, LABEL_REVISION, label_value
from trimtab_operator.core.pods import PodView, pod_view
from trimtab_operator.core.refusals import Refusal


@dataclass(frozen=True)
class DeploymentView:
    """The Deployment of one revision."""

    name: str
    uid: str
    version: str
    revision: str
    config_map: str = ""
    """What its pods read."""
    replicas: int = 0
    """Pods, old and new."""
    ready: int = 0
    rolled_out: bool = False
    """Every replica that it asks for runs its newest template and is ready."""
    refused: str = ""
    """Why its pods can't be created, in the API server's words."""
    deleting: bool = False


@dataclass(frozen=True)
class Observation:
    """What exists now."""

    deployments: Mapping[str, DeploymentView] = field(default_factory=dict)
    """Revision to its Deployment."""
    pods: tuple[PodView, ...] = ()
    config_maps: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Name to uid and version."""
    cluster_ip: str | None = None
    """Of the Service; None while there is none."""
    selected: str | None = None
    """Revision that the Service selects."""
    source: FineTuneJob | None = None
    """The job that `model.uri` names by job://."""
    refusal: Refusal | None = None


def source_of(uri: str) -> tuple[str, str] | None:
    """Job and stage of a `job://name/stage` URI; None for another."""
    if not uri.startswith("job://"):
        return None
    parts = urlsplit(uri)
    return parts.netloc, parts.path.strip("/")


def observe(reader: Reader, obj: Object, endpoint: ModelEndpoint) -> Observation:
    """Read all of it; local memory only."""
    name, namespace, uid = (obj["metadata"][key] for key in ("name", "namespace", "uid"))
    service = next(iter(reader.owned(SERVICE, namespace, uid)), None)
    source = source_of(endpoint.spec.model.uri)
    job = reader.get(FINETUNEJOB, namespace, source[0]) if source else None
    views = [_deployment_view(child) for child in reader.owned(DEPLOYMENT, namespace, uid)]
    return Observation(
        deployments={view.revision: view for view in views},
        pods=tuple(pod_view(pod) for pod in reader.labelled(POD, namespace, LABEL_ENDPOINT, label_value(name))),
        config_maps={
            child["metadata"]["name"]: (child["metadata"]["uid"], child["metadata"]["resourceVersion"])
            for child in reader.owned(CONFIGMAP, namespace, uid)
        },
        cluster_ip=service["spec"].get("clusterIP") if service else None,
        selected=service["spec"].get("selector", {}).get(LABEL_REVISION) if service else None,
        source=parsed(FineTuneJob, job),
        refusal=reader.refusal(ref_of(obj)),
    )


def _deployment_view(deployment: Object) -> DeploymentView:
    metadata, status = deployment["metadata"], deployment.get("status", {})
    wanted, template = deployment["spec"].get("replicas", 1), deployment["spec"]["template"]["spec"]
    return DeploymentView(
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata["resourceVersion"],
        revision=(metadata.get("labels") or {}).get(LABEL_REVISION, ""),  # a person may have taken the label away
        config_map=next((v["configMap"]["name"] for v in template.get("volumes") or [] if "configMap" in v), ""),
        replicas=status.get("replicas", 0),
        ready=status.get("readyReplicas", 0),
        rolled_out=status.get("observedGeneration", 0) >= metadata.get("generation", 0)
        and status.get("replicas", 0) == status.get("updatedReplicas", 0) == status.get("readyReplicas", 0) == wanted,
        refused=next(
            (c.get("message", "") for c in status.get("conditions") or [] if c["type"] == "ReplicaFailure"), ""
        ),
        deleting="deletionTimestamp" in metadata,
    )
