"""From the Dockerfiles to an answer, as a platform team would do it on a Friday: must-show 1."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import host
from tests.cluster.cluster import CHART, RELEASE, SYSTEM, TEAM, Cluster, Object, read
from tests.cluster.images import IMAGES
from tests.controlplane.jobs import condition, until

URL = "http://sums.team.svc.cluster.local:8000/v1"
EXPECTED = {
    "user": 65532,
    "safePath": True,
    "writable": [],
    "compilers": [],
    "uncompiled": [],
    "notListed": ["trimtab"],
    "notInstalled": [],
    "hashed": True,
}
"""Of every image of this tier; the bill of materials names the product itself apart."""
CRDS = ("finetunejobs.trimtab.dev", "modelendpoints.trimtab.dev")


def test_install_train_serve_upgrade_test_uninstall(cluster: Cluster, team: Path) -> None:
    clock = cluster.clock
    with clock.phase("helm install"):
        cluster.install()
    with clock.phase("look into the images"):
        for name, image in IMAGES.items():
            assert (name, *cluster.run(image.name, "inside.py")) == (name, EXPECTED)
    with clock.phase("kubectl apply until Complete"):
        claim, job = read("job.yaml")
        cluster.apply(claim, job)
        cluster.kubectl("wait", "--for=condition=Complete", "ftj/sums", f"--namespace={TEAM}", "--timeout=900s")
    pods = cluster.items("pods", TEAM, "trimtab.dev/stage=sft")
    assert len(pods) == 2
    assert {pod["status"]["phase"] for pod in pods} == {"Succeeded"}
    check_policy(cluster)

    with clock.phase("ask through the Service's name"):
        url = cluster.get("ftj", "sums", f"--namespace={TEAM}")["status"]["endpoint"]["url"]
        assert url == URL
        answers = cluster.ask(url, "sums", "What is 2 plus 2?", "What is 3 plus 4?")
    assert [answer["finish_reason"] for answer in answers] == ["stop", "stop"]
    assert [answer["content"].strip() for answer in answers] == ["2 plus 2 is 4.", "3 plus 4 is 7."]

    with clock.phase("helm upgrade"):
        served = uids(cluster, "trimtab.dev/endpoint=sums")
        cluster.helm(
            "upgrade",
            RELEASE,
            str(CHART),
            f"--namespace={SYSTEM}",
            "--reuse-values",
            "--wait",
            "--timeout=5m",
            "--set=settings.workers=8",
        )
    with clock.phase("helm test"):
        print(cluster.helm("test", RELEASE, f"--namespace={SYSTEM}", "--timeout=15m"))
    assert uids(cluster, "trimtab.dev/endpoint=sums") == served

    with clock.phase("helm uninstall"):
        cluster.helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--wait", "--timeout=5m")
        until(
            lambda: not cluster.items("pods", SYSTEM) + cluster.items("leases", SYSTEM), "neither pod nor Lease is left"
        )
    assert {crd["metadata"]["name"] for crd in cluster.items("crds", None)} >= set(CRDS)
    assert condition(cluster.get("ftj", "sums", f"--namespace={TEAM}")["status"], "Complete")[0] == "True"
    with clock.phase("ask while no operator runs"):
        (answer,) = cluster.ask(URL, "sums", "What is 1 plus 1?")
    assert answer["content"].strip() == "1 plus 1 is 2."

    with clock.phase("delete job and endpoint"):
        cluster.kubectl("delete", "ftj,mep", "--all", f"--namespace={TEAM}", "--timeout=60s")
        until(lambda: left(cluster) == [], "nothing of ours is left")
    until(lambda: host.pod_processes() == [], "no process of a pod")
    until(lambda: not [point for point in host.mounts(cluster.node.root) if "/pods/" in point], "no mount of a pod")


def check_policy(cluster: Cluster) -> None:
    """The job's NetworkPolicy means the pods that there are. The bridge does not enforce it: nobody here could tell."""
    (policy,) = cluster.items("networkpolicies", TEAM)
    among, watchers = policy["spec"]["ingress"]
    ours = [f"sums-{role}" for role in ("prepare-1", "sft-1", "sft-1")]
    assert among["from"] == policy["spec"]["egress"][0]["to"] == [{"podSelector": policy["spec"]["podSelector"]}]
    meant = cluster.items("pods", TEAM, labels(policy["spec"]["podSelector"]))
    assert [pod["metadata"]["name"].rsplit("-", 3)[0] for pod in meant] == ours
    operator, prometheus = watchers["from"]
    assert prometheus == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert (
        cluster.get("namespace", SYSTEM)["metadata"]["labels"].items()
        >= operator["namespaceSelector"]["matchLabels"].items()
    )
    assert len(cluster.items("pods", SYSTEM, labels(operator["podSelector"]))) == 2


def labels(selector: Object) -> str:
    """A selector of labels as kubectl takes it."""
    return ",".join(f"{key}={value}" for key, value in selector["matchLabels"].items())


def uids(cluster: Cluster, selector: str) -> list[str]:
    return [pod["metadata"]["uid"] for pod in cluster.items("pods", TEAM, selector)]


def left(cluster: Cluster) -> list[str]:
    """What there is of pods, Services and Leases, besides what belongs to the cluster itself."""
    found = [item for kind in ("pods", "services", "leases") for item in cluster.items(kind, None)]
    return [
        f"{item['kind']} {item['metadata']['namespace']}/{item['metadata']['name']}"
        for item in found
        if item["metadata"]["namespace"] not in ("default", "kube-system", "kube-node-lease")
    ]
