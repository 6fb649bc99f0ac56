"""The policy of a job's pods: valid, theirs alone, and as the settings say. No test network enforces one."""

from __future__ import annotations

import copy

import kubernetes_validate
import pytest
from pydantic import ValidationError
from tests.unit.finetunejob.world import World, spec

from trimtab_operator.core.kube import Object
from trimtab_operator.core.settings import Settings, from_environment
from trimtab_operator.finetunejob.network import network_policy


def policy(world: World) -> Object:
    (found,) = world.of_kind("NetworkPolicy")
    return found


def test_it_exists_before_any_pod_covers_each_and_goes_with_the_job() -> None:
    world = World(spec())
    world.reconcile()
    world.reconcile()
    kinds = [ref.kind for ref in world.objects]
    assert kinds.index("NetworkPolicy") < kinds.index("Job")
    kubernetes_validate.validate(copy.deepcopy(policy(world)), "1.30", strict=True)
    (owner,) = policy(world)["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (world.owner["metadata"]["uid"], True)
    for role in ("prepare", "one"):
        world.settle()
        (pod,) = world.pods(role)
        selector = policy(world)["spec"]["podSelector"]["matchLabels"]
        assert selector.items() <= pod["metadata"]["labels"].items()
        world.succeed(role)
    world.settle()
    assert len(world.of_kind("NetworkPolicy")) == 1


def test_who_may_talk_to_whom() -> None:
    settings = Settings(lease_namespace="trimtab-system", metrics_namespaces=("observability",))
    world = World(spec(), settings)
    world.settle()
    body = policy(world)["spec"]
    among = [{"podSelector": body["podSelector"]}]
    assert body["policyTypes"] == ["Ingress", "Egress"]
    pods, watchers = body["ingress"]
    assert pods == {"from": among}, "all ports: rendezvous, NCCL"
    assert watchers["ports"] == [{"port": 8080, "protocol": "TCP"}]
    spaces = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in watchers["from"]]
    assert spaces == ["trimtab-system", "observability"]
    assert watchers["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "operator"
    own, names, outside = body["egress"]
    assert own == {"to": among}
    assert names == {"ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]}
    assert outside["to"] == [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
        {"ipBlock": {"cidr": "::/0", "except": ["fe80::/10"]}},
    ]


def test_the_administrator_narrows_it_or_turns_it_off() -> None:
    world = World(spec())
    narrow = from_environment({"TRIMTAB_OPERATOR_EGRESS_CIDRS": "10.0.0.0/8,169.254.169.254/32"})
    outside = network_policy(world.owner, narrow)["spec"]["egress"][2]["to"]
    assert outside == [{"ipBlock": {"cidr": "10.0.0.0/8"}}, {"ipBlock": {"cidr": "169.254.169.254/32"}}]
    closed = from_environment({"TRIMTAB_OPERATOR_EGRESS_CIDRS": ""})
    assert len(network_policy(world.owner, closed)["spec"]["egress"]) == 2
    with pytest.raises(ValidationError, match="egress_cidrs"):
        from_environment({"TRIMTAB_OPERATOR_EGRESS_CIDRS": "example.com"})
    off = World(spec(), Settings(network_policies=False))
    off.settle()
    assert off.of_kind("NetworkPolicy") == []


def test_a_hand_that_opens_it_is_healed() -> None:
    world = World(spec())
    world.settle()
    before = copy.deepcopy(policy(world)["spec"])
    policy(world)["spec"]["ingress"] = [{}]
    world.settle()
    assert policy(world)["spec"] == before
