"""YAML as `kubectl` reads it: `1e-5` is a number, dates are strings, a key stands once, several documents a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab_operator.core.kube import Object


class InvalidManifest(Exception):
    """A manifest that can't be used; each fault names cause, place and remedy."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class Document:
    """One object of a file. `line` is where it starts, counted from 1."""

    path: Path
    line: int
    obj: Object

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2's JSON types, with YAML 1.1's booleans, which `kubectl` takes too."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a string", key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load(path: Path) -> list[Document]:
    """Every object of a file; empty documents are left out, the items of a List stand alone.

    Raises:
        InvalidManifest: the file can't be read, is not YAML, or holds something else than objects.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidManifest(f"{path}: {cause}; name a YAML file that can be read") from error
    loader = _Loader(text)
    documents: list[Document] = []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                break
            obj = loader.construct_document(node)
            line = node.start_mark.line + 1
            if obj is not None:
                documents += [Document(path, line, _checked(path, line, each)) for each in _items(obj)]
    except yaml.YAMLError as error:
        raise InvalidManifest(_not_yaml(path, error)) from error
    except (RecursionError, ValueError) as error:
        raise InvalidManifest(f"{path}: not YAML that can be read: {error}; simplify it") from error
    finally:
        loader.dispose()
    if not documents:
        raise InvalidManifest(f"{path}: holds no object; write a FineTuneJob or a ModelEndpoint into it")
    return documents


def _items(obj: Any) -> list[Any]:
    if isinstance(obj, dict) and obj.get("kind") == "List" and isinstance(obj.get("items"), list):
        return list(obj["items"])
    return [obj]


def _checked(path: Path, line: int, obj: Any) -> Object:
    """The object with a namespace; refused where it lacks what every object has."""
    if not isinstance(obj, dict):
        raise InvalidManifest(f"{path}:{line}: not an object; a manifest starts with apiVersion, kind and metadata")
    for key in ("apiVersion", "kind"):
        if not isinstance(obj.get(key), str):
            raise InvalidManifest(f"{path}:{line}: {key}: Required value; add it at the start of the object")
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        raise InvalidManifest(f"{path}:{line}: metadata.name: Required value; give the object a name")
    return {**obj, "metadata": {"namespace": "default", **metadata}}


def _not_yaml(path: Path, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        cause = " ".join(filter(None, (error.problem, error.context)))
        place = f"{path}:{error.problem_mark.line + 1}:{error.problem_mark.column + 1}"
    else:
        cause, place = " ".join(str(error).split()), str(path)
    return f"{place}: not YAML: {cause}; correct this line"
