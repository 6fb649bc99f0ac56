"""What no API server here can check about the examples."""

from pathlib import Path
from typing import Any

import yaml

KUEUE = Path(__file__).parents[2] / "examples" / "kueue"


def test_the_job_of_the_kueue_example_finds_its_queue_and_the_queue_its_flavor() -> None:
    """Kueue's own definitions can't be had here; the names must fit all the same."""
    (job,) = yaml.safe_load_all((KUEUE / "job.yaml").read_text())
    objects: list[dict[str, Any]] = list(yaml.safe_load_all((KUEUE / "queues" / "queues.yaml").read_text()))
    by_kind = {obj["kind"]: obj for obj in objects}
    assert {obj["apiVersion"] for obj in objects} == {"kueue.x-k8s.io/v1beta1"}
    local, cluster, flavor = (by_kind[kind] for kind in ("LocalQueue", "ClusterQueue", "ResourceFlavor"))
    assert local["metadata"] == {"name": job["spec"]["queueName"], "namespace": job["metadata"]["namespace"]}
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (group,) = cluster["spec"]["resourceGroups"]
    assert [entry["name"] for entry in group["flavors"]] == [flavor["metadata"]["name"]]
    covered = {resource["name"] for entry in group["flavors"] for resource in entry["resources"]}
    asked = set(job["spec"]["defaults"]["resources"]["limits"])
    assert asked <= covered == set(group["coveredResources"]), "Kueue admits nothing with a resource outside its quota"
