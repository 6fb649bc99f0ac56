"""What a working folder holds, read beside a run that may be going on."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from trimtab.local.kube import LOCAL_KINDS
from trimtab.local.objects import controller_uid
from trimtab.local.state import State
from trimtab.local.workdir import Workdir
from trimtab.manifests.admission import ADMISSIONS
from trimtab.table import AGE, COLUMNS, document, table
from trimtab_operator.core.kube import POD, Kind, Object
from trimtab_operator.core.names import LABEL_ENDPOINT, LABEL_JOB, label_value

_SHORT = {"po": "Pod", "deploy": "Deployment", "svc": "Service", "cm": "ConfigMap", "pvc": "PersistentVolumeClaim"}


class Absent(Exception):
    """What was asked for is not there; the message says what is."""


def get_text(root: Path, kind: str, name: str | None, namespace: str, output: str) -> str:
    """The objects as `kubectl get` prints them.

    Raises:
        Absent: no such folder, kind or object.
    """
    found = _kind(kind)
    objects = [obj for obj in _objects(root, found) if obj["metadata"]["namespace"] == namespace]
    if name is not None:
        objects = [obj for obj in objects if obj["metadata"]["name"] == name]
        if not objects:
            raise Absent(f'{found.plural} "{name}" not found in namespace {namespace}')
    if output in ("json", "yaml"):
        return document(objects, output, single=name is not None)
    if not objects:
        return f"No resources found in namespace {namespace}."
    admission = ADMISSIONS.get(found.kind)
    return table(objects, admission.columns if admission else COLUMNS.get(found.kind, [AGE]), wide=output == "wide")


def log_lines(root: Path, name: str, namespace: str, *, follow: bool) -> Iterator[str]:
    """The text of a pod's log, in pieces; with `follow` until the pod has ended.

    Raises:
        Absent: no such pod, nor anything of that name that has one.
    """
    workdir = Workdir(root)
    pod = _pod(root, name, namespace)
    path = workdir.log(namespace, pod["metadata"]["name"])
    if not path.exists():
        raise Absent(f"pod {pod['metadata']['name']} has not started: {pod['status'].get('phase')}")
    with path.open(encoding="utf-8", errors="replace") as log:
        while True:
            # Looked up before the read, so that nothing written before the end is missed.
            alive = follow and any(
                each["metadata"]["uid"] == pod["metadata"]["uid"] and each["status"]["phase"] == "Running"
                for each in _objects(root, POD)
            )
            yield log.read()
            if not alive:
                return
            time.sleep(0.5)


def _kind(word: str) -> Kind:
    for kind in LOCAL_KINDS.values():
        names = {kind.kind.lower(), kind.plural, *(ADMISSIONS[kind.kind].names if kind.kind in ADMISSIONS else ())}
        if word.lower() in names or _SHORT.get(word.lower()) == kind.kind:
            return kind
    known = ", ".join(sorted(kind.plural for kind in LOCAL_KINDS.values()))
    raise Absent(f"no kind {word!r}; there are {known}")


def _objects(root: Path, kind: Kind) -> list[Object]:
    workdir = Workdir(root)
    try:
        state = State(workdir.state, read_only=True)
    except sqlite3.OperationalError as error:
        raise Absent(f"{root}: no working folder; first run: trimtab local run FILE --workdir {root}") from error
    try:
        return [record.obj for ref, record in state.load() if ref.kind == kind.kind]
    finally:
        state.close()


def _pod(root: Path, name: str, namespace: str) -> Object:
    pods = [pod for pod in _objects(root, POD) if pod["metadata"]["namespace"] == namespace]
    for pod in pods:
        if pod["metadata"]["name"] == name:
            return pod
    owners = {
        obj["metadata"]["uid"]
        for kind in (LOCAL_KINDS["Job"], LOCAL_KINDS["Deployment"])
        for obj in _objects(root, kind)
        if obj["metadata"]["name"] == name and obj["metadata"]["namespace"] == namespace
    }
    owned = [pod for pod in pods if controller_uid(pod) in owners] or [pod for pod in pods if _belongs(pod, name)]
    if not owned:
        raise Absent(f'no pod "{name}" in namespace {namespace}; see: trimtab local get pods --workdir {root}')
    return max(owned, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def _belongs(pod: Object, name: str) -> bool:
    """Whether it is a pod of the FineTuneJob or the ModelEndpoint of that name."""
    labels = pod["metadata"].get("labels", {})
    return label_value(name) in (labels.get(LABEL_JOB), labels.get(LABEL_ENDPOINT))
