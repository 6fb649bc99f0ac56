"""`python -m trimtab_operator.selftest`: train a tiny model on this cluster as a FineTuneJob; `helm test` runs it.

It makes a claim, has a pod put lines of text on it, submits a job of one stage, waits until it is Complete, and removes
what it made. Exit status 0: all of that worked; 1: it did not, and the last lines say why.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from trimtab_operator.core import credentials, podtemplate
from trimtab_operator.core.api_server import connect
from trimtab_operator.core.errors import KubeError, Unavailable
from trimtab_operator.core.kube import CLAIM, FINETUNEJOB, POD, Kind, Kube, Object

MANAGER = "trimtab-selftest"
OPTIONS_VARIABLE = "TRIMTAB_SELFTEST"
_MOUNT = "/data"
_TEXT = "text.jsonl"
_LINES = 200
_POLL_SECONDS = 2.0

Say = Callable[[str], None]


class Options(BaseModel):
    """What the chart's values say; JSON in `$TRIMTAB_SELFTEST`."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)

    namespace: str
    image: str
    """Of the pod that writes the text: any image with Python, such as the operator's own."""
    image_pull_secrets: list[dict[str, str]] = []
    storage_class_name: str = ""
    storage: str = "1Gi"
    timeout_seconds: float = 1200
    resources: dict[str, Any] = {}


class SelftestFailed(Exception):
    """The cluster did not train; the message says how far it came."""


async def run(kube: Kube, options: Options, say: Say) -> None:
    """Do all of it, and clean up whatever the outcome.

    Raises:
        SelftestFailed: The text could not be written, or the job did not complete in time.
        KubeError: The API server refused an object; its message says why.
    """
    name = f"trimtab-selftest-{uuid.uuid4().hex[:6]}"
    deadline = time.monotonic() + options.timeout_seconds
    made: list[Kind] = []
    try:
        for obj, kind in ((claim(name, options), CLAIM), (writer(name, options), POD)):
            await kube.create(obj, manager=MANAGER)
            made.append(kind)
            say(f"created {kind.kind} {options.namespace}/{name}")
        await _until(kube, POD, name, options, deadline, say, _pod_outcome)
        await kube.delete(POD, options.namespace, name)
        made.remove(POD)
        await kube.create(job(name, options), manager=MANAGER)
        made.append(FINETUNEJOB)
        say(f"created FineTuneJob {options.namespace}/{name}")
        await _until(kube, FINETUNEJOB, name, options, deadline, say, _job_outcome)
    finally:
        for kind in reversed(made):
            await kube.delete(kind, options.namespace, name)
            say(f"deleted {kind.kind} {options.namespace}/{name}")


Outcome = tuple[bool | None, str]
"""True: it ended well; False: badly; None: not yet. And what is going on, in words."""


async def _until(
    kube: Kube, kind: Kind, name: str, options: Options, deadline: float, say: Say, outcome: Callable[[Object], Outcome]
) -> None:
    said = ""
    while True:
        try:
            obj = await kube.get(kind, options.namespace, name)
        except Unavailable as error:
            ended, words = None, str(error)
        else:
            ended, words = outcome(obj) if obj is not None else (False, "it was deleted")
        if words != said:
            say(f"{kind.kind} {name}: {words}")
            said = words
        if ended:
            return
        if ended is False:
            raise SelftestFailed(f"{kind.kind} {name}: {words}")
        if time.monotonic() > deadline:
            raise SelftestFailed(f"{kind.kind} {name} is not done after {options.timeout_seconds:g} s: {words}")
        await asyncio.sleep(_POLL_SECONDS)


def _pod_outcome(pod: Object) -> Outcome:
    status = pod.get("status", {})
    phase = status.get("phase", "Pending")
    told = [f"{c['reason']}: {c.get('message', '')}" for c in status.get("conditions", []) if c.get("reason")]
    waits = [c["state"]["waiting"] for c in status.get("containerStatuses", []) if c.get("state", {}).get("waiting")]
    told += [f"{wait.get('reason')}: {wait.get('message', '')}" for wait in waits]
    return {"Succeeded": True, "Failed": False}.get(phase), "; ".join([phase, *told])


def _job_outcome(obj: Object) -> Outcome:
    status = obj.get("status", {})
    held = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
    if end := held.get("Complete") or held.get("Failed"):
        return "Complete" in held, f"{end['type']}, {end['reason']}: {end.get('message', '')}"
    words = (status.get("phase", "no status yet: is the operator running?"), status.get("reason", ""))
    return None, " ".join(filter(None, (*words, status.get("progressText"))))


def claim(name: str, options: Options) -> Object:
    """The claim for text and result."""
    chosen = {"storageClassName": options.storage_class_name} if options.storage_class_name else {}
    return {
        **_head("v1", "PersistentVolumeClaim", name, options),
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": options.storage}},
            **chosen,
        },
    }


def writer(name: str, options: Options) -> Object:
    """The pod that puts the text on the claim; it fits the restricted profile."""
    container = {
        "name": "write",
        "image": options.image,
        "command": ["python", "-m", "trimtab_operator.selftest", "write", f"{_MOUNT}/{_TEXT}"],
        "securityContext": podtemplate.CONTAINER_SECURITY,
        "volumeMounts": [{"name": "data", "mountPath": _MOUNT}],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    }
    return {
        **_head("v1", "Pod", name, options),
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": podtemplate.POD_SECURITY,
            "containers": [container],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": name}}],
            **({"imagePullSecrets": options.image_pull_secrets} if options.image_pull_secrets else {}),
        },
    }


def job(name: str, options: Options) -> Object:
    """One stage on a model of 50,000 weights, two steps."""
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    stage = {
        "name": "train",
        "pretrain": {"data": [{"uri": f"pvc://{name}/{_TEXT}"}], "maxLength": 64},
        "train": {"epochs": 1, "maxSteps": 2, "globalBatchSize": 2, "learningRate": 1e-3},
        "precision": "fp32",
        "retries": 1,
        **({"resources": options.resources} if options.resources else {}),
    }
    return {
        **_head(FINETUNEJOB.api_version, FINETUNEJOB.kind, name, options),
        "spec": {
            "model": {"config": config, "tokenizer": {"train": {"vocabularySize": 300}}},
            "artifacts": {"uri": f"pvc://{name}/models"},
            "stages": [stage],
            **({"defaults": {"imagePullSecrets": secrets}} if (secrets := options.image_pull_secrets) else {}),
        },
    }


def write(path: Path) -> None:
    """Lines of text to train on."""
    lines = (json.dumps({"text": f"Seven times {n} is {7 * n}, and {n} times {n} is {n * n}."}) for n in range(_LINES))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(api_version: str, kind: str, name: str, options: Options) -> Object:
    labels = {"app.kubernetes.io/name": "trimtab", "app.kubernetes.io/component": "selftest"}
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name, "namespace": options.namespace, "labels": labels},
    }


async def _main() -> None:
    options = Options.model_validate_json(os.environ[OPTIONS_VARIABLE])
    async with connect(await credentials.load(), requests_per_second=10, burst=10) as kube:
        await run(kube, options, lambda line: print(line, flush=True))


def main(arguments: list[str]) -> int:
    """Exit status of the command line."""
    if arguments[:1] == ["write"]:
        write(Path(arguments[1]))
        return 0
    try:
        asyncio.run(_main())
    except (SelftestFailed, KubeError, credentials.CredentialsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("the cluster trains")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
