"""A job that is trained while the node and the operator break under it: must-show 2."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.cluster.cluster import SYSTEM, TEAM, Cluster, read
from tests.controlplane.jobs import condition, until

from trimtab_trainer.progress.metrics_log import read_rows

STEPS = 2000
EVERY = 50
"""Steps between two checkpoints."""
LARGER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""So that training lasts longer than all the faults."""
WORKER = "trimtab_trainer.engine.worker"
KUBELET_AWAY_SECONDS = 60


class Training:
    """The stage as its volume and its pods show it."""

    def __init__(self, cluster: Cluster, volume: Path) -> None:
        self._cluster = cluster
        self._volume = volume

    @property
    def folder(self) -> Path | None:
        """The stage's folder, once it is there."""
        return next(self._volume.glob("models/sums-*/sft"), None)

    def rows(self) -> list[dict[str, Any]]:
        """What `metrics.jsonl` has of training steps."""
        folder = self.folder
        return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row] if folder else []

    def checkpoint(self) -> int:
        """Step of the newest complete checkpoint; 0 without one."""
        folder = self.folder
        found = folder.glob("checkpoints/step-*") if folder else []
        return max((int(path.name.removeprefix("step-")) for path in found if path.name[5:].isdecimal()), default=0)

    def until_beyond(self, attempt: int, checkpoint: int) -> None:
        """Waits until the attempt has trained on after a checkpoint later than the given one."""

        def beyond() -> bool:
            newest = self.checkpoint()
            rows = self.rows()
            return bool(rows) and rows[-1]["attempt"] == attempt and rows[-1]["step"] > newest > checkpoint

        until(beyond, f"attempt {attempt} trains beyond a new checkpoint", 300)

    def pod(self, attempt: int, index: int) -> str:
        """The uid of a pod of an attempt."""
        selector = (
            f"trimtab.dev/stage=sft,trimtab.dev/attempt={attempt},batch.kubernetes.io/job-completion-index={index}"
        )
        (pod,) = self._cluster.items("pods", TEAM, selector)
        return str(pod["metadata"]["uid"])


def test_training_outlives_what_breaks_under_it(cluster: Cluster, team: Path) -> None:
    clock, node = cluster.clock, cluster.node
    training = Training(cluster, team)
    with clock.phase("faults: helm install"):
        cluster.install()
    before = len(cluster.plane.audit())
    claim, job = read("job.yaml")
    job["spec"]["stages"][0]["train"] |= {"maxSteps": STEPS, "globalBatchSize": 16}
    job["spec"]["model"]["config"] |= LARGER
    job["spec"]["defaults"]["checkpoint"]["everySteps"] = EVERY
    cluster.apply(claim, job)
    saved: dict[int, int] = {}

    with clock.phase("faults: a training process is killed"):
        training.until_beyond(1, 0)
        assert node.kill_processes(training.pod(1, index=1), f"-m {WORKER}")
        saved[1] = training.checkpoint()
        training.until_beyond(2, saved[1])
    with clock.phase("faults: a pod's sandbox is killed"):
        assert node.kill_sandbox(training.pod(2, index=0))
        saved[2] = training.checkpoint()
        training.until_beyond(3, saved[2])
    with clock.phase("faults: the kubelet is away"):
        step = training.rows()[-1]["step"]
        node.stop_kubelet()
        time.sleep(KUBELET_AWAY_SECONDS)
        # Long enough to be noticed: the pods are no longer Ready, and the node gets a taint.
        cluster.kubectl("wait", "--for=condition=Ready=Unknown", "node", "--all", "--timeout=120s")
        node.start_kubelet()
        cluster.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")
        assert training.rows()[-1]["step"] > step
    with clock.phase("faults: the operator's leader is killed"):
        leader = holder(cluster)
        pods = cluster.items("pods", SYSTEM, "app.kubernetes.io/component=operator")
        (uid,) = [pod["metadata"]["uid"] for pod in pods if leader.startswith(pod["metadata"]["name"])]
        assert node.kill_processes(uid, "trimtab_operator")
        until(lambda: holder(cluster) not in ("", leader), "somebody leads again")
    assert training.rows()[-1]["step"] < STEPS, "the training ended before the faults did: make the model LARGER"
    with clock.phase("faults: until Complete"):
        cluster.kubectl("wait", "--for=condition=Complete", "ftj/sums", f"--namespace={TEAM}", "--timeout=900s")

    rows = training.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    first = {row["attempt"]: row["step"] for row in reversed(rows)}
    assert first == {1: 1, 2: saved[1] + 1, 3: saved[2] + 1}
    status = cluster.get("ftj", "sums", f"--namespace={TEAM}")["status"]
    assert (status["stages"][0]["attempt"], status["stages"][0]["failures"]["count"]) == (3, 2)
    assert condition(status, "Complete")[0] == "True"

    made = [
        event["requestObject"]["metadata"]
        for event in cluster.plane.audit()[before:]
        if (event["verb"], event["objectRef"]["resource"], event["responseStatus"]["code"]) == ("create", "jobs", 201)
    ]
    assert len({each["name"] for each in made}) == len(made) == 4
    numbers = [(each["labels"].get("trimtab.dev/stage"), each["labels"]["trimtab.dev/attempt"]) for each in made]
    assert numbers == [(None, "1"), ("sft", "1"), ("sft", "2"), ("sft", "3")]


def holder(cluster: Cluster) -> str:
    """Who holds the Lease; empty for nobody."""
    lease = cluster.get("lease", "trimtab-operator", f"--namespace={SYSTEM}")
    return str(lease["spec"].get("holderIdentity") or "")
