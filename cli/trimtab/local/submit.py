"""From manifests to objects of a working folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.local.cluster import Cluster
from trimtab.local.kube import LOCAL_KINDS
from trimtab.local.objects import is_true, key
from trimtab.manifests.load import Document, InvalidManifest
from trimtab_operator.core.errors import KubeError
from trimtab_operator.core.kube import CLAIM, FINETUNEJOB, Object

_MANAGER = "trimtab-local"
_CLAIM = re.compile(r"pvc://([a-z0-9][-a-z0-9.]*)")
_JOB = re.compile(r"job://([^/]+)/")


async def submit(cluster: Cluster, documents: Sequence[Document]) -> dict[str, str]:
    """Apply the manifests; what became of each object, by `kind name`: created, configured, restarted or unchanged.

    A job that failed before is made anew: what was wrong is mended by now, or will be told again.

    Raises:
        InvalidManifest: an object can't become what its manifest says, or names a job that is not there.
    """
    here = {key(document.obj) for document in documents if document.obj["kind"] == FINETUNEJOB.kind}
    here |= {key(job) for job in cluster.kube.select(FINETUNEJOB)}
    for document in documents:
        namespace = key(document.obj)[0]
        for name in _named(_JOB, document.obj.get("spec")):
            if (namespace, name) not in here:
                raise InvalidManifest(f"{document}: spec.model.uri: there is no FineTuneJob {name!r}; add its file")
    return {
        f"{document.obj['kind'].lower()} {document.obj['metadata']['name']}": await _apply(cluster, document)
        for document in documents
    }


async def _apply(cluster: Cluster, document: Document) -> str:
    obj = document.obj
    namespace, name = key(obj)
    for claim in _named(_CLAIM, obj.get("spec")):
        _make_claim(cluster, namespace, claim)
    before = cluster.kube.find(LOCAL_KINDS[obj["kind"]], namespace, name)
    if before and is_true(before, "Failed"):
        cluster.kube.drop(before)
    try:
        after = await cluster.kube.apply(obj, manager=_MANAGER)
    except KubeError as error:
        raise InvalidManifest(f"{document}: {error.message}") from error
    if before is None:
        return "created"
    if before["metadata"]["uid"] != after["metadata"]["uid"]:
        return "restarted"
    same = before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]
    return "unchanged" if same else "configured"


def _make_claim(cluster: Cluster, namespace: str, name: str) -> None:
    cluster.workdir.claim(namespace, name).mkdir(parents=True, exist_ok=True)
    if cluster.kube.find(CLAIM, namespace, name) is None:
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        metadata = {"name": name, "namespace": namespace}
        claim: Object = {"apiVersion": CLAIM.api_version, "kind": CLAIM.kind, "metadata": metadata, "spec": spec}
        cluster.kube.put(claim)


def _named(pattern: re.Pattern[str], value: Any) -> Iterator[str]:
    """What the pattern finds at the start of any string below `value`."""
    if isinstance(value, str):
        if match := pattern.match(value):
            yield match[1]
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _named(pattern, child)
