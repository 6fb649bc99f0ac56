"""What the tests do with jobs on the control plane: give them volumes, submit them, look at what became of them."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.controlplane.cluster import ControlPlane

from trimtab.manifests.load import load

Object = dict[str, Any]

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
PATIENCE_SECONDS = 120
"""How long something that must happen may take: far more than it does, for busy machines."""


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true answer; AssertionError where there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not so after {seconds} s"
        time.sleep(0.05)
    return answer


class Space:
    """A namespace in which jobs run, with the claim of the quickstart bound to a volume."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.control_plane = control_plane
        self.namespace = namespace

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """kubectl in this namespace; its output."""
        return self.control_plane.kubectl(*arguments, f"--namespace={self.namespace}", stdin=stdin).stdout

    def get(self, *arguments: str) -> Object:
        """`kubectl get` in this namespace, parsed."""
        return self.control_plane.get(*arguments, f"--namespace={self.namespace}")

    def items(self, kind: str, **labels: str) -> list[Object]:
        """The objects of a kind, by name; `labels` by the last part of their key, e.g. `job` for `trimtab.dev/job`."""
        selector = ",".join(f"trimtab.dev/{key}={value}" for key, value in labels.items())
        found = self.get(kind, f"--selector={selector}")["items"]
        return sorted(found, key=lambda item: item["metadata"]["name"])

    def names(self, kind: str, **labels: str) -> list[str]:
        """The names of `items`."""
        return [item["metadata"]["name"] for item in self.items(kind, **labels)]

    def provide_claim(self) -> None:
        """The quickstart's claim, bound to a volume beforehand as an administrator would."""
        claim = read(QUICKSTART / "claim.yaml", self.namespace)[0]
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"{self.namespace}-quickstart"},
            "spec": {
                "capacity": claim["spec"]["resources"]["requests"],
                "accessModes": claim["spec"]["accessModes"],
                "hostPath": {"path": "/nowhere"},
                "claimRef": {"namespace": self.namespace, "name": claim["metadata"]["name"]},
            },
        }
        self.apply(volume, claim)
        self.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/quickstart", "--timeout=120s")

    def apply(self, *objects: Object) -> None:
        """`kubectl apply` of objects."""
        body = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.control_plane.kubectl("apply", "--filename=-", stdin=json.dumps(body))

    def job(self, **spec: Any) -> Object:
        """The quickstart's job in this namespace; keyword arguments replace fields of its spec."""
        job, _ = read(QUICKSTART / "job.yaml", self.namespace)
        job["spec"] |= spec
        return job

    def base_endpoint(self) -> Object:
        """The quickstart's second endpoint, in this namespace."""
        return read(QUICKSTART / "job.yaml", self.namespace)[1]

    def wait(self, condition: str, target: str = "ftj/quickstart") -> None:
        """`kubectl wait` for a condition."""
        self.kubectl("wait", f"--for=condition={condition}", target, "--timeout=180s")

    def status(self, target: str = "ftj/quickstart") -> Object:
        """The status of an object; empty before the first one is written."""
        found: Object = self.get(target).get("status", {})
        return found

    def until_status(self, condition: Callable[[Object], Any], what: str, target: str = "ftj/quickstart") -> Object:
        """The first status of which the condition is true."""

        def met() -> Object | None:
            status = self.status(target)
            return status if condition(status) else None

        answer: Object = until(met, what)
        return answer

    def message(self, kind: str = "Progressing") -> str:
        """What a condition of the job says."""
        return str(next(c["message"] for c in self.status()["conditions"] if c["type"] == kind))

    def row(self) -> dict[str, str]:
        """The job as `kubectl get ftj` shows it, by column."""
        head, line = self.kubectl("get", "ftj", "quickstart").splitlines()
        starts = [name.start() for name in re.finditer(r"\S+", head)]
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        return dict(zip(head.split(), cells, strict=True))

    def until_row(self, phase: str, reason: str) -> dict[str, str]:
        """Waits until `kubectl get ftj` shows this phase and reason."""

        def shown() -> dict[str, str] | None:
            found = self.row()
            return found if (found["PHASE"], found["REASON"]) == (phase, reason) else None

        answer: dict[str, str] = until(shown, f"{phase}/{reason}")
        return answer

    def until_none(self, kind: str, **labels: str) -> None:
        """Waits until there is no such object."""
        until(lambda: not self.items(kind, **labels), f"no {kind} with {labels}")


def make_namespace(control_plane: ControlPlane) -> str:
    """A new namespace in which pods can be created."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", name)
    # Before its service account is there, pods are refused.
    control_plane.kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=60s")
    return name


def read(file: Path, namespace: str) -> list[Object]:
    """The objects of a YAML file, moved to a namespace."""
    objects = [document.obj for document in load(file)]
    for each in objects:
        each["metadata"]["namespace"] = namespace
    return objects


def condition(status: Object, kind: str) -> tuple[str, str]:
    """Status and reason of a condition; empty where it is not set."""
    found = next((c for c in status.get("conditions", []) if c["type"] == kind), {"status": "", "reason": ""})
    return found["status"], found["reason"]


def annotated(job: Object, stage: str, **annotations: str) -> Object:
    """The job with annotations on the pods of one stage; `exit_code` stands for `test.trimtab.dev/exit-code`."""
    keys = {f"test.trimtab.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    for entry in job["spec"]["stages"]:
        if entry["name"] == stage:
            entry["annotations"] = keys
    return job
