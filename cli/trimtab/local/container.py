"""From a pod's manifest to a process of this machine: pure but for the folders that it is told about."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_operator.core.kube import Object

_INHERITED = re.compile(
    r"PATH|LANG|LC_.*|TZ|TMPDIR|USER|LOGNAME|LD_LIBRARY_PATH|(CUDA|NVIDIA)_.*|SSL_CERT_(FILE|DIR)|"
    r"REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|AWS_CA_BUNDLE|(HTTP|HTTPS|NO|ALL)_PROXY|(http|https|no|all)_proxy"
)
"""What of this machine a container sees: how to find programs, devices and the network, but no credentials."""
_NODE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
"""All pods are on this machine, so collectives go over loopback."""
_POD_HOST = re.compile(r"\b([a-z0-9][-a-z0-9]*\.[a-z0-9][-a-z0-9]*\.[a-z0-9][-a-z0-9]*)\.svc(?:\.[a-z0-9][-a-z0-9.]*)?")
_REFERENCE = re.compile(r"\$\$|\$\(([^)]*)\)")
_KEYED_FIELD = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


class Unsupported(Exception):
    """The pod asks for something that local mode does not have; the message says what."""


@dataclass(frozen=True)
class Process:
    """What to start."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path


@dataclass(frozen=True)
class Place:
    """Where a pod runs: its directories by path in the container, its address, and those of other pods' host names."""

    paths: Mapping[str, Path]
    address: str
    address_of: Callable[[str], str]
    scratch: Path

    def translate(self, text: str) -> str:
        """Paths of the container become directories of this machine, pods' host names become addresses.

        A mount path counts where it starts a path, the longest first, also inside JSON; `file:///…` stays as it is.
        """
        if self.paths:
            mounts = "|".join(re.escape(path) for path in sorted(self.paths, key=len, reverse=True))
            text = re.sub(rf"(?<![\w./-])({mounts})(?![\w.-])", lambda match: str(self.paths[match[1]]), text)
        return _POD_HOST.sub(lambda match: self.address_of(match[1]), text)


def main_container(pod: Object) -> dict[str, Any]:
    """The pod's container; `Unsupported` where there are several or it has no command."""
    spec = pod["spec"]
    containers: list[dict[str, Any]] = spec["containers"]
    if len(containers) != 1 or spec.get("initContainers"):
        raise Unsupported("local mode runs pods of one container")
    if not containers[0].get("command"):
        raise Unsupported("local mode runs no image, so the container needs a command")
    return containers[0]


def process(pod: Object, place: Place, secret: Callable[[str, str], str]) -> Process:
    """The process of the pod's container.

    Args:
        pod: the Pod.
        place: where it runs.
        secret: value of (Secret's name, key); `Unsupported` where there is none.
    """
    container = main_container(pod)
    environment = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)} | _NODE
    programs = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join(filter(None, (programs, environment.get("PATH", os.defpath))))
    environment |= {"HOME": str(place.scratch), "HOSTNAME": pod["spec"].get("hostname", pod["metadata"]["name"])}
    if "/tmp" in place.paths:  # noqa: S108 - a path in the container
        environment["TMPDIR"] = str(place.paths["/tmp"])  # noqa: S108
    given: dict[str, str] = {}
    for entry in container.get("env", []):
        value = _value(entry, pod, place, secret)
        given[entry["name"]] = _expanded(value, given) if "value" in entry else value
    environment |= {name: place.translate(value) for name, value in given.items()}
    return Process(command(container["command"] + container.get("args", []), place), environment, place.scratch)


def command(words: list[str], place: Place) -> tuple[str, ...]:
    """An argument list of the container as one of this machine; `python` is the interpreter that runs us."""
    first, *rest = (place.translate(word) for word in words)
    return (sys.executable if first in ("python", "python3") else first, *rest)


def _value(entry: Mapping[str, Any], pod: Object, place: Place, secret: Callable[[str, str], str]) -> str:
    source = entry.get("valueFrom")
    if source is None:
        return str(entry.get("value", ""))
    if reference := source.get("secretKeyRef"):
        return secret(reference["name"], reference["key"])
    if field := source.get("fieldRef"):
        return _field(field["fieldPath"], pod, place)
    raise Unsupported(f"env {entry['name']}: no source of kind {', '.join(source)} in local mode")


def _expanded(value: str, earlier: Mapping[str, str]) -> str:
    """As a kubelet: `$$` is `$`, `$(NAME)` the value of an earlier variable, or stays as it is where there is none."""

    def replacement(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else earlier.get(found[1], found[0])

    return _REFERENCE.sub(replacement, value)


def _field(path: str, pod: Object, place: Place) -> str:
    metadata = pod["metadata"]
    if keyed := _KEYED_FIELD.fullmatch(path):
        return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
    match path:
        case "status.podIP" | "status.hostIP":
            return place.address
        case "metadata.name" | "metadata.namespace" | "metadata.uid":
            return str(metadata[path.removeprefix("metadata.")])
        case "spec.nodeName":
            return "local"
    raise Unsupported(f"no field {path} in local mode")


def named_port(container: Mapping[str, Any], port: int | str) -> int:
    """A port's number; names are looked up among the container's ports."""
    if isinstance(port, int):
        return port
    for entry in container.get("ports", []):
        if entry.get("name") == port:
            return int(entry["containerPort"])
    raise Unsupported(f"the container has no port named {port!r}")
