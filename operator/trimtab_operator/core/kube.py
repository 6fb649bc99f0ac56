"""What the operator needs of a Kubernetes API, and nothing more.

Two implementations: `core.api_server.ApiServer` (aiohttp) and the in-memory one of local mode; one contract suite runs
against both. Objects are plain JSON dictionaries. `Kube` does not watch: `Feed` is the source of events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from trimtab_operator.api.base import GROUP, VERSION

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A namespaced API resource."""

    api_version: str
    kind: str
    plural: str

    @property
    def path(self) -> str:
        """URL prefix: `/api/v1` for the core group, `/apis/GROUP/VERSION` else."""
        return f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"


FINETUNEJOB = Kind(f"{GROUP}/{VERSION}", "FineTuneJob", "finetunejobs")
MODELENDPOINT = Kind(f"{GROUP}/{VERSION}", "ModelEndpoint", "modelendpoints")
JOB = Kind("batch/v1", "Job", "jobs")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
POD = Kind("v1", "Pod", "pods")
SERVICE = Kind("v1", "Service", "services")
CONFIGMAP = Kind("v1", "ConfigMap", "configmaps")
CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
NETWORKPOLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
EVENT = Kind("events.k8s.io/v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")

OWNERS = (FINETUNEJOB, MODELENDPOINT)
CHILDREN = (JOB, DEPLOYMENT, POD, SERVICE, CONFIGMAP, NETWORKPOLICY)
"""Kinds that are watched by label and kept in the store, beside the owners and `CLAIM`."""
KINDS = {kind.kind: kind for kind in (*OWNERS, *CHILDREN, CLAIM, EVENT, LEASE)}


def kind_of(obj: Object) -> Kind:
    """The `Kind` of an object; KeyError for a kind that Trimtab does not know."""
    return KINDS[obj["kind"]]


@dataclass(frozen=True, order=True, slots=True)
class Ref:
    """Names one object: what the work queue and the store are keyed by."""

    kind: str
    namespace: str
    name: str


def ref_of(obj: Object) -> Ref:
    """The reference of an object."""
    return Ref(obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"])


class Kube(Protocol):
    """Reads and writes. Every method raises `core.errors.KubeError` or a subclass."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The live object; None where there is none."""

    async def list_objects(
        self,
        kind: Kind,
        *,
        namespace: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> list[Object]:
        """Live objects, each with `apiVersion` and `kind`. A label value of None asks for its presence.

        `fields`: path to value, of those by which the kind can be selected.
        """

    async def list_metadata(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        """As `list_objects`, with `metadata` only: what the periodic diff against the store needs."""

    async def create(self, obj: Object, *, manager: str) -> Object:
        """POST; `AlreadyExists` where the name is taken."""

    async def apply(self, obj: Object, *, manager: str) -> Object:
        """Server-side apply with force. A given `metadata.resourceVersion` or `uid` is a precondition (`Conflict`)."""

    async def apply_status(self, obj: Object, *, manager: str) -> Object:
        """Server-side apply to the status subresource with force; `NotFound` where the object is gone.

        A given `metadata.resourceVersion` is a precondition (`Conflict`); a uid is not.
        """

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> None:
        """Delete with background propagation. A missing object is success; another uid or version is `Conflict`."""


class Change(StrEnum):
    """What happened to an object."""

    UPSERT = "UPSERT"
    DELETE = "DELETE"


Sink = Callable[[Change, Object], None]
"""Takes each event, in order per object; must not block."""


class Feed(Protocol):
    """The source of events of `OWNERS`, `CHILDREN` and `CLAIM`: kopf on a cluster, the in-memory API locally."""

    def subscribe(self, sink: Sink) -> None:
        """Deliver every later event to `sink`."""
