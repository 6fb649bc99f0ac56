"""A pod's volumes as directories of this machine."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from trimtab.local.container import Unsupported
from trimtab.local.kube import SECRET, LocalKube
from trimtab.local.workdir import Workdir
from trimtab_operator.core.kube import CONFIGMAP, Kind, Object

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a path in the container; the machine's own serves


def secret_value(kube: LocalKube, namespace: str, name: str, key: str) -> str:
    """One key of a Secret as text."""
    return _content(_found(kube, SECRET, namespace, name), key, f"Secret {name}").decode()


def mount(kube: LocalKube, workdir: Workdir, pod: Object, scratch: Path) -> dict[str, Path]:
    """Make the pod's volumes and tell path in the container -> directory, its termination message included.

    Claims last; ConfigMaps and the termination message lie in the pod's folder; the rest goes with `scratch`.

    Raises:
        Unsupported: a volume of another kind, or a ConfigMap or Secret that does not exist (yet).
    """
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    container = pod["spec"]["containers"][0]
    folder = workdir.pod(namespace, name)
    sources = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    places: dict[str, Path] = {}
    paths: dict[str, Path] = {}
    for entry in container.get("volumeMounts", []):
        volume = entry["name"]
        if entry["mountPath"].rstrip("/") == SHARED_MEMORY:
            continue
        if volume not in places:
            places[volume] = _place(kube, workdir, namespace, sources[volume], folder, scratch)
        paths[entry["mountPath"].rstrip("/")] = places[volume] / str(entry.get("subPath", ""))
    for volume, directory in places.items():
        if "configMap" in sources[volume]:
            _localise(directory, paths)
    message = folder / "termination-log"
    message.parent.mkdir(parents=True, exist_ok=True)
    message.write_bytes(b"")
    return paths | {container.get("terminationMessagePath", "/dev/termination-log"): message}


def _place(
    kube: LocalKube, workdir: Workdir, namespace: str, volume: dict[str, Any], folder: Path, scratch: Path
) -> Path:
    if claim := volume.get("persistentVolumeClaim"):
        directory = workdir.claim(namespace, str(claim["claimName"]))
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    if "emptyDir" in volume:
        directory = scratch / str(volume["name"])
        directory.mkdir(exist_ok=True)
        return directory
    if source := volume.get("configMap"):
        obj = _found(kube, CONFIGMAP, namespace, source["name"])
        return _written(folder / "volumes" / volume["name"], obj, source)
    if source := volume.get("secret"):
        obj = _found(kube, SECRET, namespace, source["secretName"])
        return _written(scratch / volume["name"], obj, source)
    raise Unsupported(f"volume {volume['name']}: local mode has claims, emptyDir, ConfigMaps and Secrets only")


def _localise(directory: Path, paths: dict[str, Path]) -> None:
    """In a ConfigMap's JSON files, strings that are a path below a mount become this machine's paths."""

    def translated(value: Any) -> Any:
        match value:
            case dict():
                return {key: translated(child) for key, child in value.items()}
            case list():
                return [translated(child) for child in value]
            case str() if value.startswith("/"):
                mounts = (path for path in paths if value == path or value.startswith(f"{path}/"))
                mount_path = max(mounts, key=len, default=None)
                return value if mount_path is None else f"{paths[mount_path]}{value.removeprefix(mount_path)}"
        return value

    for file in directory.rglob("*.json"):
        before = json.loads(file.read_bytes())
        if (after := translated(before)) != before:
            file.write_text(json.dumps(after), encoding="utf-8")


def _found(kube: LocalKube, kind: Kind, namespace: str, name: str) -> Object:
    obj = kube.find(kind, namespace, name)
    if obj is None:
        raise Unsupported(f'{kind.kind.lower()} "{name}" not found in namespace {namespace}; add it to the manifests')
    return obj


def _written(directory: Path, obj: Object, source: dict[str, Any]) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    keys = [*obj.get("data", {}), *obj.get("stringData", {})]
    files = {item["key"]: item["path"] for item in source.get("items", [])} or {key: key for key in keys}
    for key, path in files.items():
        target = directory / path
        if not target.resolve().is_relative_to(directory.resolve()):
            raise Unsupported(f"{obj['kind']} {obj['metadata']['name']}: the path {path!r} leaves the volume")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_content(obj, key, f"{obj['kind']} {obj['metadata']['name']}"))
    return directory


def _content(obj: Object, key: str, where: str) -> bytes:
    if key in obj.get("stringData", {}):
        return str(obj["stringData"][key]).encode()
    if key not in obj.get("data", {}):
        raise Unsupported(f"{where} has no key {key!r}; add it")
    value = str(obj["data"][key])
    return base64.b64decode(value) if obj["kind"] == SECRET.kind else value.encode()
