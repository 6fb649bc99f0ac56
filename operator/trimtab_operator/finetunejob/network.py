"""One NetworkPolicy a job: its pods talk to each other, and to little else."""

from __future__ import annotations

from functools import cache
from ipaddress import ip_network

from trimtab_operator.core import podtemplate
from trimtab_operator.core.kube import NETWORKPOLICY, Object
from trimtab_operator.core.names import (
    LABEL_COMPONENT,
    LABEL_JOB,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    child_name,
    label_value,
)
from trimtab_operator.core.settings import Settings

PROGRESS_PORT = 8080
DNS_PORT = 53
_LINK_LOCAL = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))
"""Metadata services of clouds answer there: never part of a wider range."""
_NAMESPACE = "kubernetes.io/metadata.name"
_OPERATOR = {"app.kubernetes.io/name": "trimtab", LABEL_COMPONENT: "operator"}
"""Labels of the operator's pods, as the chart sets them."""


def network_policy(obj: Object, settings: Settings) -> Object:
    """The policy of a job's pods, prepare and training alike."""
    name, uid, namespace = (obj["metadata"][key] for key in ("name", "uid", "namespace"))
    ours = {LABEL_JOB: label_value(name), LABEL_MANAGED_BY: MANAGED_BY}
    among = [{"podSelector": {"matchLabels": ours}}]
    watchers: list[Object] = [
        {"namespaceSelector": {"matchLabels": {_NAMESPACE: settings.lease_namespace}}}
        | {"podSelector": {"matchLabels": _OPERATOR}},
        *({"namespaceSelector": {"matchLabels": {_NAMESPACE: space}}} for space in settings.metrics_namespaces),
    ]
    outside = [{"ipBlock": _block(cidr)} for cidr in settings.egress_cidrs]
    return {
        "apiVersion": NETWORKPOLICY.api_version,
        "kind": NETWORKPOLICY.kind,
        "metadata": {
            "name": child_name(name, uid, "network"),
            "namespace": namespace,
            "labels": ours,
            "ownerReferences": [podtemplate.owner_reference(obj)],
        },
        "spec": {
            "podSelector": {"matchLabels": ours},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": among}, {"from": watchers, "ports": [_port(PROGRESS_PORT, "TCP")]}],
            "egress": [
                {"to": among},
                {"ports": [_port(DNS_PORT, "UDP"), _port(DNS_PORT, "TCP")]},
                *([{"to": outside}] if outside else []),
            ],
        },
    }


def _port(number: int, protocol: str) -> Object:
    return {"port": number, "protocol": protocol}


@cache
def _block(cidr: str) -> Object:
    network = ip_network(cidr)
    wider = [each for each in _LINK_LOCAL if each.network_address in network and each.prefixlen > network.prefixlen]
    return {"cidr": cidr, **({"except": [str(each) for each in wider]} if wider else {})}
